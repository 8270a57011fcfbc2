"""Distribute samples over rows under several budgets at once: tokens, and where they are limited tiles and frames.

pack_rows     few samples by their tokens: best fit, longest first
pack_few      the same under several budgets
pack_window   tens of thousands of samples at once, so nearly full that padding would hide in the rounding
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from avlm.data.planning.shuffle import Ints

FEW = 256
"""So many samples are packed one by one; of more, only what the others have left."""

SHARE = 4
"""A round packs one sample of so many; the others are there to choose from."""

FILLS, SWAPS = 2, 3
"""How often a round tries to add a sample to its rows, and to exchange one."""


def pack_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Distribute samples over rows of at most `capacity` tokens: best fit, longest first.

    Returns:
        Members of each row, each row in the order given. Every length must fit.

    Source:
        Best-fit-decreasing bin packing (Johnson, 1973).
    """
    return pack_few(np.asarray(lengths, np.int64)[None], (capacity,))


def pack_few(sizes: Ints, budgets: tuple[int, ...]) -> list[list[int]]:
    """As `pack_rows`, under several budgets: the sample that takes the largest share of any of them comes first.

    Args:
        sizes: int64 [budgets, samples].
    """
    rows: list[list[int]] = []
    rooms: list[list[int]] = []
    needs = sizes.T.tolist()
    shares = (sizes / np.array(budgets)[:, None]).max(0, initial=0)
    for i in np.argsort(-shares, kind="stable").tolist():
        need = needs[i]
        assert all(n <= b for n, b in zip(need, budgets, strict=True)), "a sample longer than a row was not left out"
        fits = [r for r, room in enumerate(rooms) if all(n <= free for n, free in zip(need, room, strict=True))]
        if fits:
            best = min(fits, key=lambda r: (rooms[r][0], r))
        else:
            best = len(rows)
            rows.append([])
            rooms.append(list(budgets))
        rows[best].append(i)
        rooms[best] = [free - n for n, free in zip(need, rooms[best], strict=True)]
    return [sorted(row) for row in rows]


def pack_window(sizes: Ints, budgets: tuple[int, ...]) -> Ints:
    """Distribute the samples of a window over rows that no budget overflows.

    Rows are begun in the order given, sample after sample until the next one does not fit: a row's content is as
    mixed as the order is. What is left of each row is then filled from the samples that wait: one that fits best is
    added, and members are exchanged for ones that are longer by what is left. All rows of a round do this together,
    as array operations; no two of them can take the same sample (`_choose`). The last `FEW` samples, or the last few
    rows where a row holds more, are packed one by one.

    Args:
        sizes: int64 [budgets, samples]; the first budget, tokens, is what rows are filled by.
        budgets: The most that a row holds of each.

    Returns:
        int64 [samples], the row of each sample, numbered from 0.
    """
    assert (sizes.max(1, initial=0) <= budgets).all(), "a sample longer than a row was not left out"
    window = _Window(sizes, budgets)
    while len(window.waiting) > FEW and window.round():
        pass
    for members in pack_few(sizes[:, window.waiting], budgets):
        window.row_of[window.waiting[members]] = window.rows
        window.rows += 1
    return window.row_of


