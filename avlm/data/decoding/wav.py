"""Headers of WAV files: what they announce, and what a program left out that could not go back to write it."""

from __future__ import annotations

import io
import struct
from typing import Any, BinaryIO

MOST_CHUNKS = 10_000
"""A file may be made of millions of empty ones, which is no recording."""


def missing_wav_bytes(file: BinaryIO) -> int:
    """How many bytes of sound a WAV header announces beyond the end of the file (0 for other formats)."""
    found = _sound(file)
    return 0 if found is None or _was_streamed(file, found[1]) else max(0, sum(found) - _size(file))


def with_length(file: BinaryIO) -> BinaryIO:
    """The file from its beginning; a streamed WAV file with the length of its sound, where it says 0."""
    found = _sound(file)
    streamed = found is not None and found[1] == 0 and _was_streamed(file, 0)
    file.seek(0)
    if found is None or not streamed:
        return file
    count = struct.pack("<I", min(_size(file) - found[0], 2**32 - 1))
    return io.BufferedReader(_Patched(file, found[0] - 4, count))


class _Patched(io.RawIOBase):
    """A file of which some bytes read as others."""

    def __init__(self, file: BinaryIO, at: int, patch: bytes) -> None:
        self.file, self.at, self.patch = file, at, patch
        file.seek(0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self.file.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        begin = self.file.tell()
        found = bytearray(self.file.read(len(buffer)))
        for place, byte in enumerate(self.patch, self.at - begin):
            if 0 <= place < len(found):
                found[place] = byte
        buffer[: len(found)] = found
        return len(found)


def _sound(file: BinaryIO) -> tuple[int, int] | None:
    """Where the sound of a WAV file begins, and how many bytes its header announces."""
    file.seek(0)
    head = file.read(12)
    if head[:4] != b"RIFF" or head[8:12] != b"WAVE":
        return None
    at = 12
    for _ in range(MOST_CHUNKS):
        if len(chunk := file.read(8)) < 8:
            return None
        name, size = struct.unpack("<4sI", chunk)
        if name == b"data":
            return at + 8, size
        at += 8 + size + size % 2
        file.seek(at)
    raise ValueError(f"more than {MOST_CHUNKS} chunks")


def _was_streamed(file: BinaryIO, announced: int) -> bool:
    """Whether a WAV file is by a program that could not go back to fill its lengths in (sox, ffmpeg into a pipe)."""
    file.seek(4)
    (whole,) = struct.unpack("<I", file.read(4))
    return announced >= 0x7FFF0000 or (announced == 0 and whole != _size(file) - 8)


def _size(file: BinaryIO) -> int:
    return file.seek(0, io.SEEK_END)
