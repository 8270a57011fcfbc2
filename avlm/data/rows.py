"""What is known of the rows of a data set without decoding anything, in columns: a few bytes a row.

RowTable     the table
RowSource    whatever rows can be read from, one at a time and in any order
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, overload

import numpy as np

from avlm.data.rownumbers import Columns
from avlm.errors import DataError
from avlm.samples import MediaKind, Sample

KINDS: tuple[MediaKind, ...] = ("image", "audio", "video")


@dataclass(frozen=True, slots=True)
class RowFacts:
    """What is known of one row."""

    task: str = ""
    kinds: frozenset[MediaKind] = frozenset()
    told: frozenset[MediaKind] = frozenset()
    """Kinds whose every medium has an `alt`, so that words can stand in for it."""
    set: str = ""
    """VITA's name for where it comes from."""
    pair: bool = False
    """Whether it has a worse answer beside the better one."""


class RowTable(Sequence[RowFacts]):
    """A table of rows, 11 bytes each.

    Attributes:
        tasks, sets: Every name once, in the order of their first row.
        task, set: int32 [rows], numbers of names.
        kinds, told: uint8 [rows], sets of kinds as `bits` writes them.
        pair: uint8 [rows], 1 where there are two answers.
    """

    def __init__(self, facts: Iterable[RowFacts] = ()) -> None:
        self.tasks: list[str] = []
        self.sets: list[str] = []
        self._numbers: dict[tuple[str, str], int] = {}
        self._columns = Columns(task="i", set="i", kinds="B", told="B", pair="B")
        for row in facts:
            self.append(row)

    def append(self, row: RowFacts) -> None:
        """Add a row at the end."""
        task, name = self._number("task", row.task), self._number("set", row.set)
        self._columns.append(task, name, bits(row.kinds), bits(row.told), row.pair)

    def _names(self, column: str) -> list[str]:
        return self.tasks if column == "task" else self.sets

    def _number(self, column: str, name: str) -> int:
        number = self._numbers.get((column, name))
        if number is None:
            names = self._names(column)
            number = self._numbers[column, name] = len(names)
            names.append(name)
        return number

    @property
    def task(self) -> np.ndarray:
        return self._columns["task"]

    @property
    def set(self) -> np.ndarray:
        return self._columns["set"]

    @property
    def kinds(self) -> np.ndarray:
        return self._columns["kinds"]

    @property
    def told(self) -> np.ndarray:
        return self._columns["told"]

    @property
    def pair(self) -> np.ndarray:
        return self._columns["pair"]

    def kept(self, numbers: Sequence[int] | np.ndarray) -> RowTable:
        """A table of some of the rows, in the order given. Names that no row has any more are gone."""
        return self._of(self._columns.kept(numbers), self.tasks, self.sets)

    @classmethod
    def joined(cls, tables: Sequence[RowTable]) -> RowTable:
        """Tables one behind the other."""
        tasks = [name for table in tables for name in table.tasks]
        sets = [name for table in tables for name in table.sets]
        shifted, before = [], (0, 0)
        for table in tables:
            columns = {name: table._columns[name] for name in ("task", "set", "kinds", "told", "pair")}
            columns |= {"task": columns["task"] + before[0], "set": columns["set"] + before[1]}
            shifted.append(Columns.of(columns))
            before = before[0] + len(table.tasks), before[1] + len(table.sets)
        return cls._of(Columns.joined(shifted), tasks, sets) if shifted else cls()

    @classmethod
    def _of(cls, columns: Columns, tasks: list[str], sets: list[str]) -> RowTable:
        """A table of columns whose names are numbered anew, in the order of their first row."""
        found = cls()
        renumbered = {}
        for column, names in (("task", tasks), ("set", sets)):
            used, first = np.unique(columns[column], return_index=True)
            numbers = np.zeros(len(names), np.int32)
            for old in used[np.argsort(first)]:
                numbers[old] = found._number(column, names[old])
            renumbered[column] = numbers[columns[column]]
        found._columns = Columns.of(renumbered | {name: columns[name] for name in ("kinds", "told", "pair")})
        return found

    def __len__(self) -> int:
        return len(self._columns)

    @overload
    def __getitem__(self, index: int) -> RowFacts: ...
    @overload
    def __getitem__(self, index: slice) -> RowTable: ...
    def __getitem__(self, index: int | slice) -> RowFacts | RowTable:
        if isinstance(index, slice):
            return RowTable(self[i] for i in range(*index.indices(len(self))))
        task, name, kinds, told, pair = self._columns.row(index)
        return RowFacts(self.tasks[task], kinds_of(kinds), kinds_of(told), self.sets[name], bool(pair))


def bits(kinds: Collection[MediaKind]) -> int:
    """A set of kinds as a number."""
    return sum(1 << i for i, kind in enumerate(KINDS) if kind in kinds)


_SETS = [frozenset(kind for i, kind in enumerate(KINDS) if number >> i & 1) for number in range(8)]


def kinds_of(number: int) -> frozenset[MediaKind]:
    """The set of kinds that a number stands for."""
    return _SETS[number]


def facts_of(sample: Sample, name: str = "") -> RowFacts:
    """What a sample's row is known by."""
    return RowFacts(sample.task, sample.kinds(), sample.told(), name, sample.rejected is not None)


class RowSource(Protocol):
    """Rows that can be read in any order, by any process: an instance can be pickled and is then small.

    A reader of one's own needs less than this: `avlm.data.readers.own` says what.
    """

    name: str
    """What to call it in messages and in a run's records."""
    kind: str
    """What the source was taken for, in words."""
    roots: tuple[Path, ...]
    """Folders that its files and media lie in."""
    facts: RowTable
    """What is known of each row that can be read."""
    errors: list[DataError]
    """Rows that cannot be read, each with its place; they have no number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """The sample of one row, its media not decoded.

        Raises:
            DataError: The row is wrong after all.
        """

    def __iter__(self) -> Iterator[Sample]: ...

    def where(self, index: int) -> str:
        """What to call the place of a row in a message, such as ``train.jsonl line 7``."""

    def fingerprint(self) -> str:
        """A digest of everything that the rows follow from; the same for the same rows on any machine."""