class _Window:
    """The samples of a window on their way into rows."""

    def __init__(self, sizes: Ints, budgets: tuple[int, ...]) -> None:
        self.sizes, self.budgets = sizes, budgets
        count = sizes.shape[1]
        self.row_of = np.full(count, -1, np.int64)
        self.rows = 0
        self.free = np.ones(count, bool)
        self.waiting = np.arange(count)
        """Free samples in the order given."""
        tokens = sizes[0]
        small = tokens.astype(np.uint16) if tokens.max(initial=0) < 2**16 else tokens  # sorted five times as fast
        self.by_length: Ints = np.argsort(small, kind="stable")
        """Samples that were free when the round began, shortest first."""

    def round(self) -> bool:
        """Begin rows with one waiting sample in `SHARE`, and fill them from the others.

        Returns:
            Whether there were enough to begin one.
        """
        begun = self._begin(self.waiting[: len(self.waiting) // SHARE])
        if begun is None:
            return False
        taken, starts, left = begun
        count = len(starts) - 1
        self.by_length = choice = self.by_length[self.free[self.by_length]]
        for _ in range(FILLS):
            choice = self._improve(choice, left, np.arange(count), None)
        for back in range(1, SWAPS + 1):
            member = taken[np.maximum(starts[1:] - back, starts[:-1])]
            rows = np.flatnonzero((left[0] > 0) & ~self.free[member])
            choice = self._improve(choice, left, rows, member[rows])
        self.rows += count
        self.waiting = self.waiting[self.free[self.waiting]]
        return True

    def _begin(self, samples: Ints) -> tuple[Ints, Ints, Ints] | None:
        """Cut samples into rows, each as long as the budgets allow. The last samples, which fill no row, are left.

        Returns:
            The samples in rows, where each row starts among them (with the end), and what is left of each budget; None
            if all of them fit into one row.
        """
        sums = np.zeros((len(self.budgets), len(samples) + 1), np.int64)
        np.cumsum(self.sizes[:, samples], axis=1, out=sums[:, 1:])
        ends = np.min(
            [row.searchsorted(row[:-1] + budget, "right") for row, budget in zip(sums, self.budgets, strict=True)], 0
        )
        after = (ends - 1).tolist()
        cuts = [0]
        while cuts[-1] < len(samples) and after[cuts[-1]] < len(samples):
            cuts.append(after[cuts[-1]])
        if len(cuts) == 1:
            return None
        starts = np.array(cuts)
        taken = samples[: starts[-1]]
        self.row_of[taken] = np.repeat(np.arange(self.rows, self.rows + len(starts) - 1), np.diff(starts))
        self.free[taken] = False
        return taken, starts, np.array(self.budgets)[:, None] - np.diff(sums[:, starts])

    def _improve(self, choice: Ints, left: Ints, rows: Ints, given_up: Ints | None) -> Ints:
        """Add the best sample that waits to each row, or put it in the place of a member that it is longer than.

        Args:
            choice: Samples that wait, shortest first.
            left: What is left of each budget in the rows of this round; changed in place.
            rows: Which of these rows try.
            given_up: A member of each, or None.

        Returns:
            What remains of `choice`. Members that were given up wait for the next round.
        """
        if not len(choice) or not len(rows):
            return choice
        room = left[:, rows] if given_up is None else left[:, rows] + self.sizes[:, given_up]
        at = _choose(room[0], self.sizes[0, choice])
        found = choice[np.maximum(at, 0)]  # of more rows than samples some are far below 0
        fits = (at >= 0) & (self.sizes[:, found] <= room).all(0)
        if given_up is not None:
            fits &= self.sizes[0, found] > self.sizes[0, given_up]
            self.row_of[given_up[fits]] = -1
            self.free[given_up[fits]] = True
        found, better = found[fits], rows[fits]
        self.row_of[found] = self.rows + better
        self.free[found] = False
        left[:, better] = room[:, fits] - self.sizes[:, found]
        kept = np.ones(len(choice), bool)
        kept[at[fits]] = False
        return choice[kept]


def _choose(room: Ints, lengths: Ints) -> Ints:
    """For each row the longest sample that fits, no sample for two of them.

    Where several rows want the same one, those with less room take the next shorter ones.

    Args:
        room: int64 [rows].
        lengths: int64 [samples], ascending.

    Returns:
        int64 [rows], numbers of samples; below 0 for none.
    """
    order = np.argsort(room, kind="stable")
    rank = np.arange(len(room))
    wanted = lengths.searchsorted(room[order], "right") - 1
    chosen = np.empty(len(room), np.int64)
    chosen[order] = rank + np.minimum.accumulate((wanted - rank)[::-1])[::-1]
    return chosen


def row_sums(row_of: Ints, values: NDArray[np.float64], rows: int) -> NDArray[np.float64]:
    """Sum of a value over the members of each row."""
    return np.bincount(row_of, weights=values, minlength=rows).astype(np.float64, copy=False)
