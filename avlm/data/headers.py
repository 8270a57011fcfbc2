"""What the headers of media say: the facts that their layout follows from, with nothing decoded.

`measure` says the same as decoding would, or leaves it open: then the medium is to be decoded once.
"""

from __future__ import annotations

from contextlib import suppress

from PIL import Image as PILImage

from avlm.config.media import MediaSpec
from avlm.data.decode import cut_samples, picture_formats
from avlm.data.files import LIMITS, Limits, about, at_most, check_samples, opened
from avlm.data.wav import missing_wav_bytes, with_length
from avlm.errors import MediaError
from avlm.layout import AudioFacts, Facts, ImageFacts, VideoFacts, resampled_count
from avlm.samples import Clip, MediaItem, Picture, Sound

ORIENTATION = 0x0112
"""EXIF's tag for how a picture is to be turned; from 5 on its sides are exchanged."""


def measure(item: MediaItem, media: MediaSpec, limits: Limits = LIMITS) -> Facts | None:
    """The facts of one medium by its header; None where only decoding can tell.

    Raises:
        MediaError: It cannot be read, or the header says more than the limits allow.
    """
    with about(item):
        if item.kind == "image":
            return _picture(item, limits)
        if item.kind == "audio":
            assert media.audio is not None
            return _recording(item, media.audio.sample_rate_hz, limits)
        return _film(item, media)
    raise AssertionError


def _picture(item: MediaItem, limits: Limits) -> ImageFacts | None:
    if isinstance(item.decoded, Picture):
        return ImageFacts((int(item.decoded.pixels.shape[0]), int(item.decoded.pixels.shape[1])))
    with opened(item, limits) as file, PILImage.open(file, formats=picture_formats()) as image:
        if image.width * image.height > limits.max_pixels:
            size = f"is {image.width} x {image.height} pixels"
            raise MediaError(f"{item.name()}: {size}, and {at_most(limits)} are decoded. Make it smaller")
        if image.format != "JPEG":  # others may say behind their pixels how they are turned
            return None
        turned = 1
        with suppress(Exception):  # EXIF that cannot be parsed says nothing about the picture
            turned = int(image.getexif().get(ORIENTATION, 1))
        return ImageFacts((image.width, image.height) if turned in (5, 6, 7, 8) else (image.height, image.width))


def _recording(item: MediaItem, rate_hz: int, limits: Limits) -> AudioFacts | None:
    if isinstance(item.decoded, Sound):
        _, count = cut_samples(item, len(item.decoded.waveform), item.decoded.sample_rate_hz)
        return AudioFacts(resampled_count(count, item.decoded.sample_rate_hz, rate_hz))
    import soundfile

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
            return None
        with recording:
            _, count = cut_samples(item, recording.frames, recording.samplerate)
            check_samples(count, recording.samplerate, limits, item)
            return AudioFacts(resampled_count(count, int(recording.samplerate), rate_hz))


def _film(item: MediaItem, media: MediaSpec) -> VideoFacts | None:
    clip = item.decoded
    if not isinstance(clip, Clip) or item.is_cut():
        return None
    heard = clip.sound if media.audio is not None and media.video.order != "video" else None
    if heard is None or media.audio is None:
        return VideoFacts(clip.duration_s, 0)
    count = resampled_count(len(heard.waveform), heard.sample_rate_hz, media.audio.sample_rate_hz)
    return VideoFacts(clip.duration_s, count)
