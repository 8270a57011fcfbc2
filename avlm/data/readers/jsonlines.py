"""JSON lines, or one JSON list, to samples.

A row that cannot be read is a `DataError` that names the file, the place and the row's id; reading goes on behind it.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from avlm.config.data import DataConfig
from avlm.data.forms.fields import Field
from avlm.data.forms.folders import folders_of
from avlm.data.readers.taking import Parser, Progress, Reshape, Ticker, shares
from avlm.data.rownumbers import Columns
from avlm.data.rows import RowTable, facts_of
from avlm.errors import ConfigError, DataError
from avlm.samples import Sample

MARK = b"\xef\xbb\xbf"
"""Some editors begin a file with it (a byte order mark)."""


class JsonLines:
    """The rows of one file of JSON lines, or of one JSON list. Facts stay in memory, rows are read again when needed.

    A list is in memory as a whole once, while it is looked through for where its rows begin.

    Args:
        path: The file.
        data: Where media lie, and which share of each set is read.
        columns: What the rows' columns are called, where they have other names.
        reshape: Makes another form of a row first.
        progress: Called with bytes done and in all, where that takes longer than two seconds.

    Raises:
        ConfigError: There is no such file, it is no regular file, a list is broken, or no row can be read.
    """

    def __init__(
        self,
        path: Path | str,
        data: DataConfig | None = None,
        *,
        columns: Mapping[str, Field] | None = None,
        reshape: Reshape | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.path = Path(path)
        self.name = self._title = self.path.name
        self.listed = False
        self.facts = RowTable()
        self.errors: list[DataError] = []
        self._places = Columns(line="q", offset="q", size="q")
        """Of each row the number of its line (or of the member of a list, from 1), where it begins, and its bytes."""
        try:
            if not stat.S_ISREG(self.path.stat().st_mode):  # a pipe can be read once only, and waits for its writer
                raise ConfigError(f"{self.path}: is not a regular file. Give a file of JSON lines")
            self.parser = Parser(folders_of(self.path, data or DataConfig()), columns, reshape)
            with self.path.open("rb") as file:
                self.listed = file.read(4096).removeprefix(MARK).lstrip().startswith(b"[")
                file.seek(0)
                ticker = Ticker(progress, self.path.stat().st_size)
                (self._scan_list if self.listed else self._scan_lines)(file, ticker)
                ticker.end()
        except OSError as error:
            raise self._unreadable(error) from None
        if not self.facts:
            first = f" The first row: {self.errors[0].reason}" if self.errors else " It is empty."
            raise ConfigError(f"{self.path}: has no row that can be read, so there is nothing to learn from.{first}")
        self.roots = tuple(dict.fromkeys((self.path.parent, self.parser.folders.base)))
        self.kind = f"{'a JSON list' if self.listed else 'JSON lines'} of {self.parser.form}"
        kept = shares(self.facts, self.parser.folders)
        if kept is not None:
            self.facts, self._places = self.facts.kept(kept), self._places.kept(kept)

    def _unreadable(self, error: OSError) -> ConfigError:
        return ConfigError(f"{self.path}: not readable ({error.strerror}). Give an existing file of JSON lines")

    def _scan_lines(self, file: BinaryIO, ticker: Ticker) -> None:
        offset = 0
        for number, line in enumerate(file, 1):
            if line.strip():
                self._take(number, offset, len(line), line)
            offset += len(line)
            ticker.at(offset)

    def _scan_list(self, file: BinaryIO, ticker: Ticker) -> None:
        """Find the members of a list: each is read once here, and again from its place when it is needed."""
        data = file.read()
        text = _text(data.removeprefix(MARK), self.path)
        offset, done = len(data) - len(data.removeprefix(MARK)), 0
        for number, (start, end) in enumerate(_members(text, self.path), 1):
            offset += len(text[done:start].encode())
            row = text[start:end].encode()
            self._take(number, offset, len(row), row)
            offset, done = offset + len(row), end
            ticker.at(offset)

    def _take(self, number: int, offset: int, size: int, line: bytes) -> None:
        """Note a row's facts, or what is wrong with it."""
        try:
            sample, name = self._parse(line, number)
            self.facts.append(facts_of(sample, name))
            self._places.append(number, offset, size)
        except DataError as error:
            self.errors.append(error)

    def __len__(self) -> int:
        return len(self.facts)

    def __getitem__(self, index: int) -> Sample:
        """The sample of one readable row."""
        number, offset, size = self._places.row(index)
        try:
            line = _bytes_at(self.path, offset, size)
        except OSError as error:
            raise self._unreadable(error) from None
        return self._parse(line, number)[0]

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    @property
    def lines(self) -> Sequence[int]:
        """Number of each readable row's line, or of the member of a list, from 1."""
        found: list[int] = self._places["line"].tolist()
        return found

    def fingerprint(self) -> str:
        """SHA-256 of the file."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def where(self, index: int) -> str:
        """What to call the place of a readable row in a message."""
        return self._where(self._places.row(index)[0])

    def _where(self, number: int) -> str:
        return f"{self._title} {'row' if self.listed else 'line'} {number}"

    def _parse(self, line: bytes, number: int) -> tuple[Sample, str]:
        where = self._where(number)
        return self.parser.parse(loaded(line, where, "Write one object on a line"), where)


def _bytes_at(path: Path, offset: int, size: int) -> bytes:
    """Bytes of a file; fewer where it ends. Without a buffer, which takes longer to make than a row to read."""
    number = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        return os.pread(number, size, offset)
    finally:
        os.close(number)


def loaded(text: bytes | str, where: str, advice: str) -> Any:
    """What a JSON text holds.

    Args:
        advice: What to do where it is none.

    Raises:
        DataError: It is none.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        detail = str(error)
        if isinstance(error, json.JSONDecodeError):
            detail = f"{error.msg} at character {error.pos + 1}"
        raise DataError(f"is not JSON ({detail}). {advice}", where=where) from None


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
