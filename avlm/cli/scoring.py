"""``avlm eval``: a model's scores by task."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from avlm.cli.shared import ModelDir, Overrides, check_data, check_writable, data_settings, quiet, write_json

if TYPE_CHECKING:
    from avlm.config.data import DataConfig
    from avlm.eval.benchmarks import Report


def evaluate(
    model: ModelDir,
    data: Annotated[str, typer.Argument(metavar="DATA.jsonl", help="Rows with answers, as training reads them.")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Write the report there as JSON.")] = None,
    metric: Annotated[list[str] | None, typer.Option(help="exact or wer; default: by each row's task.")] = None,
    swap: Annotated[bool, typer.Option(help="Also ask with swapped pictures and sounds.")] = True,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 64,
    root: Annotated[list[str] | None, typer.Option(help="A further folder that media may lie in.")] = None,
) -> None:
    """Score a model by task, and check that it looks and listens."""
    check_data("DATA", data)
    settings = data_settings(overrides or [], "Here data.folder=DIR and its kin are understood")
    settings = settings.model_copy(update={"roots": (*settings.roots, *(root or ()))})
    if out is not None:
        check_writable(out)
    report = evaluate_rows(model, data, metric or [], swap, max_tokens, settings)
    print(table(report))
    if out is not None:
        write_json(out, report.as_dict())


def evaluate_rows(
    model: str, data: str, metric: list[str], swap: bool, max_tokens: int, settings: DataConfig
) -> Report:
    from avlm.convert.weights import load_model
    from avlm.data.decoding.doors import doors_of
    from avlm.data.decoding.files import limits_of
    from avlm.data.media.reader import MediaReader
    from avlm.data.sources import open_source
    from avlm.eval.benchmarks import evaluate as run
    from avlm.eval.metrics import metrics_for
    from avlm.inference.sampling import Sampling
    from avlm.training.console import counted, make_console

    metrics_for("", metric)
    Sampling(max_tokens=max_tokens)  # both are refused now rather than when the model has been loaded
    quiet()
    source = open_source(data, settings, use="eval")
    loaded, processor = load_model(model)
    limits = limits_of(settings.limits, doors_of(settings, source.roots))
    processor.use_reader(MediaReader(processor.media_spec(), limits=limits))
    with counted("answers", make_console()) as progress:
        report = run(
            loaded, processor, list(source), metric=metric, swap=swap, max_tokens=max_tokens, progress=progress
        )  # fmt: skip
    report.bad += [{"id": e.sample_id, "where": e.where, "reason": e.reason} for e in source.errors]
    for bad in report.bad[:5]:
        print(f"left out: {bad['where']}: {bad['reason']}", file=sys.stderr)
    if len(report.bad) > 5:
        print(f"and {len(report.bad) - 5} more rows were left out", file=sys.stderr)
    return report


def table(report: Report) -> str:
    """Scores by task, as text."""
    header = ["task", "samples", "accuracy", "guessing", "pictures swapped", "sounds swapped", "wer"]

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    rows = [
        [
            name or "(none)",
            str(t.samples),
            number(t.accuracy),
            number(t.guess),
            number(t.swapped.get("image")),
            number(t.swapped.get("audio")),
            number(t.scores.get("wer")),
        ]
        for name, t in report.tasks.items()
    ]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return "\n".join(
        "  ".join(f"{v:{w}}" for v, w in zip(row, widths, strict=True)).rstrip() for row in [header, *rows]
    )
