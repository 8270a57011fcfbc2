"""Whole numbers by row, in named columns: a few bytes a row, and next to nothing when they go to another process."""

from __future__ import annotations

import os
import tempfile
import weakref
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SMALL_BYTES = 64 * 2**10
"""Columns of up to this size travel as they are; larger ones as the name of a file that both processes map."""


class Columns:
    """Named columns of whole numbers that grow together.

    Args:
        kinds: Of each column how a number is kept: "B" 1 byte, "i" 4 bytes, "q" 8 bytes.
    """

    def __init__(self, **kinds: str) -> None:
        self._columns: dict[str, Any] = {name: array(kind) for name, kind in kinds.items()}
        self._file: Path | None = None

    def append(self, *values: int) -> None:
        """Add a row: a number for each column, in their order."""
        for column, value in zip(self._columns.values(), values, strict=True):
            column.append(value)

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def row(self, index: int) -> tuple[int, ...]:
        """The numbers of one row, in the order of the columns."""
        return tuple(int(column[index]) for column in self._columns.values())

    def __getitem__(self, name: str) -> np.ndarray:
        """A copy of one column."""
        return np.array(self._columns[name])

    def kept(self, rows: Sequence[int] | np.ndarray) -> Columns:
        """Columns of some of the rows, in the order given."""
        numbers = np.asarray(rows, np.int64)
        return self.of({name: np.array(column)[numbers] for name, column in self._columns.items()})

    @classmethod
    def joined(cls, columns: Sequence[Columns]) -> Columns:
        """Columns of the same names one behind the other; of at least one."""
        return cls.of({name: np.concatenate([one[name] for one in columns]) for name in columns[0]._columns})

    @classmethod
    def of(cls, columns: Mapping[str, np.ndarray]) -> Columns:
        """Columns of whole numbers that are there already."""
        found = cls()
        found._columns = {name: _as_array(values) for name, values in columns.items()}
        return found

    def __getstate__(self) -> dict[str, Any]:
        arrays = {name: np.array(column) for name, column in self._columns.items()}
        if sum(column.nbytes for column in arrays.values()) <= SMALL_BYTES:
            return {"columns": arrays}
        if self._file is None or not self._file.exists():
            self._file = _written(arrays)
            weakref.finalize(self, _remove, self._file, os.getpid())
        return {"file": self._file, "kinds": {name: (column.dtype.str, len(column)) for name, column in arrays.items()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._file = None
        if "columns" in state:
            self._columns = {name: _as_array(column) for name, column in state["columns"].items()}
            return
        self._columns, offset = {}, 0
        for name, (kind, count) in state["kinds"].items():
            self._columns[name] = np.memmap(state["file"], np.dtype(kind), "r", offset, (count,))
            offset += self._columns[name].nbytes


def _as_array(values: np.ndarray) -> array[int]:
    made: array[int] = array(values.dtype.char if values.dtype.char in "Biq" else "q")
    made.frombytes(values.astype(np.dtype(made.typecode)).tobytes())
    return made


def _written(columns: Mapping[str, np.ndarray]) -> Path:
    number, name = tempfile.mkstemp(prefix="avlm-rows-")
    with open(number, "wb") as file:
        for column in columns.values():
            file.write(column.tobytes())
    return Path(name)


def _remove(path: Path, owner: int) -> None:
    """Behind the last use, in the process that wrote it; who has it mapped keeps what is in it."""
    if os.getpid() == owner:
        path.unlink(missing_ok=True)
