"""What the headers of media say of their layout, without decoding them.

What is said is what decoding gives, to the sample; where a header does not say it, None is.

    pictures   size, upright; not where a PNG has its orientation behind its pixels or a TIFF in XMP
    sound      WAV, FLAC, MP3, OGG, Opus and others whose number of samples libsndfile knows; MP4, M4A and MOV by their
               track's edit list. Not: MP3 without a Xing header, FLAC of unknown length, sound out of other containers
    video      duration and sound by the container's header, or the clocks of its packets where that has no duration
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import suppress
from typing import BinaryIO

from PIL import Image as PILImage
from PIL import TiffImagePlugin
from PIL.ExifTags import Base

from avlm.config.media import MediaSpec
from avlm.data.decoding.containers import clip_length, sound_length_s
from avlm.data.decoding.decode import check_senses, cut_samples, most_pixels, opened_image
from avlm.data.decoding.files import LIMITS, Limits, about, check_samples, opened
from avlm.data.decoding.plain import plain_jpeg_size, plain_wav_length
from avlm.data.decoding.recordings import recording_of
from avlm.data.decoding.truncated import check_whole
from avlm.data.decoding.wav import MOST_CHUNKS
from avlm.layout import AudioFacts, Facts, ImageFacts, Size, VideoFacts, resampled_count, timed_count
from avlm.samples import Clip, MediaItem, Picture, Sound

TURNING = frozenset({"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"})
"""Where Pillow looks for the orientation of a picture that is no TIFF."""
TURNED = frozenset({5, 6, 7, 8})
"""Orientations whose height lies across (EXIF 2.3, section 4.6.4 A)."""


def measure(item: MediaItem, media: MediaSpec, limits: Limits = LIMITS) -> Facts | None:
    """Measure a medium by its headers, as decoding it would.

    Returns:
        What its layout depends on, or None where only decoding tells. Damage behind a header goes unnoticed: what is
        measured may still be refused when it is decoded.

    Raises:
        MediaError: It would be refused when it is decoded, which its header says already; or the model has no sense
            for it.
    """
    check_senses(item, media)
    with about(item):
        if item.kind == "image":
            return _image(item, limits)
        return _audio(item, media, limits) if item.kind == "audio" else _video(item, media, limits)
    raise AssertionError


def _image(item: MediaItem, limits: Limits) -> ImageFacts | None:
    if isinstance(item.decoded, Picture):
        return ImageFacts((int(item.decoded.pixels.shape[0]), int(item.decoded.pixels.shape[1])))
    with opened(item, limits) as file:
        plain = plain_jpeg_size(file)
        if plain is not None and plain[0] * plain[1] <= most_pixels(limits):
            return ImageFacts(plain)
        file.seek(0)
        with opened_image(item, file, limits) as image:
            size = _upright(image, file)
            return None if size is None else ImageFacts(size)


def _upright(image: PILImage.Image, file: BinaryIO) -> Size | None:
    """Height and width as `decode.to_picture` gives them; None where that takes decoding."""
    width, height = image.size
    if isinstance(image, TiffImagePlugin.TiffImageFile):  # which turns by its own tag
        return (height, width) if Base.Orientation in image.tag_v2 or "xmp" not in image.info else None
    if image.format == "PNG" and (found := list(_png_orientations(file))):
        if found != [b"eXIf"]:
            return None
    elif image.format == "PNG" or not TURNING & image.info.keys():
        return height, width
    orientation = 1
    with suppress(Exception):  # EXIF that cannot be parsed says nothing about the picture
        orientation = image.getexif().get(Base.Orientation, 1)
    return (width, height) if orientation in TURNED else (height, width)


def _png_orientations(file: BinaryIO) -> Iterator[bytes]:
    """Chunks of a PNG that may say how it is turned: `eXIf`, texts by their keyword, all of them `late` behind pixels.

    Asked for EXIF that it has not met, Pillow decodes the whole picture to look behind it.
    """
    at, late = 8, False
    for _ in range(MOST_CHUNKS):
        file.seek(at)
        head = file.read(8 + 22)
        length, name = int.from_bytes(head[:4]), head[4:8]
        if len(head) < 8 or name == b"IEND":
            return
        late = late or name == b"IDAT"
        text = head[8:].partition(b"\0")[0] if name in (b"tEXt", b"zTXt", b"iTXt") else b""
        if name == b"eXIf" or text in (b"Raw profile type exif", b"XML:com.adobe.xmp"):
            yield b"late" if late else text or name
        at += 12 + length
    yield b"late"


def _audio(item: MediaItem, media: MediaSpec, limits: Limits) -> AudioFacts | None:
    assert media.audio is not None
    rate_hz = media.audio.sample_rate_hz
    if isinstance(item.decoded, Sound):
        sound = item.decoded
        return _heard(item, len(sound.waveform), sound.sample_rate_hz, rate_hz)
    with opened(item, limits) as file:
        length = _length(item, file)
    if length is not None:
        num_samples, own_hz = length
        check_samples(cut_samples(item, num_samples, own_hz)[1], own_hz, limits, item)
        return _heard(item, num_samples, own_hz, rate_hz)
    seconds = sound_length_s(item, limits)
    return None if seconds is None else AudioFacts(timed_count(seconds, rate_hz))


def _length(item: MediaItem, file: BinaryIO) -> tuple[int, int] | None:
    """Samples and samples a second of a recording; None where its header does not tell."""
    plain = plain_wav_length(file, file.seek(0, io.SEEK_END))
    if plain is not None:
        return plain
    check_whole(item, file)
    recording = recording_of(item, file)
    if recording is None:
        return None
    with recording:
        return int(recording.frames), int(recording.samplerate)


def _heard(item: MediaItem, num_samples: int, own_hz: int, rate_hz: int) -> AudioFacts | None:
    count = resampled_count(cut_samples(item, num_samples, own_hz)[1], own_hz, rate_hz)
    return AudioFacts(count) if count else None


def _video(item: MediaItem, media: MediaSpec, limits: Limits) -> VideoFacts | None:
    hears_hz = media.audio.sample_rate_hz if media.audio is not None and media.video.order != "video" else None
    if isinstance(item.decoded, Clip):
        clip = item.decoded
        if clip.sound is None or hears_hz is None:
            return VideoFacts(clip.duration_s, 0)
        count = resampled_count(len(clip.sound.waveform), clip.sound.sample_rate_hz, hears_hz)
        return VideoFacts(clip.duration_s, count)
    duration_s, own_hz = clip_length(item, limits)
    if hears_hz is None or own_hz is None:
        return VideoFacts(duration_s, 0)
    return VideoFacts(duration_s, timed_count(duration_s, hears_hz)) if own_hz else None
