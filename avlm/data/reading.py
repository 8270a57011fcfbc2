"""All rows of a source, and all media in them, in columns of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from avlm.config.media import MediaSpec
from avlm.data.conversations import odd
from avlm.data.duplicates import mixed
from avlm.data.files import Limits
from avlm.data.look import Look, look, media_key, number_of
from avlm.data.rows import KINDS, RowSource
from avlm.data.sketch import BANDS, text_bands
from avlm.data.spread import Progress, spread
from avlm.errors import DataError
from avlm.samples import MediaItem, Sample, Text

__all__ = ["KINDS", "Media", "Rows", "look_at_media", "read_rows"]


@dataclass(slots=True)
class Rows:
    """The rows of one source.

    Attributes:
        text, asked: uint64 [rows], of all that is said, and of all but the answers, without the media.
        id: uint64 [rows]; 0 where a row has no id of its own.
        bands: uint32 [rows, bands], by which near texts are found.
        characters: int32 [rows], of all that is said.
        row, at, key, kind: Of every medium in every row: the row's number, which medium of the row, a number for where
            it is from, and its kind's number in `KINDS`.
    """

    source: RowSource
    text: np.ndarray
    asked: np.ndarray
    id: np.ndarray
    bands: np.ndarray
    characters: np.ndarray
    row: np.ndarray
    at: np.ndarray
    key: np.ndarray
    kind: np.ndarray
    odd: list[tuple[Any, str, int, str]] = field(default_factory=list)
    """How bad, of which kind, the row, and the message."""

    def __len__(self) -> int:
        return len(self.text)

    def where(self, row: int) -> str:
        return self.source.where(int(row))


@dataclass(slots=True)
class _Read:
    """Columns of a part of the rows, and what is odd about them."""

    rows: list[tuple[int, int, int, int]]
    bands: list[np.ndarray]
    media: list[tuple[int, int, int, int]]
    odd: list[tuple[Any, str, int, str]]


@dataclass(slots=True)
class ReadRows:
    """Read rows: a `spread.Work`."""

    source: RowSource
    markers: Sequence[str]

    def begin(self) -> None:
        """Nothing is to be made ready."""

    def __call__(self, rows: Sequence[int]) -> _Read:
        found = _Read([], [], [], [])
        for row in rows:
            try:
                sample = self.source[row]
                entry, bands, media = _numbers(sample, row)
            except DataError as error:
                self._take_empty(found, ("error", error.reason, row, error.reason))
                continue
            found.rows.append(entry)
            found.bands.append(bands)
            found.media += media
            found.odd += [(severity, title, row, text) for severity, title, text in odd(sample, self.markers)]
        return found

    def _take_empty(self, found: _Read, why: tuple[Any, str, int, str]) -> None:
        found.rows.append((0, 0, 0, 0))
        found.bands.append(np.zeros(BANDS, np.uint32))
        found.odd.append(why)

    def broken(self, row: int) -> _Read:
        found = _Read([], [], [], [])
        message = "the process that read this row died of it. Look at it by hand, or remove it"
        self._take_empty(found, ("error", "a row that kills the process that reads it", row, message))
        return found


def _numbers(sample: Sample, row: int) -> tuple[tuple[int, int, int, int], np.ndarray, list[tuple[int, int, int, int]]]:
    """A row's columns, the bands of its text, and its media."""
    said, asked, words = [], [], []
    for turn in sample.turns:
        text = "".join(part.text if isinstance(part, Text) else f"\0{part.kind}\0" for part in turn.parts)
        said.append(f"{turn.role}\1{text}")
        if turn.role != "assistant":
            asked.append(said[-1])
        words += [part.text for part in turn.parts if isinstance(part, Text)]
    own = 0 if sample.id == sample.where else _number(sample.id)
    media = [(row, at, media_key(item), KINDS.index(item.kind)) for at, item in enumerate(sample.media())]
    entry = (_number("\2".join(said)), _number("\2".join(asked)), own, sum(map(len, words)))
    return entry, text_bands("\n".join(words)), media


def _number(text: str) -> int:
    return number_of(text.encode(errors="surrogatepass"))


def read_rows(source: RowSource, markers: Sequence[str], *, workers: int, progress: Progress | None, name: str) -> Rows:
    """Read every row of a source.

    Args:
        markers: What no text may spell.
    """
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    strange: list[tuple[Any, str, int, str]] = []
    work = ReadRows(source, markers)
    few = 0 if len(source) < 2000 else workers  # processes take longer to start
    for read in spread(work, range(len(source)), workers=few, part=500, name=name, progress=progress):
        media = np.array(read.media, np.uint64).reshape(-1, 4)
        parts.append((np.array(read.rows, np.uint64), np.array(read.bands, np.uint32), media))
        strange += read.odd
    columns, bands, media = (np.concatenate([part[i] for part in parts]) for i in range(3))
    return Rows(
        source,
        columns[:, 0],
        columns[:, 1],
        columns[:, 2],
        bands,
        columns[:, 3].astype(np.int32),
        media[:, 0].astype(np.int32),
        media[:, 1].astype(np.int32),
        media[:, 2],
        media[:, 3].astype(np.uint8),
        strange,
    )


# ---------------------------------------------------------------- media


