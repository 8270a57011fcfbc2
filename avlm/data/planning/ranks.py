"""Even work for every rank: which rows of a step go where, and which pictures and sounds.

Two costs of a row matter: attention's, which grows with the sum of its samples' squared lengths, and the encoders'.
Ranks wait for the slowest one in each step, so both are to be even in each step, not only in the sum over all.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from avlm.data.planning.shuffle import Ints

Floats = NDArray[np.float64]


def by_likeness(costs: Floats, group: int) -> Ints:
    """An order of rows in which each `group` that follow each other cost nearly the same, by every measure.

    Args:
        costs: float64 [rows, 2].

    Returns:
        int64 [rows]. Rows are sorted by their second cost into strips, and within a strip by their first; there are
        the more strips the more the second cost varies.
    """
    groups = max(1, len(costs) // group)
    first, second = _variation(costs[:, 0]), _variation(costs[:, 1])
    strips = groups if first == 0 else min(groups, max(1, round(math.sqrt(groups * second / first))))
    depth = group * math.ceil(groups / strips)
    order = np.argsort(costs[:, 1], kind="stable")
    strip = np.empty(len(costs), np.int64)
    strip[order] = np.arange(len(costs)) // depth
    return np.lexsort((costs[:, 0], strip))


def _variation(cost: Floats) -> float:
    """Standard deviation by mean, added up exactly: the same number on every machine."""
    mean = math.fsum(cost) / len(cost)
    return math.sqrt(math.fsum((cost - mean) ** 2) / len(cost)) / mean if mean else 0.0


def deal(costs: Floats, ranks: int) -> Ints:
    """Which rank each row of a step goes to, for many steps at once.

    In rounds: each gives every rank one row, the costliest to the rank that has least, by the cost that is less even
    so far. Ranks have equally many rows, or some have one less.

    Args:
        costs: float64 [steps, rows, kinds of cost].

    Returns:
        int64 [steps, rows].
    """
    steps, rows, kinds = costs.shape
    rounds = -(-rows // ranks)
    share = np.zeros((steps, rounds * ranks, kinds))  # what is missing to full rounds costs nothing
    total = np.cumsum(costs, 1)[:, -1:]  # added in order, so it is the same number on every machine
    share[:, :rows] = costs / np.where(total > 0, total, 1)
    order = np.argsort(-share.sum(2), axis=1, kind="stable").reshape(steps, rounds, ranks)
    load = np.zeros((steps, ranks, kinds))
    given = np.empty((steps, rounds * ranks), np.int64)
    step = np.arange(steps)[:, None]
    for turn in range(rounds):
        members = order[:, turn]
        theirs = share[step, members]
        uneven = np.ptp(load, 1) if turn else np.ptp(theirs, 1)
        by = uneven.argmax(1)[:, None]
        members = np.take_along_axis(members, np.argsort(-theirs[step, np.arange(ranks), by], 1, kind="stable"), 1)
        least = np.argsort(load[step, np.arange(ranks), by], 1, kind="stable")
        given[step, members] = least
        load[step, least] += share[step, members]
    return given[:, :rows]


def share_out(costs: Sequence[float], ranks: int) -> list[int]:
    """Which rank does which piece of work: the costliest first, each to the rank that has least to do.

    Every rank computes the same answer by itself. No rank has more than 4/3 of what it would have at best.

    Args:
        costs: Of each piece, 0 or more; a step's pictures and sounds, say.

    Returns:
        The rank of each piece. Ranks that no piece is left for get none.

    Source:
        Longest processing time first (Graham, 1969).
    """
    loads = [(0.0, rank) for rank in range(ranks)]
    given = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, rank = loads[0]
        given[i] = rank
        heapq.heapreplace(loads, (load + costs[i], rank))
    return given
