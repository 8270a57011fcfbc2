"""What a run's page shows of what was counted and of what was watched."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from avlm.data.showing.page import esc, number, percent, table
from avlm.training.charts import Axis, Band, line_chart

Row = dict[str, Any]
Chart = tuple[str, str, list[float], Axis]
"""Its name, facts in words, a value for each step, and the kind of its axis."""
MAX_TROUBLE, MAX_SAMPLES = 50, 3
"""Entries of the watch that are shown, and samples of each; the rest is counted."""


def count_charts(rows: Sequence[Row]) -> list[Chart]:
    """Curves of what was counted; those that no step tells of are left out."""
    found: list[Chart] = []
    speeds = _column(rows, "samples_per_s")
    if speeds:
        found.append(("Samples per second", f"median {median(speeds):,.1f}", speeds, "zero"))
    shares = _column(rows, "mfu")
    if shares:
        told = f"share of what the device's matrix products can do; median {percent(median(shares))}"
        found.append(("Model FLOPs utilisation", told, shares, "share"))
    padding = _column(rows, "padding")
    if any(x > 0 for x in padding):
        found.append(
            ("Padding", f"share of places without a token; median {percent(median(padding))}", padding, "share")
        )
    memory = [_inner(row, "memory_mb") for row in rows]
    peaks = _held(rows, [number(m.get("peak")) for m in memory])
    if peaks:
        last = next(m for m in reversed(memory) if m)
        parts = ", ".join(
            f"{name} {last[name]:,.0f}" for name in ("parameters", "gradients", "optimizer") if name in last
        )
        found.append(("Memory in MB", f"the most yet; of it at last: {parts}", peaks, "zero"))
    return found


def part_charts(rows: Sequence[Row]) -> list[Chart]:
    """The gradient of each part, and how far each update moves its weights."""
    found: list[Chart] = []
    for key, name in (("grad_norms", "Gradient norm"), ("update_ratios", "Update over weights")):
        for part in dict.fromkeys(part for row in rows for part in _inner(row, key)):
            values = _held(rows, [number(_inner(row, key).get(part)) for row in rows])
            if values:
                told = f"of {part.replace('_', ' ')}; median {median(values):.3g}"
                found.append((name, told, values, "auto"))
    return found


def drawn(charts: Sequence[Chart], steps: Sequence[int], bands: Sequence[Band]) -> str:
    """Charts side by side."""
    figures = "".join(
        f"<figure><figcaption><b>{esc(name)}</b> {esc(facts)}</figcaption>"
        f"{line_chart(steps, values, bands, label=f'{name} over all steps, {facts}', axis=axis)}</figure>"
        for name, facts, values, axis in charts
    )
    return f'<div class="charts">{figures}</div>' if charts else ""


def trouble_table(rows: Sequence[Row]) -> str:
    """What the watch found: losses that jumped, and steps that lost their numbers."""
    cells = []
    for row in rows[:MAX_TROUBLE]:
        given = row.get("samples")
        samples = [_sample(s) for s in given if isinstance(s, dict)] if isinstance(given, list) else []
        more = f" and {len(samples) - MAX_SAMPLES} more" if len(samples) > MAX_SAMPLES else ""
        shown = f'<span class="text long">{esc("; ".join(samples[:MAX_SAMPLES]) + more)}</span>'
        cells.append([esc(row["step"]), esc(row["stage"]), f'<span class="text">{esc(_what(row))}</span>', shown])
    left = f"<p>{len(rows) - MAX_TROUBLE} more are in watch.jsonl.</p>" if len(rows) > MAX_TROUBLE else ""
    head = ["Step", "Stage", "What", "Samples"]
    return table("What the watch found", head, cells, numbers=(0,)) + left


def _what(row: Row) -> str:
    if row.get("kind") == "spike":
        loss, median, above = (number(row.get(name)) or 0.0 for name in ("loss", "median", "deviations"))
        return f"loss {loss:.4g}, {above:.0f} deviations above {median:.4g}"
    then = "the update was left out" if row.get("then") == "skip" else "the run stopped"
    return f"loss {row.get('loss')}, gradient {row.get('grad_norm')}: {row.get('found')}; {then}"


def _sample(sample: Row) -> str:
    given = sample.get("files")
    files = [str(file) for file in given] if isinstance(given, list) else []
    return f'"{sample.get("id")}" ({", ".join([str(sample.get("where")), *files])})'


def _inner(row: Row, key: str) -> Row:
    value = row.get(key)
    return value if isinstance(value, dict) else {}


def _column(rows: Sequence[Row], key: str) -> list[float]:
    """A value for each step, or nothing if no step has one."""
    values = [number(row.get(key)) for row in rows]
    return [math.nan if v is None else v for v in values] if any(v is not None for v in values) else []


def _held(rows: Sequence[Row], values: Sequence[float | None]) -> list[float]:
    """The same of what is measured now and then: each value stands until the next, or the end of its stage."""
    if all(value is None for value in values):
        return []
    found, last, stage = [], math.nan, None
    for row, value in zip(rows, values, strict=True):
        if row["stage"] != stage:
            last, stage = math.nan, row["stage"]
        last = last if value is None else value
        found.append(last)
    return found


def median(values: Sequence[float]) -> float:
    """Of those that are numbers; 0 where none is."""
    whole = [value for value in values if math.isfinite(value)]
    return statistics.median(whole) if whole else 0.0
