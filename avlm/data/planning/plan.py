"""What each step reads, as a pure function of (seed, stage, position).

Nothing is remembered and nothing is drawn while training: step k of a stage reads the same samples, in the same rows,
whoever asks and for however many ranks. So the state of the data is the number of steps done.

    order     which sample stands at which place            order.py, shuffle.py
    packs     which samples go through the model together   packing.py, a window of places at a time
    ranks     which rank takes which row of a step          ranks.py
    state     what a checkpoint holds of it                 state.py
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from avlm.config.data import Order as OrderName
from avlm.config.stage import Stage
from avlm.data.planning.order import ByLength, Climbing, Order, Recent, Stream
from avlm.data.planning.packing import pack_few, pack_rows, pack_window, row_sums
from avlm.data.planning.ranks import by_likeness, deal
from avlm.data.planning.shuffle import Ints, key
from avlm.data.planning.state import SOURCE, PlanState, check
from avlm.errors import ConfigError

__all__ = ["Measures", "Plan", "PlanState", "PlannedStep", "key", "pack_rows", "positions"]

VERSION = "1"
"""Of the rules in these files. Whatever changes a plan that exists changes it, and old states are refused."""

WINDOW = 65_536
"""Samples that are packed at once."""

NEAR = 4_096
"""The same where samples have an order that packing is not to undo."""

ALIKE = 16
"""So many rows that follow each other cost about the same, where rows of a step can be parted so."""

Member = tuple[int, int]
"""A sample: the row's number among the stage's rows, and the epoch."""


def positions(step: int, batch: int, count: int, *, seed: int, stage: str) -> list[Member]:
    """Which rows a step reads, of one shuffled source and by samples.

    Args:
        step: Number of the step in its stage, from 0.
        batch: Samples in a step.
        count: Rows of the stage.

    Returns:
        For each sample the row's number among the stage's rows, and the epoch. Each epoch reads every row once.
    """
    return _members(*Stream([count], None, seed=seed, stage=stage).read(step * batch, (step + 1) * batch))


class Column(Protocol):
    """A number for each row: an array, a memory map, or anything that gives those of some rows."""

    def __getitem__(self, rows: Ints, /) -> Any: ...


@dataclass(frozen=True, slots=True)
class Measures:
    """What the plan knows of a stage's rows, in columns by the row's number among them."""

    tokens: Column
    cost: Column | None = None
    """Of the encoders, in any unit."""
    tiles: Column | None = None
    frames: Column | None = None
    known_by: str = ""
    """What changes with any of the numbers, for a state to rest on."""


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """What one optimizer step reads; the same for any number of ranks."""

    step: int
    rows: list[list[Member]]
    """The samples of each row."""
    costs: NDArray[np.float64]
    """float64 [rows, 2]: the sum of squared lengths, and the encoders' cost."""

    def ranks(self, ranks: int) -> list[int]:
        """Which rank takes each row."""
        found: list[int] = deal(self.costs[None], ranks)[0].tolist()
        return found

    def of_rank(self, rank: int, ranks: int) -> list[list[Member]]:
        """The rows of one rank; none where a step has fewer rows than there are ranks."""
        return [row for row, theirs in zip(self.rows, self.ranks(ranks), strict=True) if theirs == rank]


_SETTINGS = ("batch_samples", "batch_rows", "row_tokens", "row_tiles", "row_frames")
"""Of a stage, that its plan follows from."""


