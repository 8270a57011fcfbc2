"""``avlm chat``: questions about pictures, sounds and videos, one by one or as a conversation."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from avlm.cli.conversation import converse, say
from avlm.cli.shared import MAX_SEED, ModelDir, check_file, check_writable, quiet
from avlm.errors import ConfigError


def chat(
    model: ModelDir,
    text: Annotated[
        str | None, typer.Argument(help="What to ask. Without it and without media: a conversation.")
    ] = None,
    image: Annotated[list[Path] | None, typer.Option(help="A picture.")] = None,
    audio: Annotated[list[Path] | None, typer.Option(help="A sound.")] = None,
    video: Annotated[list[Path] | None, typer.Option(help="A video.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest answer.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of the draws, when the temperature is above 0.")] = 0,
    top_k: Annotated[int, typer.Option(help="Choose among so many likeliest tokens; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Choose among tokens that have this probability together.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Leave out tokens below this share of the likeliest one's.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: tokens that were there are less likely.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends the answer.")] = None,
    quant: Annotated[str, typer.Option(help="none, or int8: the language model's weights in eight bits.")] = "none",
    batch: Annotated[Path | None, typer.Option(help="Answer every row of this file of JSON lines.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the answers to --batch go; what is there stays.")] = None,
    slots: Annotated[int, typer.Option(min=1, help="How many rows of --batch are answered at once.")] = 8,
    root: Annotated[list[str] | None, typer.Option(help="A further folder that media of --batch may lie in.")] = None,
) -> None:
    """Ask a model about pictures, sounds and videos."""
    for name, paths in (("image", image), ("audio", audio), ("video", video)):
        for path in paths or []:
            check_file(f"--{name}", str(path))
    if batch is not None or out is not None:
        _check_batch(batch, out, bool(text or image or audio or video))
    from avlm.inference.chat import Audio, Image, Video, load
    from avlm.inference.quantize import check_quant
    from avlm.inference.sampling import Sampling

    sampling = Sampling(
        max_tokens=max_tokens, temperature=temperature, seed=seed, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, stop=tuple(stop or ()),
    )  # fmt: skip
    check_quant(quant)
    quiet()
    if batch is not None and out is not None:
        _answer_rows(model, quant, batch, out, sampling, slots, tuple(root or ()))
        return
    loaded = load(model, quant=quant)  # type: ignore[arg-type]
    makers = ((Image, image), (Audio, audio), (Video, video))
    media = [make(path) for make, paths in makers for path in paths or []]
    if text is None and not media:
        converse(loaded, sampling)
        return
    say(loaded, [*media, *([text] if text else [])], sampling)


def _check_batch(batch: Path | None, out: Path | None, asked: bool) -> None:
    """Refuse what does not go together, before a model is loaded."""
    if batch is None or out is None:
        given, missing = ("--out", "--batch") if batch is None else ("--batch", "--out")
        raise ConfigError(
            f"{given} is given without {missing}, and rows are read from the one and answered in the other. Give both"
        )
    if asked:
        raise ConfigError("--batch answers the rows of a file, and a question is given as well. Leave one of them out")
    check_file("--batch", str(batch))
    check_writable(out)


def _answer_rows(
    model: str, quant: Any, batch: Path, out: Path, sampling: Any, slots: int, roots: tuple[str, ...]
) -> None:
    from avlm.config.data import DataConfig
    from avlm.data.decoding.doors import doors_of
    from avlm.data.decoding.files import limits_of
    from avlm.data.media.reader import MediaReader
    from avlm.inference.batch import Rows, answer_rows
    from avlm.inference.chat import load
    from avlm.inference.engine import Engine
    from avlm.training.console import counted, make_console

    data = DataConfig(roots=roots)
    rows = Rows(batch, data)
    loaded = load(model, quant=quant)
    limits = limits_of(data.limits, doors_of(data, [batch]))
    loaded.processor.use_reader(MediaReader(loaded.processor.media_spec(), limits=limits))
    engine = Engine(loaded.model, loaded.processor, slots=slots)
    with counted("answers", make_console()) as progress:
        done = answer_rows(engine, rows, out, sampling, progress)
    found = f"{done.rows} rows, {done.there} of them answered before" if done.there else f"{done.rows} rows"
    print(f"{found}, {done.bad} that could not be answered; answers in {out}", file=sys.stderr)
    if done.rows and done.bad == done.rows:
        raise ConfigError(
            f"{batch}: not one of its rows could be answered; {out} says what is wrong with each. Give JSON lines of "
            "conversations"
        )
