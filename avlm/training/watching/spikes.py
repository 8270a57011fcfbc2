"""Losses that jump: told apart from those before them by a measure that a jump itself does not move."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

NORMAL = 1.4826
"""Median absolute deviations in a standard deviation, where values are normal."""
LEAST = 0.01
"""A deviation counts as no less than this share of the median, so that a loss that hardly moves does not spike."""


class Spike(NamedTuple):
    """A loss far above those before it."""

    loss: float
    median: float
    deviations: float


class Spikes:
    """Compares each loss with the ones before it.

    Args:
        limit: Deviations above the median at which a loss is a spike.
        window: How many it is compared with; before there are half as many nothing is one.
        rise: What a spike is above the median at least, whatever the deviations are.
        before: Losses of steps that are done.

    Source:
        The median absolute deviation as an estimate of scale: Rousseeuw and Croux, Alternatives to the Median Absolute
        Deviation, JASA 88 (1993), section 1.
    """

    def __init__(self, limit: float, window: int, before: Iterable[float] = (), *, rise: float = 0.0) -> None:
        self.limit = limit
        self.window = window
        self.rise = rise
        self.losses: deque[float] = deque((x for x in before if math.isfinite(x)), maxlen=window)

    def look(self, loss: float) -> Spike | None:
        """Take a loss, and tell whether it is a spike; one that is no number is left out."""
        if not math.isfinite(loss):
            return None
        spike = None
        if len(self.losses) >= self.window // 2:
            median = statistics.median(self.losses)
            deviation = NORMAL * statistics.median(abs(x - median) for x in self.losses)
            above = (loss - median) / max(deviation, LEAST * abs(median), 1e-12)
            if above > self.limit and loss - median >= self.rise:
                spike = Spike(loss, median, above)
        self.losses.append(loss)
        return spike
