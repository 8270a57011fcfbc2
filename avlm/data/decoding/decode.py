"""Decode pictures, sounds and videos under limits: a file in, pixels or a waveform out.

Every way in which that can fail is a `MediaError` about that one item.
"""

from __future__ import annotations

import io
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, ImageFile, ImageOps
from PIL import Image as PILImage

from avlm.config.media import MediaSpec
from avlm.data.decoding.containers import Seen, sound_of, watched
from avlm.data.decoding.doors import article
from avlm.data.decoding.files import LIMITS, Limits, about, at_most, check_samples, check_time, cut, held, read
from avlm.data.decoding.jpeg import UPRIGHT, check_jpeg, jpeg_pixels
from avlm.data.decoding.ogg import check_pages
from avlm.data.decoding.pixels import pixels_of
from avlm.data.decoding.plain import PlainJpeg, plain_jpeg
from avlm.data.decoding.recordings import recording_of
from avlm.data.decoding.truncated import check_whole
from avlm.errors import MediaError
from avlm.layout import resampled_count, timed_count
from avlm.samples import Clip, MediaItem, Picture, Sound

PICTURES = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Formats that are decoded; among Pillow's others are some that start another program (EPS), and some whose size is not
known before they are decoded (ICO)."""
BLOCK = 2**20
"""Samples of a recording, over all its channels, that are decoded at once."""
LEAD = 2**16
"""Most samples that are decoded before the place that is wanted."""
LOUDEST = 1e6
"""A recording whose loudest sample is above this is none: full scale is 1, or 32768 where a program forgot to scale."""
QUIETEST = 1e-4
"""A recording whose loudest sample is below this (-80 dB) is silent."""


def check_senses(item: MediaItem, media: MediaSpec) -> None:
    """Refuse a medium that the model has no sense for. A video that is only listened to needs no eyes.

    Raises:
        MediaError: It has none.
    """
    if item.kind == "audio" and media.audio is None:
        raise MediaError(f"{item.name()}: is a sound, and this model does not hear. Use a model with an audio part")
    listens = item.kind == "video" and media.video.order == "audio" and media.audio is not None
    if item.kind != "audio" and media.vision is None and not listens:
        raise MediaError(
            f"{item.name()}: is {article(item.kind)}, and this model does not see. Use a model with a vision part"
        )


def decode_image(item: MediaItem, limits: Limits = LIMITS) -> Picture:
    """Decode one picture to RGB: upright (EXIF), the first frame, transparency over white. A colour profile is not
    applied, as the processors of released encoders do not apply it either.

    Raises:
        MediaError: Missing, broken, truncated or too large.
    """
    if isinstance(item.decoded, Picture):
        return item.decoded
    with about(item):
        data = read(item, limits)
        plain = plain_jpeg(data)
        if plain is not None and plain.size[0] * plain.size[1] > most_pixels(limits):
            plain = None
        if plain is not None and (pixels := _plain_pixels(item, data, plain)) is not None:
            return Picture(pixels)
        with opened_image(item, io.BytesIO(data), limits) as image:
            if image.format in ("JPEG", "MPO"):
                if plain is None and (pixels := _opened_pixels(item, data, image)) is not None:
                    return Picture(pixels)
                image.decodermaxblock = len(data)  # in one piece: handed over in several, they are joined again
            elif image.format == "PNG":
                _check_png(item, data)
            return to_picture(image, owned=True)
    raise AssertionError


def most_pixels(limits: Limits) -> int:
    """Up to how many pixels neither the limits nor Pillow's own have anything against a picture."""
    return min(limits.max_pixels, PILImage.MAX_IMAGE_PIXELS or 0)


