"""Decode pictures, sounds and videos under limits: a file in, pixels or a waveform out.

Every way in which that can fail is a `MediaError` about that one item.
"""

from __future__ import annotations

import io
import warnings
from contextlib import suppress
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image as PILImage
from PIL import ImageOps

from avlm.config.media import MediaSpec
from avlm.data.containers import clip_of, sound_of
from avlm.data.files import LIMITS, Limits, about, at_most, check_samples, cut, opened, read
from avlm.data.wav import missing_wav_bytes, with_length
from avlm.errors import MediaError
from avlm.layout import resampled_count
from avlm.samples import Clip, MediaItem, Picture, Sound

PICTURES = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO")
"""Formats that are decoded; among Pillow's others are some that start another program (EPS)."""
BLOCK = 2**20
"""Samples of a recording that are decoded at once."""
QUIETEST = 1e-4
"""A recording whose loudest sample is below this (-80 dB) is silent."""


def decode_image(item: MediaItem, limits: Limits = LIMITS) -> Picture:
    """Decode one picture to RGB, upright (EXIF), transparency over white.

    Raises:
        MediaError: Missing, broken, truncated or too large.
    """
    if isinstance(item.decoded, Picture):
        return item.decoded
    with about(item), warnings.catch_warnings():
        warnings.simplefilter("ignore", PILImage.DecompressionBombWarning)
        try:
            with PILImage.open(io.BytesIO(read(item, limits)), formats=picture_formats()) as image:
                if image.width * image.height > limits.max_pixels:
                    size = f"is {image.width} x {image.height} pixels"
                    raise MediaError(f"{item.name()}: {size}, and {at_most(limits)} are decoded. Make it smaller")
                return to_picture(image)
        except PILImage.DecompressionBombError:
            raise MediaError(
                f"{item.name()}: {at_most(limits)} are decoded, and it has more. Make it smaller"
            ) from None
    raise AssertionError


@lru_cache(maxsize=1)
def picture_formats() -> tuple[str, ...]:
    """Those of our formats that this Pillow was built with."""
    PILImage.init()
    return tuple(name for name in PICTURES if name in PILImage.OPEN)


def to_picture(image: PILImage.Image) -> Picture:
    """A Pillow image as RGB, upright (EXIF), transparency over white."""
    image.load()
    with suppress(Exception):  # EXIF that cannot be parsed says nothing about the picture; viewers show it as it lies
        image = ImageOps.exif_transpose(image)
    return Picture(np.array(_to_rgb(image)))


def _to_rgb(image: PILImage.Image) -> PILImage.Image:
    if image.mode.startswith("I;16"):
        return _grey(np.asarray(image, dtype=np.float32) / 257)
    if image.mode in ("I", "F"):  # whatever range a program chose
        values = np.nan_to_num(np.asarray(image, dtype=np.float32))
        top = values.max(initial=0)
        return _grey(values / 257 if top > 255 else values * 255 if image.mode == "F" and top <= 1 else values)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = PILImage.new("RGBA", image.size, (255, 255, 255, 255))
        return PILImage.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _grey(values: np.ndarray) -> PILImage.Image:
    return PILImage.fromarray(np.clip(values, 0, 255).astype(np.uint8)).convert("RGB")


def decode_audio(item: MediaItem, rate_hz: int, limits: Limits = LIMITS) -> Sound:
    """Decode one recording, or the cut of it that is asked for, to mono at a rate. Channels are averaged.

    Raises:
        MediaError: Missing, broken, truncated, silent or too long, or to begin where it has ended.
    """
    with about(item):
        wave, source_hz = _samples(item, limits)
    if wave.size == 0:
        raise MediaError(f"{item.name()}: has no samples, so there is nothing to hear. Replace the recording")
    if not np.isfinite(wave).all():
        raise MediaError(f"{item.name()}: has samples that are not numbers. Replace the recording")
    if float(np.abs(wave).max()) < QUIETEST:
        raise MediaError(
            f"{item.name()}: is silent (its loudest sample is below {QUIETEST:g} of full scale), so there is nothing "
            "to hear. Replace the recording"
        )
    with about(item):
        wave = resample(wave, source_hz, rate_hz)
    if wave.size == 0:
        raise MediaError(f"{item.name()}: is shorter than one sample at {rate_hz} Hz. Replace the recording")
    return Sound(wave, rate_hz)


def _samples(item: MediaItem, limits: Limits) -> tuple[np.ndarray, int]:
    """Mono samples of the item's cut, and their rate."""
    import soundfile

    if isinstance(item.decoded, Sound):
        wave, rate_hz = item.decoded.waveform, item.decoded.sample_rate_hz
        first, count = cut_samples(item, len(wave), rate_hz)
        return wave[first : first + count], rate_hz
    with opened(item, limits) as file:
        missing = missing_wav_bytes(file)
        if missing:
            raise MediaError(
                f"{item.name()}: is truncated: its header announces {missing} more bytes of sound than the file has. "
                "Copy or record it again"
            )
        try:
            recording = soundfile.SoundFile(with_length(file))
        except soundfile.LibsndfileError:
            sound = sound_of(item, limits)
            if sound is None:
                raise MediaError(f"{item.name()}: holds no sound that can be decoded. Replace the recording") from None
            return sound.waveform, sound.sample_rate_hz
        with recording:
            return _read_samples(recording, item, limits), int(recording.samplerate)


def _read_samples(recording: Any, item: MediaItem, limits: Limits) -> np.ndarray:
    """The samples of the item's cut, its channels averaged.

    Every block is read from a second before it on: soundfile seeks behind each read, and what an MP3 decoder makes just
    behind the place where it is sent is wrong.
    """
    first, count = cut_samples(item, recording.frames, recording.samplerate)
    check_samples(count, recording.samplerate, limits, item)
    blocks = [np.zeros(0, np.float32)]
    at, end = first, first + count
    while at < end:
        lead = min(at, recording.samplerate)
        recording.seek(at - lead)
        block = recording.read(lead + min(BLOCK, end - at), dtype="float32", always_2d=True)[lead:]
        if not len(block):
            raise MediaError(
                f"{item.name()}: is truncated: its header announces {recording.frames} samples and the file has "
                f"{at}. Copy or record it again"
            )
        blocks.append(block.mean(1))
        at += len(block)
    return np.concatenate(blocks)


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
        wave = np.pad(wave[:count], (0, max(0, count - len(wave))))
    return np.ascontiguousarray(wave, dtype=np.float32)


def decode_video(item: MediaItem, media: MediaSpec, limits: Limits = LIMITS) -> Clip:
    """Decode the frames that a model looks at and the sound track that it hears, in one pass.

    The sound is laid on the video's own time: it is cut or padded to the video's duration.

    Raises:
        MediaError: Missing, broken, without pictures, or too long; or to begin where it has ended.
    """
    if isinstance(item.decoded, Clip):
        if item.is_cut():
            raise MediaError(
                f"{item.name()}: was given as frames with a start or an end, and its frames are chosen already. "
                "Cut them before, or give the file"
            )
        return item.decoded
    looks = media.vision is not None and media.video.order != "audio"
    hears = media.audio is not None and media.video.order != "video"
    with about(item):
        clip = clip_of(item, media.video, limits, looks=looks, hears=hears)
        if looks and not clip.frames:
            raise MediaError(f"{item.name()}: holds no pictures. Give it as audio, or replace the file")
        return clip
    raise AssertionError
