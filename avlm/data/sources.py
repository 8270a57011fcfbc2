"""Rows in: JSON lines to samples, each checked on its own.

Media paths are relative to the file. A row that cannot be read is a `DataError`
that names the file, the line and the row's id; reading goes on behind it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avlm.errors import ConfigError, DataError
from avlm.samples import MediaItem, MediaKind, Role, Sample, Text, Turn

ROLES: tuple[Role, ...] = ("system", "user", "assistant")
KINDS: tuple[MediaKind, ...] = ("image", "audio", "video")


@dataclass(frozen=True, slots=True)
class RowFacts:
    """What is known of a row without decoding anything."""

    task: str
    kinds: frozenset[MediaKind]
    offset: int
    line: int


class JsonLines:
    """The rows of one JSON-lines file. Facts stay in memory, rows are read again when they are needed.

    Args:
        path: The file.

    Raises:
        ConfigError: There is no such file, or it holds no row.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.facts: list[RowFacts] = []
        self.errors: list[DataError] = []
        try:
            with self.path.open("rb") as file:
                self._scan(file)
        except OSError as error:
            raise ConfigError(
                f"{self.path}: not readable ({error.strerror}). Give an existing file of JSON lines"
            ) from None
        if not self.facts:
            first = f" The first row: {self.errors[0].reason}" if self.errors else " It is empty."
            raise ConfigError(f"{self.path}: has no row that can be read, so there is nothing to learn from.{first}")

    def _scan(self, file: Any) -> None:
        offset = 0
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    sample = self._parse(line, number)
                    self.facts.append(RowFacts(sample.task, sample.kinds(), offset, number))
                except DataError as error:
                    self.errors.append(error)
            offset += len(line)

    def __len__(self) -> int:
        return len(self.facts)

    def __getitem__(self, index: int) -> Sample:
        """The sample of one readable row."""
        facts = self.facts[index]
        with self.path.open("rb") as file:
            file.seek(facts.offset)
            return self._parse(file.readline(), facts.line)

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def _parse(self, line: bytes, number: int) -> Sample:
        where = f"{self.path.name} line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"is not JSON ({error}). Write one object on a line", where=where) from None
        return parse_row(row, self.path.parent, where)


def parse_row(row: Any, base: Path, where: str = "") -> Sample:
    """Read one row in avlm's own form.

    Args:
        row: ``{"id": ..., "task": ..., "messages": [{"role": ..., "content": ...}]}``.
        base: What media paths are relative to.
        where: Source and place, for messages.

    Raises:
        DataError: The row is not in that form.
    """
    if not isinstance(row, dict) or not isinstance(row.get("messages"), list):
        raise DataError(
            'has no list "messages". A row is {"messages": [{"role": "user", "content": ...}, ...]}', where=where
        )
    sample_id = str(row.get("id", where))
    try:
        turns = tuple(_turn(message, base) for message in row["messages"])
    except DataError as error:
        raise DataError(error.reason, where=f'{where} (id "{sample_id}")', sample_id=sample_id) from None
    return Sample(sample_id, turns, str(row.get("task", "")), where)


def _turn(message: Any, base: Path) -> Turn:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        role = message.get("role") if isinstance(message, dict) else message
        raise DataError(f"a message has the role {role!r}, and roles are {', '.join(ROLES)}. Correct it")
    content = message.get("content")
    if isinstance(content, str):
        return Turn(message["role"], (Text(content),))
    if not isinstance(content, list):
        raise DataError('a message has no "content". Give a text, or a list of typed parts')
    return Turn(message["role"], tuple(_part(part, base) for part in content))


def _part(part: Any, base: Path) -> Text | MediaItem:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return Text(part["text"])
    if kind in KINDS:
        path = part.get("path")
        if not isinstance(path, str) or not path:
            raise DataError(
                f'a part of type {kind} has no "path". Give the path of its file, relative to the data file'
            )
        if "\0" in path:
            raise DataError(f"the path of a part of type {kind} holds a zero character. Correct it")
        return MediaItem(kind, path=base / path)
    raise DataError(f"a part has the type {kind!r}, and parts are text, image, audio or video. Correct its type")
