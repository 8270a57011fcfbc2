"""Data files in: JSON lines or a JSON list to samples.

The form of a file's rows is recognised once, by the first row that has one. A row that
cannot be read is a `DataError` that names the file, the place and the row's id; reading
goes on behind it.
"""

from __future__ import annotations

import hashlib
import json
import stat
import zlib
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from avlm.config.data import DataConfig
from avlm.data.forms import Folders, Form, parse_row, recognise, set_names
from avlm.data.rows import RowSource, RowTable, facts_of
from avlm.errors import ConfigError, DataError
from avlm.samples import Sample

MARK = b"\xef\xbb\xbf"
"""Some editors begin a file with it (a byte order mark)."""


def open_source(path: str, data: DataConfig | None = None) -> RowSource:
    """The rows of whatever is there.

    Args:
        path: A file of JSON lines, or a JSON list.
        data: Where media lie, and which share of each set is read.

    Raises:
        ConfigError: There is nothing, or nothing that can be read.
    """
    return JsonLines(path, data)


class JsonLines:
    """The rows of one file of JSON lines, or of one JSON list. Facts stay in memory, rows are read again when needed.

    A list is in memory as a whole once, while it is looked through for where its rows begin.

    Args:
        path: The file.
        data: Where media lie, and which share of each set is read.

    Raises:
        ConfigError: There is no such file, it is no regular file, a list is broken, or no row can be read.
    """

    def __init__(self, path: Path | str, data: DataConfig | None = None) -> None:
        self.path = Path(path)
        self.name = self.path.name
        data = data or DataConfig()
        self.folders = Folders(self.path.parent if data.folder is None else Path(data.folder), data.sets)
        self.form: Form | None = None
        self.listed = False
        self.facts = RowTable()
        self.errors: list[DataError] = []
        self._places: tuple[array[int], array[int], array[int]] = (array("q"), array("q"), array("q"))
        """Of each row the number of its line (or of the member of a list, from 1), where it begins, and its bytes."""
        try:
            if not stat.S_ISREG(self.path.stat().st_mode):  # a pipe can be read once only, and waits for its writer
                raise ConfigError(f"{self.path}: is not a regular file. Give a file of JSON lines")
            with self.path.open("rb") as file:
                self.listed = file.read(4096).removeprefix(MARK).lstrip().startswith(b"[")
                file.seek(0)
                (self._scan_list if self.listed else self._scan_lines)(file)
        except OSError as error:
            raise self._unreadable(error) from None
        if not self.facts:
            first = f" The first row: {self.errors[0].reason}" if self.errors else " It is empty."
            raise ConfigError(f"{self.path}: has no row that can be read, so there is nothing to learn from.{first}")
        self._take_shares()

    def _unreadable(self, error: OSError) -> ConfigError:
        return ConfigError(f"{self.path}: not readable ({error.strerror}). Give an existing file of JSON lines")

    def _scan_lines(self, file: BinaryIO) -> None:
        offset = 0
        for number, line in enumerate(file, 1):
            if line.strip():
                self._take(number, offset, len(line), line)
            offset += len(line)

    def _scan_list(self, file: BinaryIO) -> None:
        """Find the members of a list: each is read once here, and again from its place when it is needed."""
        data = file.read()
        text = _text(data.removeprefix(MARK), self.path)
        offset, done = len(data) - len(data.removeprefix(MARK)), 0
        for number, (start, end) in enumerate(_members(text, self.path), 1):
            offset += len(text[done:start].encode())
            row = text[start:end].encode()
            self._take(number, offset, len(row), row)
            offset, done = offset + len(row), end

    def _take(self, number: int, offset: int, size: int, line: bytes) -> None:
        """Note a row's facts, or what is wrong with it."""
        try:
            row, sample = self._parse(line, number)
            names = set_names(row) if self.form == "conversations" else []
            name = names[0] if names else ""
            self.facts.append(facts_of(sample, name))
            for column, value in zip(self._places, (number, offset, size), strict=True):
                column.append(value)
        except DataError as error:
            self.errors.append(error)

    def _take_shares(self) -> None:
        """Leave out what a set's ratio leaves out: the same rows each time, the others in the order of the file."""
        left_out: set[int] = set()
        for number, name in enumerate(self.facts.sets):
            if self.folders.ratio(name) < 1:
                rows = np.flatnonzero(self.facts.set == number)
                kept = max(1, round(self.folders.ratio(name) * len(rows)))
                order = np.random.default_rng(zlib.crc32(name.encode())).permutation(len(rows))
                left_out |= {int(rows[i]) for i in order[kept:]}
        if left_out:
            kept_rows = [i for i in range(len(self.facts)) if i not in left_out]
            self.facts = self.facts.kept(kept_rows)
            lines, offsets, sizes = (array("q", (column[i] for i in kept_rows)) for column in self._places)
            self._places = lines, offsets, sizes

    def __len__(self) -> int:
        return len(self.facts)

    def __getitem__(self, index: int) -> Sample:
        """The sample of one readable row."""
        number, offset, size = (column[index] for column in self._places)
        try:
            with self.path.open("rb") as file:
                file.seek(offset)
                line = file.read(size)
        except OSError as error:
            raise self._unreadable(error) from None
        return self._parse(line, number)[1]

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    @property
    def lines(self) -> Sequence[int]:
        """Number of each readable row's line, or of the member of a list, from 1."""
        return self._places[0]

    def fingerprint(self) -> str:
        """SHA-256 of the file."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def where(self, index: int) -> str:
        """What to call the place of a readable row in a message."""
        return self._where(self.lines[index])

    def _where(self, number: int) -> str:
        return f"{self.path.name} {'row' if self.listed else 'line'} {number}"

    def _parse(self, line: bytes, number: int) -> tuple[Any, Sample]:
        where = self._where(number)
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            detail = str(error)
            if isinstance(error, json.JSONDecodeError):
                detail = f"{error.msg} at character {error.pos + 1}"
            raise DataError(f"is not JSON ({detail}). Write one object on a line", where=where) from None
        self.form = self.form or recognise(row)
        return row, parse_row(row, self.folders, where, self.form)


def _text(data: bytes, path: Path) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: is not UTF-8 (byte {error.start + 1}), so its rows cannot be told apart. Write it in UTF-8"
        ) from None


def _members(text: str, path: Path) -> Iterator[tuple[int, int]]:
    """Where each member of a JSON list begins and ends."""
    decoder = json.JSONDecoder()
    at = _past_space(text, 0) + 1
    try:
        at = _past_space(text, at)
        while not text.startswith("]", at):
            _, end = decoder.raw_decode(text, at)
            yield at, end
            at = _past_space(text, end)
            if text.startswith(",", at):
                at = _past_space(text, at + 1)
            elif not text.startswith("]", at):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
        at = _past_space(text, at + 1)
        if at < len(text):
            raise json.JSONDecodeError("Extra data", text, at)
    except (ValueError, RecursionError) as error:
        detail = f"{error.msg} at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise ConfigError(
            f"{path}: begins as a JSON list and is none ({detail}), so where its rows begin is not known. "
            "Correct it, or write one object on a line"
        ) from None


def _past_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at
