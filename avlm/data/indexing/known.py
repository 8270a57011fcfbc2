"""Facts of media that were measured before, so that no header is read twice.

A medium is known by where it lies and by its size and time of change there; one that is given as bytes by those. So
the facts outlive every change of tokenizer, template and stage. The file may be read and written by several processes.
"""

from __future__ import annotations

import hashlib
import sqlite3
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from avlm.config.media import MediaSpec
from avlm.data.decoding.files import Limits
from avlm.layout import AudioFacts, Facts, ImageFacts, VideoFacts
from avlm.samples import MediaItem

VERSION = 3
"""Raised whenever headers come to be read otherwise; what was noted before is forgotten then."""
AT_ONCE = 500
WAIT_S = 60.0
"""How long one process waits for another that is writing."""

UNREADABLE = (sqlite3.DatabaseError, UnicodeDecodeError)
"""What comes of a table that is damaged; sqlite's message may itself hold bytes of it."""

Identity = tuple[Any, ...]


def identity(item: MediaItem) -> tuple[Identity | None, int]:
    """What a medium is known by, and its bytes; None where nothing would show that it has changed."""
    cut = item.kind, item.span, item.start_s, item.end_s
    if item.decoded is not None:
        return None, 0
    if item.data is not None:
        return (*cut, hashlib.blake2b(item.data, digest_size=16).hexdigest()), len(item.data)
    if item.path is None:
        return (*cut, item.url) if item.url else None, 0
    try:
        info = item.path.stat()
    except OSError:
        return None, 0
    size = info.st_size if item.span is None else item.span[1]
    return (*cut, str(item.path), info.st_size, info.st_mtime_ns), size


class FactsKeys:
    """Under what the facts of media are noted: what each is known by, and what of the model and the limits counts.

    Args:
        media: What the model sees and hears.
        limits: Under which media are measured.
    """

    def __init__(self, media: MediaSpec, limits: Limits) -> None:
        hears_hz = 0 if media.audio is None else media.audio.sample_rate_hz
        rates_hz = {"image": 0, "audio": hears_hz, "video": 0 if media.video.order == "video" else hears_hz}
        self._begun = {kind: _hash(repr((rate_hz, limits))) for kind, rate_hz in rates_hz.items()}
        """By kind, a digest of what is the same for all media; limits take longer to write than to hash."""

    def key(self, known_by: Identity) -> bytes:
        """The key of a medium."""
        hashed = self._begun[known_by[0]].copy()
        hashed.update(repr(known_by).encode(errors="replace"))
        return hashed.digest()


def _hash(text: str) -> hashlib.blake2b:
    return hashlib.blake2b(text.encode(errors="replace"), digest_size=16)


class KnownFacts:
    """A table of facts on the disk. It saves time and holds nothing that could not be measured again: what is damaged
    is forgotten, and while another process holds the table for long, it is done without.

    Args:
        path: Its file; one of another version is begun anew.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with suppress(*UNREADABLE), self._forgetting():
            self._open()

    def _open(self) -> None:
        with closing(self._connection()) as table, table:
            if table.execute("pragma user_version").fetchone() != (VERSION,):
                table.execute("begin immediate")  # all at once, as each change by itself waits for the disk
                table.execute("drop table if exists facts")
                table.execute(f"pragma user_version = {VERSION}")
            table.execute("create table if not exists facts (key blob primary key, kind text, a, b, sum) without rowid")

    def _connection(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, timeout=WAIT_S)

    @contextmanager
    def _forgetting(self) -> Iterator[None]:
        """Begin the file anew if it turns out to be damaged.

        Raises:
            DatabaseError, UnicodeDecodeError: What was to be done with it was not done.
        """
        try:
            yield
        except UNREADABLE as error:
            if "locked" not in str(error):
                self.path.unlink(missing_ok=True)
                self._open()
            raise

    def find(self, keys: Collection[bytes]) -> dict[bytes, Facts]:
        """Those of some media that are known."""
        wanted, found = list(keys), {}
        if not wanted:
            return {}
        with suppress(*UNREADABLE), self._forgetting(), closing(self._connection()) as table:
            for first in range(0, len(wanted), AT_ONCE):
                some = wanted[first : first + AT_ONCE]
                marks = ",".join("?" * len(some))
                for key, *row, noted in table.execute(f"select * from facts where key in ({marks})", some):
                    if noted == _sum(key, row):
                        found[key] = _facts(*row)
        return found

    def add(self, facts: Mapping[bytes, Facts]) -> None:
        """Note what was measured."""
        if facts:
            rows = [(key, *(row := _row(found)), _sum(key, row)) for key, found in facts.items()]
            with suppress(*UNREADABLE), self._forgetting(), closing(self._connection()) as table, table:
                table.executemany("insert or replace into facts values (?, ?, ?, ?, ?)", rows)


def _sum(key: bytes, row: Sequence[Any]) -> int:
    """A check sum: a table whose bytes have changed is not always one that sqlite refuses."""
    return zlib.crc32(repr(tuple(row)).encode(errors="replace"), zlib.crc32(key))


def _row(facts: Facts) -> tuple[str, float, int]:
    if isinstance(facts, ImageFacts):
        return "image", *facts.size_px
    if isinstance(facts, AudioFacts):
        return "audio", facts.num_samples, 0
    return "video", facts.duration_s, facts.num_samples


def _facts(kind: str, a: float, b: int) -> Facts:
    if kind == "image":
        return ImageFacts((int(a), b))
    return AudioFacts(int(a)) if kind == "audio" else VideoFacts(float(a), b)
