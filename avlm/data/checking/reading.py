"""All rows of a source, and all media in them, in columns of numbers."""

from __future__ import annotations

import pickle
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from avlm.config.media import MediaSpec
from avlm.data.checking.conversations import Odd, odd
from avlm.data.checking.duplicates import mixed
from avlm.data.checking.look import Look, glance, look, media_key, number_of
from avlm.data.checking.problems import title_of
from avlm.data.checking.sketch import BANDS, text_bands
from avlm.data.decoding.files import Limits
from avlm.data.rows import KINDS, RowSource
from avlm.data.workers.spread import Progress, spread
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


class _Read(NamedTuple):
    """A row's columns, its media, and what is odd about it."""

    entry: tuple[int, int, int, int]
    bands: bytes
    media: list[tuple[int, int, int, int]]
    odd: list[Odd]


@dataclass(slots=True)
class ReadRow:
    """Read one row, in any process."""

    source: RowSource
    markers: Sequence[str]

    def __call__(self, row: int) -> _Read:
        try:
            sample = self.source[row]
            entry, bands, media = _numbers(sample, row)
        except DataError as error:
            return _unread("error", title_of(error.reason), error.reason)
        return _Read(entry, bands.tobytes(), media, list(odd(sample, self.markers)))


def _unread(*why: Any) -> _Read:
    return _Read((0, 0, 0, 0), np.zeros(BANDS, np.uint32).tobytes(), [], [(why[0], why[1], why[2])])


def _lost_row(row: int, why: str) -> _Read:
    return _unread("error", "a row that cannot be read in time, or kills the process that reads it", why)


def _numbers(sample: Sample, row: int) -> tuple[tuple[int, int, int, int], np.ndarray, list[tuple[int, int, int, int]]]:
    """A row's columns, the bands of its text, and its media."""
    said, asked, words = [], [], []
    for turn in sample.turns:
        text = "".join(part.text if isinstance(part, Text) else f"\0{part.kind}\0" for part in turn.parts)
        said.append(f"{turn.role}\1{text}")
        if turn.role != "assistant":
            asked.append(said[-1])
        words += [part.text for part in turn.parts if isinstance(part, Text)]
    if sample.rejected is not None:  # a better answer may stand against several worse ones
        words.append(sample.rejected.text())
        said.append(f"rejected\1{words[-1]}")
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
    entries, bands = array("Q"), bytearray()
    media, strange = array("Q"), list[tuple[Any, str, int, str]]()
    read = spread(
        ReadRow(own(source), markers),
        range(len(source)),
        lost=_lost_row,
        workers=workers,
        part=500,
        name=name,
        progress=progress,
    )
    for row, each in enumerate(read):
        entries.extend(each.entry)
        bands += each.bands
        for medium in each.media:
            media.extend(medium)
        strange += [(severity, title, row, message) for severity, title, message in each.odd]
    columns = np.array(entries, np.uint64).reshape(-1, 4)
    of_media = np.array(media, np.uint64).reshape(-1, 4)
    return Rows(
        source,
        columns[:, 0],
        columns[:, 1],
        columns[:, 2],
        np.frombuffer(bands, np.uint32).reshape(-1, BANDS),
        columns[:, 3].astype(np.int32),
        of_media[:, 0].astype(np.int32),
        of_media[:, 1].astype(np.int32),
        of_media[:, 2],
        of_media[:, 3].astype(np.uint8),
        strange,
    )


def own(source: RowSource) -> RowSource:
    """A source for other processes: with no file open that this one reads too."""
    copy: RowSource = pickle.loads(pickle.dumps(source, protocol=5))
    return copy


# ---------------------------------------------------------------- media


@dataclass(slots=True)
class FindMedia:
    """The media of some sources by number, in any process.

    Attributes:
        which, row, at: Of each medium the source, the row and its number there.
    """

    sources: Sequence[RowSource]
    which: np.ndarray
    row: np.ndarray
    at: np.ndarray

    def __call__(self, number: int) -> MediaItem:
        sample = self.sources[int(self.which[number])][int(self.row[number])]
        return sample.media()[int(self.at[number])]


@dataclass(slots=True)
class Media:
    """Every medium of one or two sets of rows, once.

    Attributes:
        kind: uint8 [media].
        digest, sketch, size_px, seconds: As in `Look`.
        number: For each set, which medium each entry of its `Rows.row` is.
        find: Gives a medium by its number.
        problem, odd: By medium, as in `Look`.
    """

    sets: Sequence[Rows]
    kind: np.ndarray
    number: list[np.ndarray]
    find: FindMedia
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
class LookAtMedium:
    """Look at one medium, in any process."""

    find: FindMedia
    limits: Limits
    media: MediaSpec
    decode: bool

    def __call__(self, number: int) -> Look:
        try:
            item = self.find(number)
        except DataError as error:
            return Look(problem=error.reason)
        return look(item, self.limits, self.media) if self.decode else glance(item, self.limits)


def _lost_medium(number: int, why: str) -> Look:
    return Look(problem=why)


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
    _, first, place = np.unique(keys, return_index=True, return_inverse=True)
    order = np.argsort(first)  # as the rows have them, so that files are read from front to back
    renumbered = np.empty(len(order), np.int64)
    renumbered[order] = np.arange(len(order))
    place, first = renumbered[place], first[order]
    which = np.concatenate([np.full(len(rows.key), i, np.uint8) for i, rows in enumerate(sets)])[first]
    row, at, kind = (np.concatenate([getattr(rows, name) for rows in sets])[first] for name in ("row", "at", "kind"))
    borders = np.cumsum([len(rows.key) for rows in sets])[:-1]
    found = Media(
        sets,
        kind,
        np.split(place, borders),
        FindMedia([own(rows.source) for rows in sets], which, row, at),
        np.zeros(len(first), np.uint64),
        np.zeros((len(first), 2), np.uint64),
        np.zeros((len(first), 2), np.int32),
        np.zeros(len(first), np.float32),
    )
    looks = spread(
        LookAtMedium(found.find, limits, media, decode),
        range(len(first)),
        lost=_lost_medium,
        workers=workers,
        part=16,
        name="media decoded" if decode else "headers of media",
        progress=progress,
    )
    for number, each in enumerate(looks):
        _take(found, number, each)
    return found


def _take(media: Media, number: int, each: Look) -> None:
    media.digest[number], media.sketch[number] = each.digest, each.sketch
    media.size_px[number], media.seconds[number] = each.size_px, each.seconds
    if each.problem:
        media.problem[number] = each.problem
    elif each.odd:
        media.odd[number] = each.odd
