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


def share_out(costs: Sequence[float], homes: Sequence[int], ranks: int) -> list[int]:
    """Which rank does which piece of work, when each lies with one rank to begin with: little moves, and all is even.

    A rank keeps its costliest pieces up to an even share of the whole; what is left over goes, the costliest first, to
    the rank that has least to do, its own where that is one of them. Every rank computes the same answer by itself.

    Args:
        costs: Of each piece, 0 or more; a step's pictures and sounds, say.
        homes: The rank where each piece lies.

    Returns:
        The rank of each piece. None has more than an even share and the costliest piece on top, which is less than
        twice what the busiest has at best.

    Source:
        Longest processing time first (Graham, 1969), behind what stays.
    """
    even = math.fsum(costs) / ranks * (1 + 1e-9)  # a share that is even is not to be missed by its last bit
    loads = [0.0] * ranks
    given, left = list(homes), []
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        if loads[homes[i]] + costs[i] <= even:
            loads[homes[i]] += costs[i]
        else:
            left.append(i)
    free = [(load, rank) for rank, load in enumerate(loads)]
    heapq.heapify(free)
    for i in left:
        while free[0][0] != loads[free[0][1]]:
            heapq.heappop(free)  # it has got more since
        rank = homes[i] if loads[homes[i]] == free[0][0] else free[0][1]
        given[i] = rank
        loads[rank] += costs[i]
        heapq.heappush(free, (loads[rank], rank))
    return given
