"""Several sources as one: their rows are numbered through, and a weight says how often each is read."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, chain

import numpy as np

from avlm.config.data import DataConfig
from avlm.config.run import Stage
from avlm.data.plan import Column, Measures, Plan
from avlm.data.rows import RowSource, RowTable
from avlm.data.shuffle import Ints
from avlm.errors import DataError
from avlm.samples import Sample


class Blend:
    """The rows of several sources end to end, as one `RowSource`.

    Args:
        members: The sources.
        weights: Of each, above 0; or None for all, and every row is read once an epoch.
    """

    def __init__(self, members: Sequence[RowSource], weights: Sequence[float | None]) -> None:
        self.members = members
        self.weights = None if None in weights else [float(w) for w in weights if w is not None]
        self.name = " + ".join(member.name for member in members)
        self.facts = RowTable(chain.from_iterable(member.facts for member in members))
        self.errors: list[DataError] = [error for member in members for error in member.errors]
        self.starts = [0, *accumulate(len(member) for member in members)]

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> Sample:
        member, at = self._find(index)
        return member[at]

    def __iter__(self) -> Iterator[Sample]:
        return chain.from_iterable(self.members)

    def where(self, index: int) -> str:
        member, at = self._find(index)
        return member.where(at)

    def fingerprint(self) -> str:
        """A digest of the members, their order and their weights."""
        text = "\n".join([*self.fingerprints().values(), repr(self.weights)])
        return hashlib.sha256(text.encode()).hexdigest()

    def fingerprints(self) -> dict[str, str]:
        """Of each member, by its name; a name that stands twice is told apart by its number."""
        names = [member.name for member in self.members]
        return {
            name if names.count(name) == 1 else f"{name} ({i + 1})": member.fingerprint()
            for i, (name, member) in enumerate(zip(names, self.members, strict=True))
        }

    def _find(self, index: int) -> tuple[RowSource, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self.starts, index) - 1
        return self.members[number], index - self.starts[number]


def plan_of(
    source: RowSource,
    rows: Sequence[int] | Ints,
    stage: Stage,
    data: DataConfig,
    seed: int,
    measures: Measures | None = None,
) -> Plan:
    """The plan of a stage.

    Args:
        source: What the stage reads, a `Blend` or any other.
        rows: Which of its rows the stage reads, ascending.
        data: Settings of the run's data.
        seed: Of the run.
        measures: Of all rows of the source, as its index has them.

    Raises:
        ConfigError: The order or the packs need measures, and there are none.
    """
    taken = np.asarray(rows, np.int64)
    sizes, weights = [len(taken)], None
    sources: Mapping[str, str] = {source.name: source.fingerprint()}
    if isinstance(source, Blend):
        sizes = np.diff(taken.searchsorted(source.starts)).tolist()
        weights, sources = source.weights, source.fingerprints()
    mine = None if measures is None else _of_rows(measures, taken)
    span = None if mine is None or data.order != "curriculum" else _climb(stage, len(taken), mine)
    return Plan(sizes, mine, seed=seed, stage=stage, order=data.order, weights=weights, span=span, sources=sources)


class _Taken:
    """Some rows of a column, numbered anew."""

    def __init__(self, column: Column, rows: Ints) -> None:
        self.column, self.rows = column, rows

    def __getitem__(self, rows: Ints) -> np.ndarray:
        return np.asarray(self.column[self.rows[rows]])


def _of_rows(measures: Measures, rows: Ints) -> Measures:
    columns = (measures.tokens, measures.cost, measures.tiles, measures.frames)
    tokens, cost, tiles, frames = (None if column is None else _Taken(column, rows) for column in columns)
    assert tokens is not None
    return Measures(tokens, cost, tiles, frames)


def _climb(stage: Stage, count: int, measures: Measures) -> int:
    """Places over which a curriculum climbs: as many as the stage reads; whole epochs if it stops right behind them."""
    if stage.epochs is not None:
        return max(1, round(stage.epochs * count))
    assert stage.steps is not None
    batch, slack = stage.batch_samples, stage.batch_samples - 1
    if stage.batch_rows is not None:
        some = np.asarray(measures.tokens[np.linspace(0, count - 1, min(count, 65_536)).astype(np.int64)])
        batch = max(1, stage.batch_rows * stage.row_tokens * len(some) // max(1, int(some.sum())))
        slack = max(batch, count // 32)  # rows are not quite full, and those looked at are some only
    epochs = max(1, round(stage.steps * batch / count))
    return epochs * count if abs(stage.steps * batch - epochs * count) <= slack else stage.steps * batch
