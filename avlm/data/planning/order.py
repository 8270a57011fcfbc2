"""Which sample stands at which place of a stage, for any place and without looking at the ones before it.

Stream       the samples of all sources, shuffled or as they are, epoch after epoch, blended by weight
ByLength     a stream with samples of like length next to each other
Climbing     a stream from short samples to long ones

All of them are asked in the same way: ``read(first, last)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from avlm.data.planning.shuffle import WHOLE, Ints, key, shuffled

STRATA = 64
"""So many steps a curriculum has from the shortest samples to the longest."""

Lengths = Callable[[Ints], Ints]
"""Gives the lengths of some rows, by their numbers."""

T = TypeVar("T")


class Recent(Generic[T]):
    """The last few results of a function of numbers. They stay behind when it is sent to another process."""

    def __init__(self, make: Callable[..., T], keep: int) -> None:
        self.make, self.keep = make, keep
        self.found: dict[tuple[int, ...], T] = {}

    def __call__(self, *at: int) -> T:
        if at in self.found:
            self.found[at] = self.found.pop(at)
        else:
            self.found[at] = self.make(*at)
            if len(self.found) > self.keep:
                del self.found[next(iter(self.found))]
        return self.found[at]

    def __getstate__(self) -> dict[str, Any]:
        return {"make": self.make, "keep": self.keep, "found": {}}


class Order(Protocol):
    """Samples by place."""

    def read(self, first: int, last: int) -> tuple[Ints, Ints]:
        """The samples at places ``first`` to ``last - 1``.

        Returns:
            Their row numbers and epochs, int64 [last - first] each.
        """


class Stream:
    """The samples of a stage, epoch after epoch.

    Without weights all rows are one set, and each epoch reads every row once. With weights each source goes through
    its own epochs; which of them a place reads from is `turns`.

    Args:
        sizes: Rows of each source; the rows are numbered through.
        weights: Of each source, or None.
        seed, stage: What the order follows from.
        shuffle: Otherwise the rows of a source stay as they are.
    """

    def __init__(
        self, sizes: Sequence[int], weights: Sequence[float] | None, *, seed: int, stage: str, shuffle: bool = True
    ) -> None:
        self.count = sum(sizes)
        self.starts = [0, *np.cumsum(sizes).tolist()]
        self.weights = weights
        self.seeds = (seed, key(stage))
        self.shuffle = shuffle

    def read(self, first: int, last: int) -> tuple[Ints, Ints]:
        if self.weights is None:
            return self._read_source(np.arange(first, last), 0, self.count, ())
        source, at = turns(
            first, last, self.weights, [b > a for a, b in zip(self.starts, self.starts[1:], strict=False)]
        )
        rows, epochs = np.empty_like(at), np.empty_like(at)
        for number in np.unique(source).tolist():
            mine = source == number
            start, end = self.starts[number : number + 2]
            rows[mine], epochs[mine] = self._read_source(at[mine], start, end - start, (number,))
        return rows, epochs

    def _read_source(self, places: Ints, start: int, count: int, more: tuple[int, ...]) -> tuple[Ints, Ints]:
        """Rows and epochs at ascending places of one source."""
        epochs, rows = np.divmod(places, count)
        if self.shuffle:
            cuts = np.searchsorted(epochs, np.arange(epochs[0], epochs[-1] + 2))
            for epoch, (a, b) in enumerate(zip(cuts.tolist(), cuts[1:].tolist(), strict=False), int(epochs[0])):
                rows[a:b] = shuffled(rows[a:b], count, (*self.seeds, epoch, *more))
        return rows + start, epochs


def turns(first: int, last: int, weights: Sequence[float], there: Sequence[bool]) -> tuple[Ints, Ints]:
    """Which source each place reads from, and which of that source's samples, counted from 0.

    Source i's sample j is due at time (j + 1/2) / weight i; samples come in the order of their times, of equal times
    the first source's first. So at any point every source has had its share, to within a sample or little more.

    Args:
        weights: Of each source, above 0.
        there: Whether a source has any row; others get no turn.

    Returns:
        int64 [last - first] each.

    Source:
        The seats of a parliament in the order in which Webster's (Sainte-Lague's) method gives them.
    """
    total = math.fsum(w for w, any_row in zip(weights, there, strict=True) if any_row)
    share = np.array([w / total if any_row else 0.0 for w, any_row in zip(weights, there, strict=True)])
    # Before time t each source had at most t * share + 1/2, and all together at most t + (sources / 2).
    began = max(0.0, first - len(share) / 2 - 2)
    had = np.maximum(np.floor(began * share - 1), 0).astype(np.int64)
    ahead = np.ceil((last - began + len(share)) * share).astype(np.int64) + 4
    ahead[share == 0] = 0
    source = np.repeat(np.arange(len(share)), ahead)
    at = np.concatenate([h + np.arange(n) for h, n in zip(had.tolist(), ahead.tolist(), strict=True)])
    due = (at + 0.5) / np.array(weights, np.float64)[source]  # by the weights as given: equal times are equal numbers
    order = np.lexsort((source, due))[first - int(had.sum()) :][: last - first]
    return source[order], at[order]


class ByLength:
    """A stream with samples of like length next to each other: sorted in windows, cut into runs, the runs shuffled.

    Runs begin at multiples of their length. What of a lap lies before the first of them and behind the last is a
    shorter run, so that each lap has its own samples and no other's.

    Args:
        stream: What is sorted.
        lengths: Of its rows.
        run: Samples in a run.
        seeds: What the order of the runs follows from.
        span: Places of a lap, over whose end no window reaches.
    """

    def __init__(self, stream: Order, lengths: Lengths, run: int, seeds: tuple[int, ...], span: int) -> None:
        self.stream, self.lengths, self.run, self.seeds, self.span = stream, lengths, run, seeds, span
        self.window = run * max(1, WHOLE // run)
        self._sorted = Recent(self._sort, 2)

    def read(self, first: int, last: int) -> tuple[Ints, Ints]:
        found = []
        while first < last:
            lap, place = divmod(first, self.span)
            number, at = divmod(place, self.window)
            rows, epochs = self._sorted(lap, number)
            count = min(len(rows) - at, last - first)
            found.append((rows[at : at + count], epochs[at : at + count]))
            first += count
        return _joined(found)

    def _sort(self, lap: int, number: int) -> tuple[Ints, Ints]:
        begin = lap * self.span + number * self.window
        rows, epochs = self.stream.read(begin, min(begin + self.window, (lap + 1) * self.span))
        head = min(-begin % self.run, len(rows))
        whole, tail = divmod(len(rows) - head, self.run)
        sizes = np.array([head, *[self.run] * whole, tail])
        along = np.random.default_rng([*self.seeds, lap, number]).permutation(
            len(sizes)
        )  # the runs, from short to long
        begins = np.empty_like(sizes)
        begins[along] = np.cumsum(sizes[along]) - sizes[along]
        sorted_ = np.argsort(self.lengths(rows), kind="stable")
        order = np.concatenate([sorted_[at : at + size] for at, size in zip(begins.tolist(), sizes.tolist())])
        return rows[order], epochs[order]


class Climbing:
    """A stream from short samples to long ones, in `STRATA` steps; within a step it is as it was.

    The order is a stable counting sort of the stream's first `span` places by the stratum of their lengths. Only the
    counts are kept, by chunk of the stream: to find a place, the few chunks that it can stand in are read again.

    Args:
        stream: What is sorted.
        lengths: Of its rows.
        span: Places over which it climbs; beyond, it begins again.
    """

    def __init__(self, stream: Order, lengths: Lengths, span: int) -> None:
        self.stream, self.lengths, self.span = stream, lengths, span
        self._edges = Recent(self._find_edges, 2)
        self._had = Recent(self._count, 2)
        self._chunk = Recent(self._read_chunk, 8)

    def read(self, first: int, last: int) -> tuple[Ints, Ints]:
        found = []
        for lap, a, b in _pieces(self.span, first, last):
            ends = np.cumsum(self._had(lap)[-1]).tolist()
            for stratum, (begins, end) in enumerate(zip([0, *ends], ends, strict=False)):
                if max(a, begins) < min(b, end):
                    found += self._members(lap, stratum, max(a, begins) - begins, min(b, end) - begins)
        return _joined(found)

    def _members(self, lap: int, stratum: int, first: int, last: int) -> list[tuple[Ints, Ints]]:
        """Members ``first`` to ``last - 1`` of a stratum, by chunk of the stream."""
        had = self._had(lap)[:, stratum]
        found = []
        for chunk in range(int(had.searchsorted(first, "right")) - 1, int(had.searchsorted(last, "left"))):
            rows, epochs, strata = self._chunk(lap, chunk)
            mine = np.flatnonzero(strata == stratum)[max(first - int(had[chunk]), 0) : last - int(had[chunk])]
            found.append((rows[mine], epochs[mine]))
        return found

    def _count(self, lap: int) -> Ints:
        """Members of each stratum before each chunk, and after all: int64 [chunks + 1, `STRATA`]."""
        had = np.zeros((-(-self.span // WHOLE) + 1, STRATA), np.int64)
        for chunk in range(len(had) - 1):
            had[chunk + 1] = had[chunk] + np.bincount(self._read_chunk(lap, chunk)[2], minlength=STRATA)
        return had

    def _read_chunk(self, lap: int, chunk: int) -> tuple[Ints, Ints, Ints]:
        rows, epochs = self._places(lap, chunk)
        return rows, epochs, self._edges(lap).searchsorted(self.lengths(rows), "right")

    def _find_edges(self, lap: int) -> Ints:
        """The least length of each stratum but the first, as the first chunk has them."""
        lengths = np.sort(self.lengths(self._places(lap, 0)[0]))
        return lengths[np.arange(1, STRATA) * len(lengths) // STRATA]

    def _places(self, lap: int, chunk: int) -> tuple[Ints, Ints]:
        begins = lap * self.span
        return self.stream.read(begins + chunk * WHOLE, begins + min((chunk + 1) * WHOLE, self.span))


def _pieces(size: int, first: int, last: int) -> Iterator[tuple[int, int, int]]:
    """Pieces of at most `size` places that a stretch lies in: number, and first and last place of the stretch in it."""
    for number in range(first // size, -(-last // size)):
        yield number, max(first - number * size, 0), min(last - number * size, size)


def _joined(found: Sequence[tuple[Ints, Ints]]) -> tuple[Ints, Ints]:
    if len(found) == 1:
        return found[0]
    return np.concatenate([rows for rows, _ in found]), np.concatenate([epochs for _, epochs in found])
