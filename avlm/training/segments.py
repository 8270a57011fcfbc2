"""Tensors by key in a folder that many processes read and write at once.

    <name>.data    tensors end to end, each on a border of 64 bytes
    <name>.index   an entry of fixed length for each, written when its tensor is whole

Only the process that made a segment appends to it, under a name that no other has, so nobody waits for anybody. An
entry says where its tensor stands and what its checksum is, and has a checksum of its own: of a process that was killed
there is nothing but whole entries to see, and a byte that changed makes a tensor one that is not there. What is removed
is a whole segment; whoever still reads it goes on reading it, as its memory map holds it.
"""

from __future__ import annotations

import mmap
import os
import shutil
import struct
import time
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

BORDER = 64
"""Bytes: every tensor begins at a multiple, as in memory."""
SHARE = 16
"""The folder is at least so many segments large, and the least recently used one goes."""
MOST = 256 * 2**20
"""Bytes of a segment, however large the folder."""
TOUCHED_S = 30.0
"""A segment that is read is marked as used this often."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ENTRY = struct.Struct("<16sQIIIII")
"""Key, first byte, rows, columns, number of the dtype, checksum of the tensor, checksum of the entry."""
KEY_BYTES = 16


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor stands."""

    segment: str
    start: int
    rows: int
    columns: int
    dtype: torch.dtype
    checksum: int

    @property
    def end(self) -> int:
        return self.start + self.rows * self.columns * self.dtype.itemsize


