"""Files of media before they are decoded: found, held against limits, opened, and cut by time."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from pydantic import InstanceOf

from avlm.config import data as settings
from avlm.data.decoding.doors import ANYWHERE, Doors, article
from avlm.data.fetching.window import window
from avlm.errors import AvlmError, MediaError
from avlm.samples import MediaItem


class Limits(settings.Limits):
    """What a file may be, and where from, before it is refused unread, or half read."""

    doors: InstanceOf[Doors] = ANYWHERE
    """Where files may lie, and what may be fetched. It is carried here so that no reader can be without it."""


def limits_of(wanted: settings.Limits, doors: Doors) -> Limits:
    """The limits that a run asks for, and the doors that are open to it."""
    return Limits(**wanted.model_dump(), doors=doors)


LIMITS = Limits()
SMALL = 4 * 2**20
"""Bytes of a file that may as well be read at once."""
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


def read(item: MediaItem, limits: Limits) -> bytes:
    """The item's bytes, refused before they are read when they are too many or no file at all.

    Raises:
        MediaError: Missing, no file, not to be read or fetched, empty or too large.
    """
    if item.data is not None:
        return _checked(item, item.data, limits)
    with opened(item, limits) as file:
        return file.read()


def _checked(item: MediaItem, data: bytes, limits: Limits) -> bytes:
    _check_size(item, len(data), limits, "decoded. Cut it")
    return data


@contextmanager
def opened(item: MediaItem, limits: Limits) -> Iterator[BinaryIO]:
    """The item's bytes as a file to read and to seek in.

    Raises:
        MediaError: Missing, no file, not to be read or fetched, empty or too large.
    """
    if item.data is not None:
        yield io.BytesIO(_checked(item, item.data, limits))
        return
    if item.path is None and not item.url:
        raise MediaError(f"a part of type {item.kind} has neither a path nor data. Give it a path")
    with limits.doors.opened(item) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if item.span is not None and sum(item.span) > size:
            raise MediaError(
                f"{item.name()}: ends at byte {sum(item.span)}, and its file has {size} bytes, so it is truncated. "
                "Copy it again"
            )
        _check_size(item, size if item.span is None else item.span[1], limits, "read. Cut or compress it")
        yield file if item.span is None else window(file, *item.span, own=False)


@contextmanager
def held(item: MediaItem, limits: Limits) -> Iterator[BinaryIO]:
    """As `opened`, for what will be read whole: a small file is read at once, since decoders ask for many small parts.

    Raises:
        MediaError: As `opened` does.
    """
    with opened(item, limits) as file:
        small = not item.is_cut() and item.data is None and file.seek(0, os.SEEK_END) <= SMALL
        file.seek(0)
        yield io.BytesIO(file.read()) if small else file


def _check_size(item: MediaItem, count: int, limits: Limits, rest: str) -> None:
    if count == 0:
        raise MediaError(f"{item.name()}: is empty, so there is nothing to decode. Replace the file")
    read_in_place = item.is_cut() and item.data is None
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
