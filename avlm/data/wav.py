"""Headers of WAV files: what they announce, and what a program left out that could not go back to write it."""

from __future__ import annotations

import io
import struct
from typing import BinaryIO


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
    data = file.read()
    return io.BytesIO(data[: found[0] - 4] + struct.pack("<I", len(data) - found[0]) + data[found[0] :])


def _sound(file: BinaryIO) -> tuple[int, int] | None:
    """Where the sound of a WAV file begins, and how many bytes its header announces."""
    file.seek(0)
    head = file.read(12)
    if head[:4] != b"RIFF" or head[8:12] != b"WAVE":
        return None
    at = 12
    while len(chunk := file.read(8)) == 8:
        name, size = struct.unpack("<4sI", chunk)
        if name == b"data":
            return at + 8, size
        at += 8 + size + size % 2
        file.seek(at)
    return None


def _was_streamed(file: BinaryIO, announced: int) -> bool:
    """Whether a WAV file is by a program that could not go back to fill its lengths in (sox, ffmpeg into a pipe)."""
    file.seek(4)
    (whole,) = struct.unpack("<I", file.read(4))
    return announced >= 0x7FFF0000 or (announced == 0 and whole != _size(file) - 8)


def _size(file: BinaryIO) -> int:
    return file.seek(0, io.SEEK_END)