@dataclass(slots=True)
class Media:
    """Every medium of one or two sets of rows, once.

    Attributes:
        kind: uint8 [media].
        digest, sketch, size_px, seconds: As in `Look`.
        number: For each set, which medium each entry of its `Rows.row` is.
        problem, odd: By medium, as in `Look`.
    """

    sets: Sequence[Rows]
    kind: np.ndarray
    number: list[np.ndarray]
    digest: np.ndarray
    sketch: np.ndarray
    size_px: np.ndarray
    seconds: np.ndarray
    problem: dict[int, str] = field(default_factory=dict)
    odd: dict[int, str] = field(default_factory=dict)
    _sorted: list[np.ndarray] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.kind)

    def count(self, which: int) -> np.ndarray:
        """In how many places of a set each medium is: int [media]."""
        found: np.ndarray = np.bincount(self.number[which], minlength=len(self))
        return found

    def rows_with(self, number: int, which: int) -> list[tuple[int, int]]:
        """Rows of a set that have a medium, and which of their media it is."""
        if not self._sorted:
            self._sorted = [np.argsort(numbers, kind="stable") for numbers in self.number]
        order, numbers = self._sorted[which], self.number[which]
        first, last = np.searchsorted(numbers, [number, number + 1], sorter=order)
        rows = self.sets[which]
        return [(int(rows.row[i]), int(rows.at[i])) for i in order[first:last]]

    def place(self, number: int, which: int | None = None) -> str:
        """What to call a medium: its name, and the first row that has it."""
        for i in range(len(self.sets)) if which is None else [which]:
            found = self.rows_with(number, i)
            if found:
                row, at = found[0]
                return f"{self.sets[i].source[row].media()[at].name()} ({self.sets[i].where(row)})"
        raise AssertionError("a medium is in some row")

    def item(self, number: int) -> MediaItem:
        for i, rows in enumerate(self.sets):
            found = self.rows_with(number, i)
            if found:
                return rows.source[found[0][0]].media()[found[0][1]]
        raise AssertionError("a medium is in some row")

    def of_rows(self, which: int) -> np.ndarray:
        """uint64 [rows]: a number for the media of each row of a set, in their order."""
        rows = self.sets[which]
        one = mixed(self.known()[self.number[which]], rows.at.astype(np.uint64) + np.uint64(1))
        total = np.zeros(len(rows), np.uint64)
        np.add.at(total, rows.row, one)
        return total

    def known(self) -> np.ndarray:
        """uint64 [media]: what it holds, or where it is from if it was not read."""
        keys = np.zeros(len(self), np.uint64)
        for rows, numbers in zip(self.sets, self.number, strict=True):
            keys[numbers] = rows.key
        return np.where(self.digest == 0, keys, self.digest)


@dataclass(slots=True)
class LookAtMedia:
    """Look at media: a `spread.Work`.

    Attributes:
        which, row, at: Of each medium the set, the row and its number there.
    """

    sources: Sequence[RowSource]
    which: np.ndarray
    row: np.ndarray
    at: np.ndarray
    limits: Limits
    media: MediaSpec
    decode: bool

    def begin(self) -> None:
        """Nothing is to be made ready."""

    def __call__(self, rows: Sequence[int]) -> list[Look]:
        return [self._look(number) for number in rows]

    def _look(self, number: int) -> Look:
        try:
            item = self.sources[int(self.which[number])][int(self.row[number])].media()[int(self.at[number])]
        except DataError as error:
            return Look(problem=error.reason)
        if self.decode:
            return look(item, self.limits, self.media)
        from avlm.data.look import glance

        return glance(item, self.limits, self.media)

    def broken(self, row: int) -> list[Look]:
        return [Look(problem="a decoder died of it, and the process with it. Replace the file, or remove it")]


def look_at_media(
    sets: Sequence[Rows],
    limits: Limits,
    media: MediaSpec,
    *,
    decode: bool,
    workers: int,
    progress: Progress | None,
) -> Media:
    """Look at every medium of some sets of rows once."""
    keys = np.concatenate([rows.key for rows in sets])
    _, first, number = np.unique(keys, return_index=True, return_inverse=True)
    order = np.argsort(first)  # as the rows have them, so that files are read from front to back
    renumbered = np.empty(len(order), np.int64)
    renumbered[order] = np.arange(len(order))
    number, first = renumbered[number], first[order]
    which = np.concatenate([np.full(len(rows.key), i, np.uint8) for i, rows in enumerate(sets)])[first]
    row, at, kind = (np.concatenate([getattr(rows, name) for rows in sets])[first] for name in ("row", "at", "kind"))
    borders = np.cumsum([len(rows.key) for rows in sets])[:-1]
    found = Media(
        sets,
        kind,
        np.split(number, borders),
        np.zeros(len(first), np.uint64),
        np.zeros((len(first), 2), np.uint64),
        np.zeros((len(first), 2), np.int32),
        np.zeros(len(first), np.float32),
    )
    work = LookAtMedia([rows.source for rows in sets], which, row, at, limits, media, decode)
    done = 0
    name = "media decoded" if decode else "headers of media"
    few = 0 if len(first) < 50 else workers
    for looks in spread(work, range(len(first)), workers=few, part=16, name=name, progress=progress):
        for each in looks:
            _take(found, done, each)
            done += 1
    return found


def _take(media: Media, number: int, each: Look) -> None:
    media.digest[number], media.sketch[number] = each.digest, each.sketch
    media.size_px[number], media.seconds[number] = each.size_px, each.seconds
    if each.problem:
        media.problem[number] = each.problem
    elif each.odd:
        media.odd[number] = each.odd
