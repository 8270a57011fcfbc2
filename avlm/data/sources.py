"""Rows in: JSON lines to samples, each checked on its own.

Media paths are relative to the file. A row that cannot be read is a `DataError`
that names the file, the line and the row's id; reading goes on behind it.
"""

from __future__ import annotations

import json
import math
import stat
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
    told: frozenset[MediaKind]
    """Kinds whose every medium has an `alt`, so that words can stand in for it."""
    offset: int
    line: int


class JsonLines:
    """The rows of one JSON-lines file. Facts stay in memory, rows are read again when they are needed.

    Args:
        path: The file.

    Raises:
        ConfigError: There is no such file, it is no regular file, or it holds no row that can be read.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.facts: list[RowFacts] = []
        self.errors: list[DataError] = []
        try:
            if not stat.S_ISREG(self.path.stat().st_mode):  # a pipe can be read once only, and waits for its writer
                raise ConfigError(f"{self.path}: is not a regular file. Give a file of JSON lines")
            with self.path.open("rb") as file:
                self._scan(file)
        except OSError as error:
            raise self._unreadable(error) from None
        if not self.facts:
            first = f" The first row: {self.errors[0].reason}" if self.errors else " It is empty."
            raise ConfigError(f"{self.path}: has no row that can be read, so there is nothing to learn from.{first}")

    def _unreadable(self, error: OSError) -> ConfigError:
        return ConfigError(f"{self.path}: not readable ({error.strerror}). Give an existing file of JSON lines")

    def _scan(self, file: Any) -> None:
        offset = 0
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    sample = self._parse(line, number)
                    self.facts.append(RowFacts(sample.task, sample.kinds(), sample.told(), offset, number))
                except DataError as error:
                    self.errors.append(error)
            offset += len(line)

    def __len__(self) -> int:
        return len(self.facts)

    def __getitem__(self, index: int) -> Sample:
        """The sample of one readable row."""
        facts = self.facts[index]
        try:
            with self.path.open("rb") as file:
                file.seek(facts.offset)
                line = file.readline()
        except OSError as error:
            raise self._unreadable(error) from None
        return self._parse(line, facts.line)

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def _parse(self, line: bytes, number: int) -> Sample:
        where = f"{self.path.name} line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            detail = str(error)
            if isinstance(error, json.JSONDecodeError):
                detail = f"{error.msg} at character {error.pos + 1}"
            raise DataError(f"is not JSON ({detail}). Write one object on a line", where=where) from None
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
    named = isinstance(row, dict) and isinstance(row.get("id"), (str, int))
    sample_id = str(row["id"]) if named else where
    try:
        if not isinstance(row, dict):
            raise DataError(f"is {_kind(row)} and not an object. {_FORM}")
        messages = row.get("messages")
        if not isinstance(messages, list) or not messages:
            raise DataError(f'has no list "messages" with a message in it. {_FORM}')
        turns = tuple(_turn(message, base) for message in messages)
        task = _word(row, "task")
        _word(row, "id")
        _unbroken(sample_id, "id")
    except DataError as error:
        shown = f" (id {json.dumps(sample_id)})" if named else ""
        writable = sample_id.encode(errors="replace").decode()
        raise DataError(error.reason, where=where + shown, sample_id=writable) from None
    return Sample(sample_id, turns, task, where)


_FORM = 'A row is {"messages": [{"role": "user", "content": ...}, ...]}'


def _kind(value: Any) -> str:
    """What JSON calls a value."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


def _word(row: dict[str, Any], key: str) -> str:
    """A name that a row may have; null is none."""
    value = row.get(key)
    if value is not None and (not isinstance(value, (str, int)) or isinstance(value, bool)):
        raise DataError(f'has {_kind(value)} as "{key}", which is a text. Correct it, or leave it out')
    return _unbroken("" if value is None else str(value), key)


def _unbroken(text: str, what: str) -> str:
    """A text that can be written as UTF-8: JSON can hold half of a character, and no tokenizer takes that."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise DataError(f"its {what} holds half of a character ({half}). Write the whole one") from None
    return text


def _turn(message: Any, base: Path) -> Turn:
    if not isinstance(message, dict):
        raise DataError(f'a message is {_kind(message)} and not an object. Write {{"role": ..., "content": ...}}')
    role = message.get("role")
    if role not in ROLES:
        raise DataError(
            f"a message has the role {json.dumps(role, default=repr)}, and roles are {', '.join(ROLES)}. Correct it"
        )
    content = message.get("content")
    if isinstance(content, str):
        return Turn(role, (Text(_unbroken(content, "text")),))
    if not isinstance(content, list):
        raise DataError('a message has no "content". Give a text, or a list of typed parts')
    return Turn(role, tuple(_part(part, base) for part in content))


def _part(part: Any, base: Path) -> Text | MediaItem:
    if not isinstance(part, dict):
        raise DataError(f'a part is {_kind(part)} and not an object. Write {{"type": "text", "text": ...}}')
    kind = part.get("type")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise DataError('a part of type text has no "text". Give its words')
        return Text(_unbroken(part["text"], "text"))
    if kind not in KINDS:
        given = json.dumps(kind, default=repr)
        raise DataError(f"a part has the type {given}, and parts are text, image, audio or video. Correct its type")
    path = part.get("path")
    if not isinstance(path, str) or not path:
        raise DataError(f'a part of type {kind} has no "path". Give the path of its file, relative to the data file')
    if "\0" in path:
        raise DataError(f"the path of a part of type {kind} holds a zero character. Correct it")
    if "://" in path or path.startswith("data:"):
        raise DataError(
            f"the path of a part of type {kind} is a URL ({path[:60]}), and nothing is fetched. "
            "Download the file and give its path, relative to the data file"
        )
    start, end = cut_of(part)
    alt = part.get("alt")
    if alt is not None and not isinstance(alt, str):
        raise DataError(
            f'a part of type {kind} has {_kind(alt)} as "alt", which is a text. Correct it, or leave it out'
        )
    whole = base / _unbroken(path, "path")
    return MediaItem(kind, path=whole, alt=_unbroken(alt or "", "alt"), start_s=start, end_s=end)


def cut_of(part: dict[str, Any]) -> tuple[float, float | None]:
    """Where the cut that a part asks for begins and ends, in seconds: its keys ``start`` and ``end``; null is none.

    Raises:
        DataError: One of them is no number.
    """
    start, end = _time_s(part, "start"), _time_s(part, "end")
    return 0.0 if start is None else start, end


def _time_s(part: dict[str, Any], key: str) -> float | None:
    value = part.get(key)
    if value is None:
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise DataError(
            f'a part of type {part.get("type")} has {_kind(value)} as "{key}", which is a time in seconds. '
            "Give a number, or leave it out"
        )
    return float(value) if abs(value) < 1e9 else math.inf
