"""The order of the data, as a pure function of (seed, epoch, position).

Nothing is remembered and nothing is drawn while training: step k of a stage reads the
same samples whoever asks, so the state of the data is the number of steps done.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np


def key(text: str) -> int:
    """A number for a name, the same on every machine."""
    return zlib.crc32(text.encode())


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, stage: str, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, key(stage), epoch]).permutation(count)


def positions(step: int, batch: int, count: int, *, seed: int, stage: str) -> list[tuple[int, int]]:
    """Which rows a step reads.

    Args:
        step: Number of the step in its stage, from 0.
        batch: Samples in a step.
        count: Rows of the stage.

    Returns:
        For each sample the row's number among the stage's rows, and the epoch. Each epoch reads every row once.
    """
    found = []
    for position in range(step * batch, (step + 1) * batch):
        epoch, at = divmod(position, count)
        found.append((int(_permutation(count, seed, stage, epoch)[at]), epoch))
    return found


def pack_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Distribute samples over rows of at most `capacity` tokens: best fit, longest first.

    Returns:
        Members of each row, each row in the order given. Every length must fit.

    Source:
        Best-fit-decreasing bin packing (Johnson, 1973).
    """
    assert all(length <= capacity for length in lengths), "a sample longer than a row was not left out"
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fits = [r for r in range(len(rows)) if room[r] >= lengths[i]]
        if fits:
            best = min(fits, key=lambda r: (room[r], r))
        else:
            best = len(rows)
            rows.append([])
            room.append(capacity)
        rows[best].append(i)
        room[best] -= lengths[i]
    return [sorted(row) for row in rows]
