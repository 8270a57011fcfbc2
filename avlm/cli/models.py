"""``avlm compose`` and ``avlm check``: a model from parts, and proofs on one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from avlm.cli.shared import MAX_SEED, ModelDir, Overrides, check_absent, quiet, writing


def compose(
    out: Annotated[Path, typer.Argument(help="Where the model directory goes.")],
    overrides: Overrides = None,
    language: Annotated[str | None, typer.Option(help="Hub name, folder, or random:MODEL_TYPE.")] = None,
    vision: Annotated[str | None, typer.Option(help="The same for the vision encoder.")] = None,
    audio: Annotated[str | None, typer.Option(help="The same for the audio encoder.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of everything that is drawn afresh.")] = 0,
) -> None:
    """Compose a model directory from a language model and any encoders."""
    from avlm.config.io import assemble
    from avlm.config.model import ModelConfig

    check_absent(out)
    data: dict[str, Any] = {"language": _source(language) if language else {}}
    for sense, given in (("vision", vision), ("audio", audio)):
        if given:
            data[sense] = {"encoder": _source(given)}
    config = assemble(ModelConfig, data, overrides or [])

    from avlm.convert.compose import compose as compose_model
    from avlm.convert.weights import save_model

    quiet()
    model, processor = compose_model(config, seed=seed)
    with writing(out):
        save_model(model, processor, out)
    print(f"{out}: {sum(p.numel() for p in model.parameters()):,} parameters in {', '.join(config.parts())}")


def _source(text: str) -> dict[str, Any]:
    if text.startswith("random:"):
        return {"random": {"model_type": text.removeprefix("random:")}}
    return {"path": text}


def check(model: ModelDir) -> None:
    """Prove on a model that batching, packing, caching, freezing and saving change nothing, and that media matter."""
    from avlm.convert.weights import load_model
    from avlm.eval.check import Checks

    quiet()
    checks = Checks(*load_model(model, lost="keep"), folder=Path(model))
    width = max(map(len, checks.all()))
    failed = 0
    for result in checks.run():
        failed += not result.ok
        print(f"{'ok' if result.ok else 'FAILED':6}  {result.name:{width}}  {result.seconds:5.1f} s  {result.found}")
    if failed:
        raise typer.Exit(1)
