"""Prepare decoded media as encoders take them, and keep what is prepared.

An encoder's spec is applied: to pictures in `pictures`, to sound in `features`. What is
prepared is small, the same every time, and kept in memory by `MediaReader` while there
is room. Decoding itself is in `decode`.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from avlm.config.media import MediaSpec
from avlm.data.decode import decode_audio, decode_image, decode_video, resample
from avlm.data.features import heard_chunks
from avlm.data.files import LIMITS, Limits, article
from avlm.data.foreman import note
from avlm.data.pictures import PreparedImage, prepare_image, prepare_picture
from avlm.errors import MediaError
from avlm.layout import VideoFacts
from avlm.samples import Heard, MediaItem


@dataclass(frozen=True, slots=True)
class PreparedAudio:
    """What encoders take of a sound, chunk by chunk, with the length that its layout follows from."""

    sound: tuple[Heard, ...]
    num_samples: int


@dataclass(frozen=True, slots=True)
class PreparedVideo:
    """Frames in order, the chunks of the sound track (none without sound), and the facts of its layout."""

    frames: tuple[Tensor, ...]
    sound: tuple[Heard, ...]
    facts: VideoFacts


Prepared = PreparedImage | PreparedAudio | PreparedVideo


_Key = tuple[str, Path, tuple[int, int] | None, float, float | None]
"""Kind, file, the part of the file, and the cut of it."""


class MediaReader:
    """Decodes and prepares media for one model, remembering what is small enough to remember.

    Args:
        media: What the model sees and hears.
        cache_mb: Memory for prepared media; 0 remembers nothing. Safe for several threads.
    """

    def __init__(self, media: MediaSpec, cache_mb: int = 0, limits: Limits = LIMITS) -> None:
        self.media = media
        self.limits = limits
        self._capacity = cache_mb * 2**20
        self._used = 0
        self._kept: OrderedDict[_Key, Prepared] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[MediaReader], tuple[MediaSpec, int, Limits]]:
        return MediaReader, (self.media, self._capacity // 2**20, self.limits)  # what it remembers stays here

    def prepare(self, item: MediaItem) -> Prepared:
        """Decode and prepare one item.

        Raises:
            MediaError: It cannot be decoded, or the model has no sense for it.
        """
        key = (item.kind, item.path, item.span, item.start_s, item.end_s) if item.path is not None else None
        if key is not None:
            with self._lock:
                if key in self._kept:
                    self._kept.move_to_end(key)
                    return self._kept[key]
        note(file=item.name())
        try:
            prepared = self._prepare(item)
        except MediaError as error:
            error.file = error.file or item.name()
            raise
        if key is not None and _size(prepared) <= self._capacity:
            self._remember(key, prepared)
        return prepared

    def _remember(self, key: _Key, prepared: Prepared) -> None:
        with self._lock:
            if key not in self._kept:
                self._kept[key] = prepared
                self._used += _size(prepared)
            while self._used > self._capacity:
                _, oldest = self._kept.popitem(last=False)
                self._used -= _size(oldest)

    def _prepare(self, item: MediaItem) -> Prepared:
        vision, audio = self.media.vision, self.media.audio
        if item.kind == "audio":
            if audio is None:
                raise MediaError(
                    f"{item.name()}: is a sound, and this model does not hear. Use a model with an audio part"
                )
            wave = decode_audio(item, audio.sample_rate_hz, self.limits).waveform
            return PreparedAudio(heard_chunks(wave, audio), len(wave))
        if item.kind == "video" and self.media.video.order == "audio" and audio is not None:
            return self._prepare_video(item)  # its sound alone, which needs no eyes
        if vision is None:
            raise MediaError(
                f"{item.name()}: is {article(item.kind)}, and this model does not see. Use a model with a vision part"
            )
        if item.kind == "image":
            return prepare_picture(decode_image(item, self.limits), vision)
        return self._prepare_video(item)

    def _prepare_video(self, item: MediaItem) -> PreparedVideo:
        vision, audio, order = self.media.vision, self.media.audio, self.media.video.order
        clip = decode_video(item, self.media, self.limits)
        frames: tuple[Tensor, ...] = ()
        if vision is not None and order != "audio":
            frames = tuple(prepare_image(frame, vision) for frame in clip.frames)
        sound: tuple[Heard, ...] = ()
        count = 0
        if audio is not None and clip.sound is not None and order != "video":
            wave = resample(clip.sound.waveform, clip.sound.sample_rate_hz, audio.sample_rate_hz)
            sound, count = heard_chunks(wave, audio), len(wave)
        return PreparedVideo(frames, sound, VideoFacts(clip.duration_s, count))


def _size(prepared: Prepared) -> int:
    if isinstance(prepared, PreparedImage):
        tensors = [prepared.pixels, *([] if prepared.detail is None else [prepared.detail])]
    else:
        frames = prepared.frames if isinstance(prepared, PreparedVideo) else ()
        tensors = [*frames, *(h.features for chunk in prepared.sound for h in (chunk, chunk.beside) if h is not None)]
    return sum(math.prod(t.shape) * t.element_size() for t in tensors)