@contextmanager
def opened_image(item: MediaItem, file: BinaryIO, limits: Limits) -> Iterator[ImageFile.ImageFile]:
    """A picture of which the header alone has been read.

    Raises:
        MediaError: It has more pixels than are decoded.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Pillow thinks of EXIF and sizes is nothing that a user can act on
        try:
            with PILImage.open(file, formats=_formats()) as image:
                if image.width * image.height > limits.max_pixels:
                    size = f"is {image.width} x {image.height} pixels"
                    raise MediaError(f"{item.name()}: {size}, and {at_most(limits)} are decoded. Make it smaller")
                yield image
        except PILImage.DecompressionBombError:
            raise MediaError(
                f"{item.name()}: {at_most(limits)} are decoded, and it has more. Make it smaller"
            ) from None


def _plain_pixels(item: MediaItem, data: bytes, plain: PlainJpeg) -> np.ndarray | None:
    """Pixels of a plain JPEG; None where Pillow is to decode it.

    Raises:
        MediaError: Its end or some of its pixels are missing, or its scans have no end.
    """
    check_jpeg(item, data, plain.scan if plain.at_once else None)
    return jpeg_pixels(item, data, plain.size, plain.colours)


def _opened_pixels(item: MediaItem, data: bytes, image: ImageFile.ImageFile) -> np.ndarray | None:
    """As `_plain_pixels`, of any JPEG whose header Pillow has read."""
    check_jpeg(item, data)
    return jpeg_pixels(item, data, (image.height, image.width), len(image.getbands()), _orientation(image))


def _check_png(item: MediaItem, data: bytes) -> None:
    """Refuse a PNG without an end, or with a critical chunk that is not what its checksum was made of. Pillow does not
    look at those of pixels, and goes on with what it can make of them.
    """
    at = 8
    while len(head := data[at : at + 8]) == 8:
        length, name = int.from_bytes(head[:4]), head[4:]
        if name == b"IEND":
            return
        end = at + 8 + length
        if end + 4 > len(data):
            break
        if name[:1].isupper() and zlib.crc32(memoryview(data)[at + 4 : end]) != int.from_bytes(data[end : end + 4]):
            raise MediaError(
                f"{item.name()}: is damaged: its chunk at byte {at} does not have the checksum that it was written "
                "with. Copy the picture again"
            )
        at = end + 4
    raise MediaError(f"{item.name()}: is truncated: its end chunk is missing. Copy the picture again")


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    """Those of our formats that this Pillow was built with."""
    PILImage.init()
    return tuple(name for name in PICTURES if name in PILImage.OPEN)


def to_picture(image: PILImage.Image, *, owned: bool = False) -> Picture:
    """A Pillow image as RGB, upright (EXIF), transparency over white.

    Args:
        owned: Nobody will change the image any more, so that its memory may be used where it lies.
    """
    image.load()
    if _orientation(image) != UPRIGHT:  # the transposition copies in any case
        with suppress(Exception):
            image = ImageOps.exif_transpose(image)
    return Picture(pixels_of(_to_rgb(image), owned=owned))


def _orientation(image: PILImage.Image) -> int:
    """Which side of a picture is up, as EXIF tells it. EXIF that cannot be parsed says nothing about it; viewers then
    show the picture as it lies."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, UPRIGHT))
    except Exception:
        return UPRIGHT


def _to_rgb(image: PILImage.Image) -> PILImage.Image:
    if image.mode.startswith("I;16"):
        return _grey(np.asarray(image, dtype=np.float32) / 257)
    if image.mode in ("I", "F"):  # whatever range a program chose
        values = np.nan_to_num(np.asarray(image, dtype=np.float32))
        top = values.max(initial=0)
        return _grey(values / 257 if top > 255 else values * 255 if image.mode == "F" and top <= 2 else values)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = PILImage.new("RGBA", image.size, (255, 255, 255, 255))
        return PILImage.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _grey(values: np.ndarray) -> PILImage.Image:
    return PILImage.fromarray(np.clip(values, 0, 255).astype(np.uint8)).convert("RGB")


def decode_audio(item: MediaItem, rate_hz: int, limits: Limits = LIMITS) -> Sound:
    """Decode one recording, or the cut of it that is asked for, to mono at a rate. Channels are averaged.

    Raises:
        MediaError: Missing, broken, truncated, silent or too long, or to begin where it has ended.
    """
    with about(item):
        wave, source_hz, seconds = _samples(item, limits)
    if wave.size == 0:
        raise MediaError(f"{item.name()}: has no samples, so there is nothing to hear. Replace the recording")
    if not np.isfinite(wave).all():
        raise MediaError(f"{item.name()}: has samples that are not numbers. Replace the recording")
    loudest = float(np.abs(wave).max())
    if loudest > LOUDEST:
        raise MediaError(
            f"{item.name()}: its loudest sample is {loudest:.0e}, where full scale is 1, so it is no sound. "
            "Replace the recording"
        )
    if loudest < QUIETEST:
        raise MediaError(
            f"{item.name()}: is silent (its loudest sample is below {QUIETEST:g} of full scale), so there is nothing "
            "to hear. Replace the recording"
        )
    with about(item):
        wave = resample(wave, source_hz, rate_hz)
        if seconds is not None:
            wave = fitted(wave, timed_count(seconds, rate_hz))
    if wave.size == 0:
        raise MediaError(f"{item.name()}: is shorter than one sample at {rate_hz} Hz. Replace the recording")
    return Sound(wave, rate_hz)


