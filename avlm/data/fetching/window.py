"""A stretch of a file as a file by itself, of which no more is read than is asked for."""

from __future__ import annotations

import io
from typing import Any, BinaryIO


def window(file: BinaryIO, first: int, count: int, *, own: bool = True) -> BinaryIO:
    """A stretch of a file, at its beginning.

    Args:
        first: Its first byte.
        count: Its bytes.
        own: Whether closing it closes the file.
    """
    return io.BufferedReader(_Window(file, first, count, own), 2**16)


class _Window(io.RawIOBase):
    def __init__(self, file: BinaryIO, first: int, count: int, own: bool) -> None:
        self._file, self._first, self._count, self._own, self._at = file, first, count, own, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._count}[whence]
        if at < 0:
            raise ValueError("a place before the beginning")
        self._at = at
        return at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._first + self._at)
        found = self._file.read(max(0, min(len(buffer), self._count - self._at)))
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)

    def readall(self) -> bytes:
        """The rest, at once."""
        self._file.seek(self._first + self._at)
        found = self._file.read(max(0, self._count - self._at))
        self._at += len(found)
        return found

    def close(self) -> None:
        if self._own and not self.closed:
            self._file.close()
        super().close()