class Segments:
    """Tensors by key, in one of the folders that share a limit.

    Args:
        folder: Of tensors that are read together; made when the first one is written.
        most_bytes: Of `folder` and its neighbours in the same parent together.
    """

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self.folder, self.most_bytes = folder, most_bytes
        self.damaged = 0
        """Tensors whose checksum was not theirs."""
        self.trouble: OSError | None = None
        """Why nothing is written any more."""
        self.full = False
        """Whether nothing is written any more because all that is there is in use."""
        self._segment_bytes = max(1, min(MOST, most_bytes // SHARE))
        self._began = time.time()
        self._entries: dict[bytes, Entry] = {}
        self._read_to: dict[str, int] = {}
        self._maps: dict[str, mmap.mmap] = {}
        self._touched: dict[str, float] = {}
        self._own: _OwnSegment | None = None

    def keys(self) -> list[bytes]:
        """Of all that was seen here."""
        return list(self._entries)

    def read(self, key: bytes) -> Tensor | None:
        """The tensor of a key, mapped from its file and checked; None where there is none that is whole."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        mapped = self._mapped(entry)
        if mapped is None or zlib.crc32(memoryview(mapped)[entry.start : entry.end]) != entry.checksum:
            self.damaged += mapped is not None
            del self._entries[key]
            return None
        self._touch(entry.segment)
        found = torch.frombuffer(mapped, dtype=entry.dtype, count=entry.rows * entry.columns, offset=entry.start)
        return found.view(entry.rows, entry.columns)

    def write(self, key: bytes, tensor_nC: Tensor) -> bool:
        """Keep a tensor (n, C) for everybody.

        Returns:
            False where it is not kept: there is no room, the disk is full or read-only, or it is empty.
        """
        data = _bytes(tensor_nC)
        if self.trouble is not None or self.full or not 0 < len(data) <= self._segment_bytes:
            return False
        try:
            own = self._writable(len(data))
            if own is None:
                return False
            self._entries[key] = own.append(key, tensor_nC, data)
        except OSError as error:
            self.trouble = error
            self.close()
            return False
        return True

    def refresh(self) -> None:
        """See what others wrote and removed meanwhile."""
        there = {path.stem: path for path in _indices(self.folder)}
        for name, path in there.items():
            if self._own is None or name != self._own.name:
                self._read_index(name, path)
        for name in self._maps.keys() - there.keys():
            del self._maps[name]  # the disk has its room back as soon as nobody maps it

    def close(self) -> None:
        """Write no more."""
        if self._own is not None:
            self._own.close()
            self._own = None

    # ------------------------------------------------------------ reading

    def _read_index(self, name: str, path: Path) -> None:
        """Entries of a segment that came since the last time, up to one that is not whole."""
        start = self._read_to.get(name, 0)
        try:
            with path.open("rb") as file:
                file.seek(start)
                data = file.read()
        except OSError:  # removed a moment ago, or not ours to read
            return
        for raw in (data[at : at + _ENTRY.size] for at in range(0, len(data), _ENTRY.size)):
            found = _parse(raw, name)
            if found is None:
                return
            key, entry = found
            self._entries[key] = entry
            start += _ENTRY.size
            self._read_to[name] = start

    def _mapped(self, entry: Entry) -> mmap.mmap | None:
        """The file of an entry as memory, shared with all who read it; None where it is gone or too short."""
        mapped = self._maps.get(entry.segment)
        if mapped is None:
            try:
                with (self.folder / f"{entry.segment}.data").open("rb") as file:
                    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            except (OSError, ValueError):  # removed, or empty
                return None
            self._maps[entry.segment] = mapped
        return mapped if entry.end <= len(mapped) else None

    def _touch(self, segment: str) -> None:
        now = time.monotonic()
        if now - self._touched.get(segment, -TOUCHED_S) >= TOUCHED_S:
            self._touched[segment] = now
            with suppress(OSError):
                os.utime(self.folder / f"{segment}.data")

    # ------------------------------------------------------------ writing

    def _writable(self, size: int) -> _OwnSegment | None:
        """A segment of this process with room for so many bytes; None where the folder has none."""
        if self._own is not None and self._own.fits(size):
            return self._own
        self.close()
        root = self.folder.parent
        self.folder.mkdir(parents=True, exist_ok=True)
        with _alone(root):
            if not self._make_room(root):
                self.full = True
                return None
            self._own = _OwnSegment(self.folder, self._segment_bytes)
        return self._own

    def _make_room(self, root: Path) -> bool:
        """Remove the least recently used segments until another one fits; none that was used since this began."""
        segments = sorted(_segments(root))
        held = sum(size for _, size, _ in segments)
        limit = min(self.most_bytes, (held + shutil.disk_usage(root).free) // 2)
        for used, size, path in segments:
            if held + self._segment_bytes <= limit or used >= self._began:
                break
            for file in (path.with_suffix(".index"), path):
                file.unlink(missing_ok=True)
            held -= size
        return held + self._segment_bytes <= limit


class _OwnSegment:
    """A segment that this process appends to. While it does, the file is as large as it may become, so that all who
    count the folder count that."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self.name = uuid.uuid4().hex
        self.most_bytes = most_bytes
        self.end = 0
        self.data = (folder / f"{self.name}.data").open("xb", buffering=0)
        self.data.truncate(most_bytes)
        self.index = (folder / f"{self.name}.index").open("xb", buffering=0)

    def fits(self, size: int) -> bool:
        """Whether there is room, and the file still has a name."""
        return self.end + size <= self.most_bytes and os.fstat(self.data.fileno()).st_nlink > 0

    def append(self, key: bytes, tensor_nC: Tensor, data: memoryview) -> Entry:
        """Write a tensor, and then its entry.

        Raises:
            OSError: The disk is full or broken; there is no entry.
        """
        rows, columns = tensor_nC.shape
        entry = Entry(self.name, self.end, rows, columns, tensor_nC.dtype, zlib.crc32(data))
        self.data.seek(entry.start)
        left = data
        while left:
            left = left[self.data.write(left) :]
        self.index.write(_unparse(key, entry))
        self.end = -(-entry.end // BORDER) * BORDER
        return entry

    def close(self) -> None:
        """Give back the room that was not needed."""
        with suppress(OSError):
            self.data.truncate(self.end)
        self.data.close()
        self.index.close()


def _unparse(key: bytes, entry: Entry) -> bytes:
    numbers = entry.start, entry.rows, entry.columns, DTYPES.index(entry.dtype), entry.checksum
    return _ENTRY.pack(key, *numbers, zlib.crc32(_ENTRY.pack(key, *numbers, 0)))


def _parse(raw: bytes, segment: str) -> tuple[bytes, Entry] | None:
    """Key and entry; None where it is half written, or not what was written."""
    if len(raw) < _ENTRY.size:
        return None
    key, *numbers, checksum = _ENTRY.unpack(raw)
    if zlib.crc32(_ENTRY.pack(key, *numbers, 0)) != checksum:
        return None
    start, rows, columns, dtype, data_checksum = numbers
    return key, Entry(segment, start, rows, columns, DTYPES[dtype], data_checksum)


def _bytes(tensor: Tensor) -> memoryview:
    if tensor.dtype not in DTYPES or tensor.numel() == 0:
        return memoryview(b"")
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _indices(folder: Path) -> list[Path]:
    """Indices of a folder, the one that grew last at the end: of two entries of one key the later one holds."""
    found = []
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(".index"):
                with suppress(OSError):  # removed a moment ago
                    found.append((entry.stat().st_mtime, Path(entry.path)))
    return [path for _, path in sorted(found)]


def _segments(root: Path) -> Iterator[tuple[float, int, Path]]:
    """When each segment was last used, its bytes, and its file."""
    for path in root.glob("*/*.data"):
        with suppress(OSError):  # removed a moment ago
            found = path.stat()
            yield found.st_mtime, found.st_size, path


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """No other process makes room in the folder meanwhile, where the file system has locks."""
    with (root / ".lock").open("a") as lock:
        with suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(lock.fileno(), fcntl.LOCK_EX)
        yield
