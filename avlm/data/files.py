"""Files of media before they are decoded: found, held against limits, opened, and cut by time."""

from __future__ import annotations

import io
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from avlm.config.data import Limits as Limits
from avlm.errors import AvlmError, MediaError
from avlm.samples import MediaItem

LIMITS = Limits()
HIGHEST_HZ = 1_000_000
"""Samples a second; recorders go up to 768 kHz, and a filter from far above takes seconds to be made."""


@contextmanager
def about(item: MediaItem) -> Iterator[None]:
    """Turn whatever a decoder raises into one message about the item."""
    try:
        yield
    except AvlmError:
        raise
    except MemoryError:
        raise MediaError(
            f"{item.name()}: asks for more memory than there is, so it was not decoded. Make it smaller, or replace it"
        ) from None
    except Exception as error:
        kind = type(error).__name__
        raise MediaError(
            f"{item.name()}: not readable as {article(item.kind)} ({kind}). "
            "Replace the file, or remove it from the sample"
        ) from error


def article(kind: str) -> str:
    return {"image": "a picture", "audio": "a recording", "video": "a video"}[kind]


def read(item: MediaItem, limits: Limits) -> bytes:
    """The item's bytes, refused before they are read when they are too many or no file at all.

    Raises:
        MediaError: Missing, no file, empty or too large.
    """
    with opened(item, limits) as file:
        return file.read()


@contextmanager
def opened(item: MediaItem, limits: Limits) -> Iterator[BinaryIO]:
    """The item's bytes as a file to read and to seek in.

    Raises:
        MediaError: Missing, no file, empty or too large.
    """
    if item.data is not None:
        _check_size(item, len(item.data), limits, "decoded. Cut it")
        yield io.BytesIO(item.data)
        return
    if item.path is None:
        raise MediaError(f"a part of type {item.kind} has neither a path nor data. Give it a path")
    _check_file(item, item.path, limits)
    # By number, so that it has no name: FFmpeg would choose its reader by the ending and not by what is in the file.
    with open(os.open(item.path, os.O_RDONLY | getattr(os, "O_BINARY", 0)), "rb") as file:
        yield file if item.span is None else io.BufferedReader(_Part(file, *item.span))


class _Part(io.RawIOBase):
    """A stretch of a file as a file by itself, of which no more is read than is asked for."""

    def __init__(self, file: BinaryIO, first: int, count: int) -> None:
        self.file, self.first, self.count, self.at = file, first, count, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.count}[whence])
        return self.at

    def readinto(self, buffer: Any) -> int:
        self.file.seek(self.first + self.at)
        found = self.file.read(max(0, min(len(buffer), self.count - self.at)))
        buffer[: len(found)] = found
        self.at += len(found)
        return len(found)


def _check_file(item: MediaItem, path: Path, limits: Limits) -> None:
    try:
        info = path.stat()
    except OSError:
        raise MediaError(f"{path}: there is no such file. Check the path; it is relative to the data file") from None
    if not stat.S_ISREG(info.st_mode):
        raise MediaError(f"{path}: is not a regular file. Give the path of {article(item.kind)}")
    if item.span is not None and sum(item.span) > info.st_size:
        raise MediaError(
            f"{item.name()}: ends at byte {sum(item.span)}, and {item.path} has {info.st_size} bytes, so it is "
            "truncated. Copy it again"
        )
    _check_size(item, info.st_size if item.span is None else item.span[1], limits, "read. Cut or compress it")


def _check_size(item: MediaItem, count: int, limits: Limits, rest: str) -> None:
    if count == 0:
        raise MediaError(f"{item.name()}: is empty, so there is nothing to decode. Replace the file")
    read_in_place = item.is_cut() and item.path is not None
    if count > limits.max_bytes and not read_in_place:
        raise MediaError(f"{item.name()}: has {count} bytes, and at most {limits.max_bytes} are {rest}")


def cut(item: MediaItem, duration_s: float) -> tuple[float, float]:
    """Where the item's part of its file begins, and how long it is, both in seconds.

    Args:
        duration_s: Length of all that the file holds.

    Raises:
        MediaError: It would begin where the file has ended.
    """
    if item.start_s and item.start_s >= duration_s:
        raise MediaError(
            f"{item.name()}: is to begin at {item.start_s:g} s and lasts {duration_s:.2f} s, so there is nothing left. "
            "Give a start before its end"
        )
    end = duration_s if item.end_s is None else min(item.end_s, duration_s)
    return item.start_s, end - item.start_s


def check_time(item: MediaItem, limits: Limits, deadline: float) -> None:
    """Refuse what is still being decoded behind its deadline, by `time.monotonic`.

    Raises:
        MediaError: It is.
    """
    if time.monotonic() > deadline:
        raise MediaError(f"{item.name()}: takes longer than {limits.max_decode_s:g} s to decode. Cut it")


def check_seconds(item: MediaItem, seconds: float, limits: Limits) -> None:
    """Refuse what lasts too long.

    Raises:
        MediaError: It does.
    """
    if seconds > limits.max_seconds:
        raise MediaError(
            f"{item.name()}: lasts {seconds:.0f} s, and at most {limits.max_seconds:.0f} s are decoded. Cut it"
        )


def check_samples(num_samples: int, rate_hz: int, limits: Limits, item: MediaItem) -> None:
    """Refuse a recording that has too many samples, or lasts too long, or is at a rate that no recording has.

    Raises:
        MediaError: It has, or does, or is.
    """
    if rate_hz > HIGHEST_HZ:
        raise MediaError(
            f"{item.name()}: has {rate_hz} samples a second, and at most {HIGHEST_HZ} are decoded. Encode it at a "
            "lower rate"
        )
    if num_samples > limits.max_samples or num_samples > limits.max_seconds * rate_hz:
        raise MediaError(
            f"{item.name()}: has {num_samples} samples at {rate_hz} Hz, and at most {limits.max_samples} samples and "
            f"{limits.max_seconds:.0f} s are decoded. Cut it"
        )


def check_frame(width: int, height: int, limits: Limits, item: MediaItem) -> None:
    """Refuse a video of frames that are too large.

    Raises:
        MediaError: They are.
    """
    if width * height > limits.max_pixels:
        raise too_large(item, limits, f"are {width} x {height} pixels")


def too_large(item: MediaItem, limits: Limits, size: str) -> MediaError:
    """The refusal of a video by the size of its frames."""
    return MediaError(f"{item.name()}: its frames {size}, and {at_most(limits)} are decoded. Make it smaller")


def check_frames(count: int, limits: Limits, item: MediaItem) -> None:
    """Refuse a video with too many frames.

    Raises:
        MediaError: It has.
    """
    if count > limits.max_frames:
        raise MediaError(f"{item.name()}: has more than {limits.max_frames} frames, and no more are decoded. Cut it")


def at_most(limits: Limits) -> str:
    return f"at most {limits.max_pixels} pixels"
