"""A folder that keeps what was fetched: one file for each URL, checked by its digest whenever it is read.

A file is written aside and put in its place by a rename, so many threads and processes share a folder without a lock:
of two that fetch one URL the later one replaces the earlier one's file, and whoever reads that goes on reading it. Each
file says at its end what it is, which is how damage, and a file under the name of another, are seen.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import stat
import struct
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from avlm.data.fetching.addresses import Hop
from avlm.data.fetching.window import window

MAGIC = b"avlm-kept-1"
_END = struct.Struct(f"<Q{len(MAGIC)}s")
"""Behind the facts of a file: their length, and what kind of file it is."""
_FOLDER, _FILE = re.compile("[0-9a-f]{2}"), re.compile("[0-9a-f]{64}")
_FACTS = 2**16
"""Bytes that the facts may have."""
DRAFT = "avlm-draft-"
"""What the name of a file that is being written begins with."""
STALE_S = 86_400.0
"""A file that was begun this long ago is not being written any more."""
SLACK = 20
"""One part in so many of the folder may be written by a process before it counts again."""


RECHECKED = 2**23
"""A file of at most so many bytes is checked whenever it is read, a larger one once by a process unless it changes."""


@dataclass(slots=True)
class Draft:
    """A file that is being written."""

    file: BinaryIO
    path: str = ""
    """Its name; none where it will not be kept."""

    def drop(self) -> None:
        """Take its name away; what has it open can still read it."""
        if self.path:
            with suppress(OSError):
                os.unlink(self.path)
            self.path = ""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a file says that it is."""

    key: str
    sha256: str
    size: int
    """Bytes of its body."""
    hops: tuple[Hop, ...]


class Cache:
    """What was fetched, in a folder.

    Args:
        folder: Made when something is first kept.
        max_bytes: Of all files. Each process may exceed it by a twentieth for a while; 0 keeps nothing.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self._checked: dict[str, tuple[int, int, int]] = {}
        """Which file was found whole, by key: its number, its last change, its size."""
        self._written: int | None = None
        """Bytes written since the folder was last counted."""

    def find(self, key: str) -> tuple[BinaryIO, tuple[Hop, ...]] | None:
        """What is kept under a key, as a file, with who was asked for it. What is damaged is thrown away."""
        try:
            file = _open(self._path(key))
        except OSError:
            return None
        try:
            facts = self._facts(file, key)
            if facts is None:
                file.close()
                with suppress(OSError):
                    os.unlink(self._path(key))
                return None
            with suppress(OSError):  # when it was last used; a folder that cannot be written keeps its order
                os.utime(self._path(key), ns=(time.time_ns(), os.fstat(file.fileno()).st_mtime_ns))
            return window(file, 0, facts.size), facts.hops
        except BaseException:
            file.close()
            raise

    def new(self) -> Draft:
        """A file to write a body into.

        Raises:
            OSError: The folder cannot be written.
        """
        if not self.max_bytes:
            return self.nameless()
        (self.folder / "new").mkdir(parents=True, exist_ok=True)
        number, path = tempfile.mkstemp(prefix=DRAFT, dir=self.folder / "new")
        return Draft(open(number, "w+b"), path)

    def nameless(self) -> Draft:
        """The same, in the system's folder for temporary files, for what cannot be kept."""
        return Draft(tempfile.TemporaryFile())  # type: ignore[arg-type]

    def keep(self, draft: Draft, facts: Facts) -> None:
        """Put a body that was written into its place.

        Raises:
            OSError: The folder cannot be written.
        """
        if not draft.path or facts.size > self.max_bytes:
            draft.drop()
            return
        text = json.dumps(asdict(facts)).encode()
        draft.file.seek(facts.size)
        draft.file.write(text + _END.pack(len(text), MAGIC))
        draft.file.flush()
        path = self._path(facts.key)
        path.parent.mkdir(exist_ok=True)
        os.replace(draft.path, path)
        draft.path = ""
        self._count(facts.size + len(text) + _END.size)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / key

    def _facts(self, file: BinaryIO, key: str) -> Facts | None:
        """What a file says that it is, if that is so."""
        info = os.fstat(file.fileno())
        now = (info.st_ino, info.st_mtime_ns, info.st_size)
        facts = _read_facts(file, info.st_size)
        if facts is None or facts.key != key:
            return None
        if self._checked.get(key) != now:
            if _digest(file, facts.size) != facts.sha256:
                return None
            if facts.size > RECHECKED:
                self._checked[key] = now
        return facts

    # ------------------------------------------------------------ room

    def _count(self, written: int) -> None:
        """Make room once a process has written enough since it last looked."""
        self._written = None if self._written is None else self._written + written
        if self._written is None or self._written > self.max_bytes // SLACK:
            self._make_room()
            self._written = 0

    def _make_room(self) -> None:
        """Remove what was longest not used until the rest fits, and what was begun long ago."""
        found: list[tuple[int, int, str]] = []
        for entry in self._entries():
            with suppress(OSError):  # another process removed it
                info = entry.stat(follow_symlinks=False)
                if not entry.name.startswith(DRAFT):
                    found.append((info.st_atime_ns, info.st_size, entry.path))
                elif time.time() - info.st_mtime > STALE_S:
                    os.unlink(entry.path)
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.max_bytes:
                return
            with suppress(OSError):
                os.unlink(path)
            total -= size

    def _entries(self) -> Iterator[os.DirEntry[str]]:
        """Files of ours; a folder may hold others."""
        with os.scandir(self.folder) as folders:
            for folder in folders:
                if folder.name == "new" or _FOLDER.fullmatch(folder.name):
                    with suppress(OSError), os.scandir(folder) as files:
                        yield from (f for f in files if f.name.startswith(DRAFT) or _FILE.fullmatch(f.name))


def _open(path: Path) -> BinaryIO:
    """A regular file, never through a link."""
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    file = io.FileIO(os.open(path, flags), "rb")
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise OSError


def _read_facts(file: BinaryIO, size: int) -> Facts | None:
    """What stands behind a body, if it is whole."""
    try:
        file.seek(size - _END.size)
        length, magic = _END.unpack(file.read(_END.size))
        if magic != MAGIC or length > _FACTS:
            return None
        file.seek(size - _END.size - length)
        given = json.loads(file.read(length))
        facts = Facts(given["key"], given["sha256"], given["size"], tuple(Hop(**hop) for hop in given["hops"]))
        return facts if facts.size == size - _END.size - length else None
    except (OSError, ValueError, struct.error, KeyError, TypeError):
        return None


def _digest(file: BinaryIO, size: int) -> str:
    digest = hashlib.sha256()
    body = window(file, 0, size, own=False)
    while block := body.read(2**20):
        digest.update(block)
    return digest.hexdigest()
