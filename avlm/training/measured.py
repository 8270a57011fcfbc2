"""The part of a run's page about held-out rows: curves over the steps, and a table of every measurement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from avlm.data.showing.page import esc, number, percent, table
from avlm.training.charts import Axis, Band, line_chart

Row = dict[str, Any]

MEASUREMENT = {"step": int, "stage": str, "stage_step": int, "when": str}
"""What every line of ``evals.jsonl`` has."""

CURVES: tuple[tuple[str, str, str, Axis], ...] = (
    ("loss", "Held-out loss", "per target token of rows that the stage could learn from", "auto"),
    ("text_loss", "Text loss", "per target token of rows of text alone", "auto"),
    ("accuracy", "Accuracy", "share of held-out questions answered exactly", "share"),
    ("preferred", "Pairs told apart", "share of held-out pairs whose better answer gained more", "share"),
)
SHARES = (("accuracy", "Accuracy"), ("guess", "Guessing"), ("looks", "Looks"), ("listens", "Listens"))


def held_out_section(lines: Sequence[Row], bands: Sequence[Band]) -> str:
    """Everything that was measured as the run went, as HTML.

    Args:
        bands: The stages on the step axis.
    """
    charts = "".join(_chart(lines, bands, *curve) for curve in CURVES)
    head = ["Stage", "Step", "When", "Loss", "Text loss", "Forgotten"]
    shown = [(key, name) for key, name in SHARES if any(key in line for line in lines)]
    rows = [_cells(line, shown) for line in lines]
    early = [line for line in lines if line.get("stops")]
    ends = "".join(
        f"<p>{esc(line['stage'])} ended early, at step {line['stage_step']:,}, because it became no better.</p>"
        for line in early
    )
    return (
        f'<div class="charts">{charts}</div>{ends}'
        "<p>Forgotten is by how much the text loss has grown since the run began: below zero the language model has "
        "gained. Looks and listens are what is lost of the accuracy with the pictures, or the sounds, of other rows: "
        "near zero the model answers without them. The best measurement of each stage is marked.</p>"
        f"{table('Measurements on held-out rows', [*head, *(name for _, name in shown)], rows, numbers=range(1, 10))}"
    )


def _chart(lines: Sequence[Row], bands: Sequence[Band], key: str, name: str, facts: str, axis: Axis) -> str:
    points = [(line["step"], value) for line in lines if (value := number(line.get(key))) is not None]
    points = [point for i, point in enumerate(points) if not i or point[0] != points[i - 1][0]]  # after is before
    if not points:
        return ""
    chart = line_chart(
        [step for step, _ in points],
        [value for _, value in points],
        _bands(bands, points[0][0], points[-1][0]),
        label=f"{name} at {len(points)} steps, {facts}",
        axis=axis,
    )
    return f"<figure><figcaption><b>{name}</b> {facts}</figcaption>{chart}</figure>"


def _bands(bands: Sequence[Band], first: int, last: int) -> list[Band]:
    """The stages as far as the chart goes: a stage is measured before its first step, where the one before it ended."""
    found = []
    for band in bands:
        begins, ends = max(first, band.first - 1), min(last, band.last)
        if begins <= ends:
            found.append(Band(band.number, band.name, begins, ends))
    return found


def _cells(line: Row, shown: Sequence[tuple[str, str]]) -> list[str]:
    best = " (best)" if line.get("best") else ""
    cells = [f"{esc(line['stage'])}", f"{line['stage_step']:,}", f"{esc(line['when'])}{best}"]
    cells += [_figure(line.get(key)) for key in ("loss", "text_loss")]
    forgotten = number(line.get("forgotten"))
    cells.append("\u2013" if forgotten is None else f"{forgotten:+.3f}")
    return cells + [percent(number(line.get(key))) for key, _ in shown]


def _figure(value: object) -> str:
    found = number(value)
    return "\u2013" if found is None else f"{found:.4g}"
