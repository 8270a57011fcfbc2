"""Many numbers in a few: how they are spread."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

MOST_BINS = 12
LONG = 8.0
"""Where the largest is more than this many times the median, bins grow: 1, 2, 5, 10, 20, 50 ..."""


@dataclass(frozen=True, slots=True)
class Histogram:
    """How one thing is spread over rows or media."""

    name: str
    """What was measured, and of what."""
    unit: str
    count: int
    least: float
    median: float
    mean: float
    p95: float
    """19 of 20 are at most this."""
    most: float
    total: float
    bins: tuple[tuple[float, float, int], ...]
    """From, up to (the last one with its end), and how many."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def histogram(name: str, unit: str, values: np.ndarray) -> Histogram | None:
    """How values are spread; None without any."""
    values = np.asarray(values, np.float64)
    if not len(values):
        return None
    median, p95 = np.percentile(values, [50, 95])
    edges = edges_of(float(values.min()), float(median), float(values.max()))
    counts, _ = np.histogram(values, edges)
    return Histogram(
        name,
        unit,
        len(values),
        float(values.min()),
        float(median),
        float(values.mean()),
        float(p95),
        float(values.max()),
        float(values.sum()),
        tuple((low, high, int(n)) for low, high, n in zip(edges, edges[1:], counts, strict=False)),
    )


def edges_of(least: float, median: float, most: float) -> list[float]:
    """Round numbers from at most the least to at least the most."""
    if most - least < 1e-6:
        return [least, most + (abs(least) or 1.0)]
    if least >= 0 and 0 < LONG * median < most:
        return _growing(least, most)
    step = _nice((most - least) / (MOST_BINS - 2))
    first = math.floor(least / step)
    return [round(step * i, 10) for i in range(first, math.ceil(round(most / step, 9)) + 1)]


def _growing(least: float, most: float) -> list[float]:
    series: list[float] = []
    power = math.floor(math.log10(most))
    while len(series) < MOST_BINS:
        series += [factor * 10.0**power for factor in (5, 2, 1)]
        power -= 1
    series = sorted({round(edge, 10) for edge in series if edge < most})[-MOST_BINS + 1 :]
    low = [edge for edge in series if edge <= least]
    kept = [edge for edge in series if edge > least]
    return [low[-1] if low else 0.0, *kept, _nice(most)]


def _nice(size: float) -> float:
    """The next of 1, 2 and 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(size))
    return next(round(factor * power, 10) for factor in (1, 2, 5, 10) if factor * power >= size * (1 - 1e-9))