class Plan:
    """What every step of a stage reads.

    Args:
        sizes: Rows of each source of the stage; numbered through, they are the rows of the plan.
        measures: Of the rows. Without them there are samples by step, shuffled or as they are, and no packs.
        seed: Of the run.
        stage: Its `batch_rows` or `batch_samples`, and the budgets of a row.
        order: In which samples come.
        weights: Of the sources; without, each epoch reads every row of every source once.
        span: Places over which a curriculum climbs; default: an epoch.
        sources: Fingerprint of each source, by name.
        draws: What is drawn follows from the stage's name and this.

    Raises:
        ConfigError: The order or the packs need measures, and there are none.
    """

    opening_steps = 0
    """Steps before all of the stage's rows are read; see `led.Led`."""

    def __init__(
        self,
        sizes: Sequence[int],
        measures: Measures | None = None,
        *,
        seed: int,
        stage: Stage,
        order: OrderName = "shuffled",
        weights: Sequence[float] | None = None,
        span: int | None = None,
        sources: Mapping[str, str] | None = None,
        draws: str = "",
    ) -> None:
        self.stage, self.measures = stage, measures
        self.count = sum(sizes)
        _check_measures(measures, stage, order)
        self.seeds = (seed, key(stage.name + draws))
        stream = Stream(sizes, weights, seed=seed, stage=stage.name + draws, shuffle=order != "as_is")
        self.order, self.lap = self._ordered(stream, order, span)
        self.follows = order in ("as_is", "curriculum")
        """Whether rows stay in the order of their samples."""
        self.budgeted = _budgets(stage, measures)
        self.budgets = tuple(budget for _, budget, _ in self.budgeted)
        windows = -(-self.lap // (WINDOW if order == "shuffled" else NEAR))
        self.cuts = [self.lap * i // windows for i in range(windows + 1)]
        """Where the windows of a lap begin. Laps are epochs, or what a curriculum climbs over."""
        self.alike = max(d for d in range(1, ALIKE + 1) if (stage.batch_rows or 1) % d == 0)
        self.packs: list[int] = []
        """Rows of each window, as far as known."""
        self._before = [0]
        """Rows before each window, and after the last that is known."""
        self._window = Recent(self._pack, 2)
        self.depends = {
            "plan": VERSION,
            "seed": str(seed),
            "order": order if span is None else f"{order} over {span}",
            "rows": ", ".join(map(str, sizes)),
            "weights": "none" if weights is None else ", ".join(map(repr, weights)),
            **{f"stages.{stage.name}.{name}": str(getattr(stage, name)) for name in _SETTINGS},
            **{SOURCE + name: digest for name, digest in (sources or {}).items()},
        }

    def steps(self, epochs: float) -> int:
        """Steps that it takes to read all samples so often.

        By rows, everything is packed once for that, about a second for each million samples.
        """
        if self.stage.batch_rows is None:
            return math.ceil(epochs * self.count / self.stage.batch_samples - 1e-9)
        laps, places = divmod(round(epochs * self.count), self.lap)
        windows = laps * (len(self.cuts) - 1) + bisect_right(self.cuts, places) - 1
        rest = places - self.cuts[bisect_right(self.cuts, places) - 1]
        while len(self.packs) < windows + (rest > 0):
            self._window(len(self.packs))
        rows = self._before[windows]
        if rest:
            first, last = self._places(windows)
            rows += math.ceil(self.packs[windows] * rest / (last - first))
        return math.ceil(rows / self.stage.batch_rows)

    def samples(self, k: int) -> list[Member]:
        """The samples of step ``k`` in the order of their places; with `batch_rows`, row after row."""
        if self.stage.batch_rows is None:
            batch = self.stage.batch_samples
            return _members(*self.order.read(k * batch, (k + 1) * batch))
        return [member for row in self.step(k).rows for member in row]

    def step(self, k: int) -> PlannedStep:
        """The rows of step ``k``.

        Raises:
            ConfigError: There are no measures, or a sample is longer than a row.
        """
        if self.measures is None:
            raise ConfigError(
                f"stage {self.stage.name}: which rows a step has follows from the lengths of its samples, and its data "
                "have no index. Make one with `avlm data index`"
            )
        return self._of_samples(k) if self.stage.batch_rows is None else self._of_rows(k, self.stage.batch_rows)

    def state(self, step: int) -> PlanState:
        """The state of the data after so many steps."""
        return PlanState(step, self.depends, tuple(self.packs))

    def resume(self, state: PlanState) -> int:
        """Go on from a state: the number of the next step.

        Raises:
            ConfigError: The plan rests on other data or settings than the state did.
        """
        check(state, self.depends)
        self.learn(state.packs)
        return state.step

    def learn(self, packs: Sequence[int]) -> None:
        """Know how many rows the first windows have, so that they need not be planned."""
        if len(packs) > len(self.packs):
            self.packs = list(packs)
            self._before = [0, *np.cumsum(self.packs).tolist()]

    def reads_again(self, steps: int) -> bool:
        """Whether so many steps come to a row that one of them has read before."""
        return steps > 0 and any(epoch > 0 for _, epoch in self.samples(steps - 1))

    # ------------------------------------------------------------ by samples

    def _of_samples(self, k: int) -> PlannedStep:
        batch = self.stage.batch_samples
        rows, epochs = self.order.read(k * batch, (k + 1) * batch)
        sizes = self._sizes(rows)
        members, costs = _members(rows, epochs), self._costs(rows, sizes[0])
        packed = pack_few(sizes, self.budgets)
        return PlannedStep(
            k, [[members[i] for i in row] for row in packed], np.array([costs[r].sum(0) for r in packed])
        )

    # ------------------------------------------------------------ by rows

    def _of_rows(self, k: int, batch: int) -> PlannedStep:
        rows: list[list[Member]] = []
        costs = []
        at, last = k * batch, (k + 1) * batch
        while at < last:
            while self._before[-1] <= at:
                self._window(len(self.packs))
            number = bisect_right(self._before, at) - 1
            window, begins = self._window(number), self._before[number]
            end = min(last, begins + self.packs[number])
            rows += window.rows(at - begins, end - begins)
            costs.append(window.costs[at - begins : end - begins])
            at = end
        return PlannedStep(k, rows, np.concatenate(costs))

    def _pack(self, number: int) -> _Packed:
        """Pack a window and put its rows in order. What fills its last row only partly is not carried on."""
        rows, epochs = self.order.read(*self._places(number))
        sizes = self._sizes(rows)
        row_of = pack_window(sizes, self.budgets)
        count = int(row_of.max()) + 1
        if number == len(self.packs):
            self.packs.append(count)
            self._before.append(self._before[-1] + count)
        each = self._costs(rows, sizes[0])
        costs = np.stack([row_sums(row_of, each[:, i], count) for i in range(2)], 1)
        if self.follows:
            place = row_sums(row_of, np.arange(len(rows), dtype=np.float64), count)
            order = np.argsort(place / np.bincount(row_of), kind="stable")
        else:
            order = self._mixed(number, costs)
        place_of = np.empty(count, np.int64)
        place_of[order] = np.arange(count)
        members = np.argsort(place_of[row_of], kind="stable")
        starts = np.concatenate([[0], np.cumsum(np.bincount(row_of)[order])])
        return _Packed(rows[members], epochs[members], starts, costs[order])

    def _mixed(self, number: int, costs: NDArray[np.float64]) -> Ints:
        """An order of a window's rows: groups of rows of like cost, the groups shuffled.

        Groups begin where steps can begin, so rows of middling cost stand before the first and after the last one.
        """
        count = len(costs)
        ahead = min(count, -self._before[number] % self.alike)
        alone = ahead + (count - ahead) % self.alike
        like = by_likeness(costs, self.alike)
        middle = (count - alone) // 2
        odd = like[middle : middle + alone]
        groups = np.concatenate([like[:middle], like[middle + alone :]]).reshape(-1, self.alike)
        groups = groups[np.random.default_rng([*self.seeds, number, 1]).permutation(len(groups))]
        return np.concatenate([odd[:ahead], groups.ravel(), odd[ahead:]])

    def _places(self, number: int) -> tuple[int, int]:
        """First place of a window, and of the next."""
        lap, window = divmod(number, len(self.cuts) - 1)
        return lap * self.lap + self.cuts[window], lap * self.lap + self.cuts[window + 1]

    # ------------------------------------------------------------ shared

    def _ordered(self, stream: Stream, order: OrderName, span: int | None) -> tuple[Order, int]:
        """The stream in its order, and after how many places that begins again."""
        if order == "by_length":
            run = NEAR if self.stage.batch_rows is not None else self.stage.batch_samples
            return ByLength(stream, self._lengths, run, (*self.seeds, 2), self.count), self.count
        if order == "curriculum":
            return Climbing(stream, self._lengths, span or self.count), span or self.count
        return stream, self.count

    def _lengths(self, rows: Ints) -> Ints:
        assert self.measures is not None
        return np.asarray(self.measures.tokens[rows], np.int64)

    def _sizes(self, rows: Ints) -> Ints:
        """What rows take of each budget, int64 [budgets, rows].

        Raises:
            ConfigError: One takes more than a row of the stage has.
        """
        sizes = np.array([column[rows] for _, _, column in self.budgeted], np.int64)
        for (name, budget, _), taken in zip(self.budgeted, sizes, strict=True):
            longest = int(taken.argmax())
            if taken[longest] > budget:
                raise ConfigError(
                    f"sample {int(rows[longest])} of stage {self.stage.name} takes {int(taken[longest])} "
                    f"{name.removeprefix('row_')}, and a row of the stage holds {budget}. "
                    f"Raise stages.{self.stage.name}.{name}, or leave such samples out with data.too_long=drop"
                )
        return sizes

    def _costs(self, rows: Ints, tokens: Ints) -> NDArray[np.float64]:
        """The squared length and the encoders' cost of each sample, float64 [samples, 2]."""
        cost = None if self.measures is None else self.measures.cost
        return np.stack([tokens.astype(np.float64) ** 2, np.zeros(len(rows)) if cost is None else cost[rows]], 1)


@dataclass(frozen=True, slots=True)
class _Packed:
    """The rows of a window, in order."""

    numbers: Ints
    epochs: Ints
    starts: Ints
    """Where each row begins in the two above, and the end."""
    costs: NDArray[np.float64]

    def rows(self, first: int, last: int) -> list[list[Member]]:
        cuts = self.starts[first : last + 1].tolist()
        members = _members(self.numbers[cuts[0] : cuts[-1]], self.epochs[cuts[0] : cuts[-1]])
        return [members[a - cuts[0] : b - cuts[0]] for a, b in itertools.pairwise(cuts)]


def _members(rows: Ints, epochs: Ints) -> list[Member]:
    return list(zip(rows.tolist(), epochs.tolist(), strict=True))


def _check_measures(measures: Measures | None, stage: Stage, order: OrderName) -> None:
    """Refuse what follows from lengths where there are none."""
    if measures is None and (stage.batch_rows is not None or order in ("by_length", "curriculum")):
        setting = f"data.order={order}" if stage.batch_rows is None else f"stages.{stage.name}.batch_rows"
        instead = "data.order=shuffled" if stage.batch_rows is None else f"stages.{stage.name}.batch_samples instead"
        raise ConfigError(
            f"{setting} goes by the lengths of samples, and the data of stage {stage.name} have no index to tell them. "
            f"Make one with `avlm data index`, or set {instead}"
        )


def _budgets(stage: Stage, measures: Measures | None) -> list[tuple[str, int, Column]]:
    """The budgets of a row: the setting, how much a row holds, and the column that says what a sample takes.

    Raises:
        ConfigError: A budget is set, and the measures have no such column.
    """
    if measures is None:
        return []
    found: list[tuple[str, int, Column]] = [("row_tokens", stage.row_tokens, measures.tokens)]
    for name, budget, column in (
        ("row_tiles", stage.row_tiles, measures.tiles),
        ("row_frames", stage.row_frames, measures.frames),
    ):
        if budget is not None and column is None:
            raise ConfigError(
                f"stages.{stage.name}.{name}={budget} limits what the index does not tell. "
                f"Make it anew with `avlm data index`, or set stages.{stage.name}.{name}=null"
            )
        if budget is not None and column is not None:
            found.append((name, budget, column))
    return found
