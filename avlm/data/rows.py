"""What is known of the rows of a data set without decoding anything, in columns: a few bytes a row.

RowTable   the table
Source     whatever rows can be read from, one at a time and in any order
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, overload

import numpy as np

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


class RowTable(Sequence[RowFacts]):
    """A table of rows, 10 bytes each.

    Attributes:
        tasks, sets: Every name once, in the order of their first row.
        task, set: int32 [rows], numbers of names.
        kinds, told: uint8 [rows], sets of kinds as `bits` writes them.
    """

    def __init__(self, facts: Iterable[RowFacts] = ()) -> None:
        self.tasks: list[str] = []
        self.sets: list[str] = []
        self._numbers: dict[tuple[int, str], int] = {}
        self._task, self._set, self._kinds, self._told = array("i"), array("i"), array("B"), array("B")
        for row in facts:
            self.append(row)

    def append(self, row: RowFacts) -> None:
        """Add a row at the end."""
        self._task.append(self._number(self.tasks, 0, row.task))
        self._set.append(self._number(self.sets, 1, row.set))
        self._kinds.append(bits(row.kinds))
        self._told.append(bits(row.told))

    def _number(self, names: list[str], column: int, name: str) -> int:
        number = self._numbers.get((column, name))
        if number is None:
            number = self._numbers[column, name] = len(names)
            names.append(name)
        return number

    @property
    def task(self) -> np.ndarray:
        return np.array(self._task, np.int32)

    @property
    def set(self) -> np.ndarray:
        return np.array(self._set, np.int32)

    @property
    def kinds(self) -> np.ndarray:
        return np.array(self._kinds, np.uint8)

    @property
    def told(self) -> np.ndarray:
        return np.array(self._told, np.uint8)

    def kept(self, numbers: Sequence[int] | np.ndarray) -> RowTable:
        """A table of some of the rows, in the order given."""
        return RowTable(self[int(i)] for i in numbers)

    def __len__(self) -> int:
        return len(self._task)

    @overload
    def __getitem__(self, index: int) -> RowFacts: ...
    @overload
    def __getitem__(self, index: slice) -> RowTable: ...
    def __getitem__(self, index: int | slice) -> RowFacts | RowTable:
        if isinstance(index, slice):
            return RowTable(self[i] for i in range(*index.indices(len(self))))
        task, name = self.tasks[self._task[index]], self.sets[self._set[index]]
        return RowFacts(task, kinds_of(self._kinds[index]), kinds_of(self._told[index]), name)


def bits(kinds: Collection[MediaKind]) -> int:
    """A set of kinds as a number."""
    return sum(1 << i for i, kind in enumerate(KINDS) if kind in kinds)


_SETS = [frozenset(kind for i, kind in enumerate(KINDS) if number >> i & 1) for number in range(8)]


def kinds_of(number: int) -> frozenset[MediaKind]:
    """The set of kinds that a number stands for."""
    return _SETS[number]


def facts_of(sample: Sample, name: str = "") -> RowFacts:
    """What a sample's row is known by."""
    return RowFacts(sample.task, sample.kinds(), sample.told(), name)


class RowSource(Protocol):
    """RowTable that can be read in any order, by any process: an instance can be pickled and is then small.

    A reader of one's own is a class with these, named as ``data.train=FILE.py:CLASS`` or ``MODULE:CLASS``.
    """

    name: str
    """What to call it in messages and in a run's records."""
    facts: RowTable
    """What is known of each row that can be read."""
    errors: list[DataError]
    """RowTable that cannot be read, each with its place; they have no number."""

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
