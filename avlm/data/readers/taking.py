"""What every reader does with a row: recognise its form once, parse it, note its facts or what is wrong with it."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from avlm.config.data import DataConfig
from avlm.data.forms.fields import ABSENT, Field, field_of
from avlm.data.forms.folders import KINDS, Folders, Whereabouts
from avlm.data.forms.parse import Form, parse_row, recognise, renamed, set_name
from avlm.data.rows import RowTable
from avlm.errors import DataError
from avlm.samples import Sample

Progress = Callable[[int, int], None]
"""Called with what is done and all there is."""
Reshape = Callable[[Mapping[str, Any]], Mapping[str, Any]]

QUIET_S = 2.0
"""What takes less is not worth a bar."""
EVERY_S = 0.1


class Ticker:
    """Tells how far a scan is, from its third second on and not too often.

    Args:
        progress: Who wants to know; None is nobody.
        total: All there is, in the scan's own unit.
    """

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total = progress, total
        self._next_s = time.monotonic() + QUIET_S
        self._calls = 0

    def at(self, done: int) -> None:
        """Note how far it is; costs next to nothing."""
        if self.progress is None:
            return
        self._calls += 1
        if self._calls & 63:
            return
        now_s = time.monotonic()
        if now_s >= self._next_s:
            self._next_s = now_s + EVERY_S
            self.progress(done, self.total)

    def end(self) -> None:
        """The scan is over."""
        if self.progress is not None and time.monotonic() >= self._next_s:
            self.progress(self.total, self.total)


def columns_of(data: DataConfig) -> dict[str, Field]:
    """What the user says that columns are.

    Raises:
        ConfigError: One of them names none.
    """
    return {str(name): field_of(text, f"data.columns.{name}") for name, text in data.columns.items()}


MEDIA = frozenset(name for kind in KINDS for name in (kind, f"{kind}s"))
"""What columns of media are called where nobody says otherwise."""


class Parser:
    """Rows to samples: what a file's rows are, once that is known, and what their columns are called.

    Args:
        folders: What media paths are relative to.
        columns: Of each name here the field of a row, where rows have other names.
        reshape: Makes another form of a row first.
    """

    def __init__(
        self, folders: Folders, columns: Mapping[str, Field] | None = None, reshape: Reshape | None = None
    ) -> None:
        self.folders, self.columns, self.reshape = folders, columns or {}, reshape
        self.form: Form | None = None
        self.met: set[str] = set()
        """Which of the columns some row had, if only with nothing in it."""
        self.unread: set[str] = set()
        """Columns of media that some row has and that nobody named."""
        self._named = {first for field in self.columns.values() for first in field.first()}

    def shaped(self, row: Any) -> Any:
        """A row under the names that are used here."""
        if isinstance(row, Mapping):
            if self.columns:
                self.met |= {n for n in self.columns.keys() - self.met if self.columns[n].of(row) is not ABSENT}
                self.unread |= (MEDIA & row.keys()) - self._named
                row = renamed(row, self.columns)
            if self.reshape is not None:
                row = self.reshape(row)
        return row

    def parse(self, row: Any, where: str) -> tuple[Sample, str]:
        """The sample of a row as the file has it, and the set that it is from.

        Raises:
            DataError: It is wrong.
        """
        try:
            row = self.shaped(row)
        except DataError as error:
            raise DataError(error.reason, where=where) from None
        self.form = self.form or recognise(row)
        return self.parse_shaped(row, where, self.form)

    def parse_shaped(
        self, row: Any, where: str, form: Form | None, media: Whereabouts | None = None, key: str = ""
    ) -> tuple[Sample, str]:
        """The sample of a row under the names that are used here, and the set that it is from.

        Args:
            media: Where its media are, if not in the folders.
            key: What it is called where it has no id.

        Raises:
            DataError: It is wrong.
        """
        sample = parse_row(row, media or self.folders, where, form, key)
        if form != "conversations":
            return sample, row["set"] if isinstance(row.get("set"), str) else ""
        return sample, set_name(row)


def shares(table: RowTable, folders: Folders) -> np.ndarray | None:
    """Rows that are left when each set is cut to its share: the same ones each time, in order; None where it is all."""
    left_out = np.zeros(len(table), bool)
    of_set = table.set
    for number, name in enumerate(table.sets):
        ratio = folders.ratio(name)
        if ratio < 1:
            rows = np.flatnonzero(of_set == number)
            kept = max(1, round(ratio * len(rows)))
            order = np.random.default_rng(zlib.crc32(name.encode())).permutation(len(rows))
            left_out[rows[order[kept:]]] = True
    return np.flatnonzero(~left_out) if left_out.any() else None