def _samples(item: MediaItem, limits: Limits) -> tuple[np.ndarray, int, float | None]:
    """Mono samples of the item's cut, their rate, and how long they last where that is not told by their number."""
    if isinstance(item.decoded, Sound):
        wave, rate_hz = item.decoded.waveform, item.decoded.sample_rate_hz
        first, count = cut_samples(item, len(wave), rate_hz)
        return wave[first : first + count], rate_hz, None
    with held(item, limits) as file:
        check_whole(item, file)
        check_pages(item, file)
        recording = recording_of(item, file)
        if recording is not None:
            with recording:
                return _read_samples(recording, item, limits), int(recording.samplerate), None
    found = sound_of(item, limits)
    if found is None:
        raise MediaError(f"{item.name()}: holds no sound that can be decoded. Replace the recording")
    return found[0].waveform, found[0].sample_rate_hz, found[1]


def _read_samples(recording: Any, item: MediaItem, limits: Limits) -> np.ndarray:
    """The samples of the item's cut, its channels averaged.

    Every block is read from a second before it on: soundfile seeks behind each read, and what an MP3 decoder makes just
    behind the place where it is sent is wrong.
    """
    first, count = cut_samples(item, recording.frames, recording.samplerate)
    check_samples(count, recording.samplerate, limits, item)
    deadline = time.monotonic() + limits.max_decode_s
    block = max(1, BLOCK // recording.channels)
    wave, at = np.empty(count, np.float32), 0
    while at < count:
        check_time(item, limits, deadline)
        lead = min(first + at, recording.samplerate, LEAD)
        recording.seek(first + at - lead)
        found = recording.read(lead + min(block, count - at), dtype="float32", always_2d=True)[lead:].mean(1)
        if not len(found):
            raise MediaError(
                f"{item.name()}: is truncated: its header announces {recording.frames} samples and the file has "
                f"{first + at}. Copy or record it again"
            )
        wave[at : at + len(found)] = found
        at += len(found)
    return wave


def cut_samples(item: MediaItem, num_samples: int, rate_hz: int) -> tuple[int, int]:
    """The first sample of the item's cut, and how many it has."""
    if not item.is_cut():
        return 0, num_samples
    begin, length = cut(item, num_samples / rate_hz)
    first = min(round(begin * rate_hz), num_samples)
    return first, min(round((begin + length) * rate_hz), num_samples) - first


def resample(wave: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    """Resample a mono waveform; its length is exactly `layout.resampled_count`."""
    if from_hz != to_hz:
        import soxr

        count = resampled_count(len(wave), from_hz, to_hz)
        wave = soxr.resample(wave, from_hz, to_hz)
        wave = fitted(wave, count)
    return np.ascontiguousarray(wave, dtype=np.float32)


def fitted(wave: np.ndarray, count: int) -> np.ndarray:
    """A waveform of exactly so many samples; resampling by time and by number may be one apart."""
    return wave if len(wave) == count else np.pad(wave[:count], (0, max(0, count - len(wave))))


def decode_video(item: MediaItem, media: MediaSpec, limits: Limits = LIMITS) -> Clip:
    """Decode the frames that a model looks at and the sound track that it hears, in one pass.

    The sound is laid on the video's own time: it is cut or padded to the video's duration.

    Raises:
        MediaError: Missing, broken, without pictures, or too long; or to begin where it has ended.
    """
    frames, duration_s, sound = watch(item, media, limits, lambda picture: picture)
    return Clip(frames, duration_s, sound)


def watch(
    item: MediaItem, media: MediaSpec, limits: Limits, see: Callable[[Picture], Seen]
) -> tuple[tuple[Seen, ...], float, Sound | None]:
    """As `decode_video`, with what is made of each frame in its place: frames, duration in seconds, and sound."""
    if isinstance(item.decoded, Clip):
        if item.is_cut():
            raise MediaError(
                f"{item.name()}: was given as frames with a start or an end, and its frames are chosen already. "
                "Cut them before, or give the file"
            )
        return tuple(map(see, item.decoded.frames)), item.decoded.duration_s, item.decoded.sound
    looks = media.vision is not None and media.video.order != "audio"
    hears = media.audio is not None and media.video.order != "video"
    with about(item):
        found = watched(item, media.video, limits, see, looks=looks, hears=hears)
        if looks and not found[0]:
            raise MediaError(f"{item.name()}: holds no pictures. Give it as audio, or replace the file")
        return found
    raise AssertionError
