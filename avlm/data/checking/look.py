"""One medium looked at: whether it can be read, how large it is, and what finds others that are the same."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from avlm.config.media import AudioSpec, MediaSpec, VisionSpec
from avlm.data.checking.sketch import (
    RATE_HZ,
    picture_sketch,
    picture_view,
    same_picture,
    same_sound,
    sound_sketch,
    sound_view,
)
from avlm.data.decoding.decode import decode_audio, decode_image, decode_video, resample
from avlm.data.decoding.files import Limits, opened
from avlm.data.decoding.headers import measure
from avlm.errors import DataError
from avlm.layout import ImageFacts, VideoFacts
from avlm.samples import Clip, MediaItem, Picture, Sound

HEARD = AudioSpec()
ANYTHING = MediaSpec(vision=VisionSpec(image_size_px=224, cell_px=14), audio=HEARD)
"""What is looked for in videos where no model says so: frames and sound."""
FILES = 64
_DIGESTS: dict[tuple[Path, int, int], bytes] = {}
"""Of the files that were read last: many rows that follow each other may be cuts of one."""
FLAT = 2
"""A picture whose values lie no further apart shows nothing."""


@dataclass(frozen=True, slots=True)
class Look:
    """What a medium is."""

    digest: int = 0
    """64 bits of its bytes and its cut; 0 where they were not read."""
    size_px: tuple[int, int] = (0, 0)
    """Height and width of a picture or of a video's frames."""
    seconds: float = 0.0
    """How long a sound or a video lasts."""
    sketch: tuple[int, int] = (0, 0)
    problem: str = ""
    """Why it cannot be read."""
    odd: str = ""
    """What is strange about it though it can be read."""


def look(item: MediaItem, limits: Limits, media: MediaSpec = ANYTHING) -> Look:
    """Read and decode a medium.

    Args:
        media: Which frames of a video are looked at.
    """
    try:
        digest = content_digest(item, limits)
        decoded = decoded_of(item, limits, media)
    except DataError as error:
        return Look(problem=error.reason)
    if isinstance(decoded, Sound):
        sketch = sound_sketch(sound_view(decoded.waveform))
        return Look(digest, seconds=len(decoded.waveform) / decoded.sample_rate_hz, sketch=sketch)
    picture = picture_of(decoded)
    if picture is None:  # a video of which only the sound is taken
        return Look(digest, seconds=decoded.duration_s if isinstance(decoded, Clip) else 0.0)
    size = int(picture.pixels.shape[0]), int(picture.pixels.shape[1])
    seconds = decoded.duration_s if isinstance(decoded, Clip) else 0.0
    flat = isinstance(decoded, Picture) and int(np.ptp(picture.pixels, axis=(0, 1)).max()) <= FLAT
    sketch = (0, 0) if flat else picture_sketch(picture_view(picture.pixels))
    odd = "is a picture of one colour. Replace it if it was to show something" if flat else ""
    return Look(digest, size, seconds, sketch, odd=odd)


def decoded_of(item: MediaItem, limits: Limits, media: MediaSpec = ANYTHING) -> Picture | Sound | Clip:
    """A medium decoded: sounds at the rate that they are compared at.

    Raises:
        MediaError: It cannot be.
    """
    if item.kind == "image":
        return decode_image(item, limits)
    return decode_audio(item, RATE_HZ, limits) if item.kind == "audio" else decode_video(item, media, limits)


def picture_of(decoded: Picture | Sound | Clip) -> Picture | None:
    """What a medium is compared by if it is seen: of a video the frame in the middle."""
    if isinstance(decoded, Clip):
        return decoded.frames[len(decoded.frames) // 2] if decoded.frames else None
    return decoded if isinstance(decoded, Picture) else None


@dataclass(frozen=True, slots=True)
class View:
    """What a medium is compared with another by: a picture, a sound at 16 kHz, or both."""

    pixels: np.ndarray | None
    wave: np.ndarray | None

    def same(self, other: View) -> bool:
        """Whether both show and let hear the same, up to compression, size, level and noise."""
        if (self.pixels is None) != (other.pixels is None) or (self.wave is None) != (other.wave is None):
            return False
        if self.pixels is not None and other.pixels is not None and not same_picture(self.pixels, other.pixels):
            return False
        if self.wave is None or other.wave is None:
            return True
        a, b = self.wave, other.wave
        return abs(len(a) - len(b)) <= 0.02 * max(len(a), len(b)) + 0.1 * RATE_HZ and same_sound(a, b)


def view_of(item: MediaItem, limits: Limits, media: MediaSpec = ANYTHING) -> View:
    """A medium to be compared.

    Raises:
        MediaError: It cannot be decoded.
    """
    decoded = decoded_of(item, limits, media)
    picture, sound = picture_of(decoded), sound_in(decoded)
    wave = None if sound is None else resample(sound.waveform, sound.sample_rate_hz, RATE_HZ)
    return View(None if picture is None else picture.pixels, wave)


def sound_in(decoded: Picture | Sound | Clip) -> Sound | None:
    """What is heard in a medium."""
    if isinstance(decoded, Clip):
        return decoded.sound
    return decoded if isinstance(decoded, Sound) else None


def glance(item: MediaItem, limits: Limits) -> Look:
    """Read a medium's header, and nothing behind it."""
    try:
        facts = measure(item, ANYTHING, limits)
    except DataError as error:
        return Look(problem=error.reason)
    if isinstance(facts, ImageFacts):
        return Look(size_px=facts.size_px)
    if isinstance(facts, VideoFacts):
        return Look(seconds=facts.duration_s)
    return Look(seconds=0.0 if facts is None else facts.num_samples / HEARD.sample_rate_hz)


def media_key(item: MediaItem) -> int:
    """64 bits of where a medium is from: its file or address, its part of that, and its cut."""
    if item.data is not None:
        return number_of(item.data, cut=(item.start_s, item.end_s))
    place = f"{item.kind} {item.path} {item.span} {item.url} {item.title} {item.start_s} {item.end_s}"
    return number_of(place.encode(errors="surrogateescape"))


def content_digest(item: MediaItem, limits: Limits) -> int:
    """64 bits of the medium's bytes and its cut; 0 for what is in memory already.

    Raises:
        MediaError: It is missing, no file, empty or too large.
    """
    if item.decoded is not None:
        return 0
    if item.data is not None:
        return number_of(item.data, cut=(item.start_s, item.end_s))
    with opened(item, limits) as file:
        if item.path is None or item.span is not None:
            return number_of(file.read(), cut=(item.start_s, item.end_s))
        info = item.path.stat()
        known = (item.path, info.st_mtime_ns, info.st_size)
        if known not in _DIGESTS:
            if len(_DIGESTS) > FILES:
                _DIGESTS.clear()
            _DIGESTS[known] = _digest(file)
    return number_of(_DIGESTS[known], cut=(item.start_s, item.end_s))


def _digest(file: BinaryIO) -> bytes:
    digest = hashlib.blake2b()
    while chunk := file.read(2**20):
        digest.update(chunk)
    return digest.digest()


def number_of(data: bytes, cut: tuple[float, float | None] = (0.0, None)) -> int:
    """64 bits of some bytes, never 0."""
    digest = hashlib.blake2b(data, digest_size=8)
    if cut != (0.0, None):
        digest.update(repr(cut).encode())
    return int.from_bytes(digest.digest(), "big") or 1
