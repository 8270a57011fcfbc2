"""Prepare decoded media as encoders take them, and keep what is prepared.

An encoder's spec is applied: to pictures in `pictures`, to sound in `features`. What is
prepared is small, the same every time, and kept in memory by `MediaReader` while there
is room. Decoding itself is in `decode`.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from avlm.config.media import MediaSpec
from avlm.data.decoding.decode import check_senses, decode_audio, decode_image, fitted, resample, watch
from avlm.data.decoding.files import LIMITS, Limits
from avlm.data.decoding.headers import measure
from avlm.data.media.features import heard_chunks
from avlm.data.media.pictures import PreparedImage, prepare_image, prepare_picture
from avlm.data.workers.foreman import note
from avlm.errors import MediaError
from avlm.layout import AudioFacts, Facts, VideoFacts, timed_count
from avlm.samples import Heard, MediaItem, Picture


@dataclass(frozen=True, slots=True)
class PreparedAudio:
    """What encoders take of a sound, chunk by chunk."""

    sound: tuple[Heard, ...]
    facts: AudioFacts


@dataclass(frozen=True, slots=True)
class PreparedVideo:
    """Frames in order, and the chunks of the sound track (none without sound)."""

    frames: tuple[Tensor, ...]
    sound: tuple[Heard, ...]
    facts: VideoFacts


Prepared = PreparedImage | PreparedAudio | PreparedVideo
"""Each with the `facts` that its layout follows from."""


_Key = tuple[str, Path | str, tuple[int, int] | None, float, float | None]
"""Kind, file or URL, the part of the file, and the cut of it."""


class MediaReader:
    """Decodes and prepares media for one model, remembering what is small enough to remember.

    Args:
        media: What the model sees and hears.
        cache_mb: Memory for prepared media; 0 remembers nothing. Safe for several threads.
    """

    def __init__(self, media: MediaSpec, cache_mb: int = 0, limits: Limits = LIMITS) -> None:
        self.media = media
        self.limits = limits
        self.decoded = 0
        """Media that were decoded to be measured."""
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
        place = item.path or item.url
        key = (item.kind, place, item.span, item.start_s, item.end_s) if place and item.data is None else None
        if key is not None:
            with self._lock:
                if key in self._kept:
                    self._kept.move_to_end(key)
                    return self._kept[key]
        with _named(item):
            prepared = self._prepare(item)
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

    def measure(self, item: MediaItem) -> Facts:
        """What the layout of one item follows from, by its header; decoded only where that does not tell.

        Raises:
            MediaError: It cannot be read, or the model has no sense for it.
        """
        with _named(item):
            facts = measure(item, self.media, self.limits)
        if facts is None:
            self.decoded += 1
            facts = self.prepare(item).facts
        return facts

    def _prepare(self, item: MediaItem) -> Prepared:
        check_senses(item, self.media)
        vision, audio = self.media.vision, self.media.audio
        if item.kind == "audio" and audio is not None:
            wave = decode_audio(item, audio.sample_rate_hz, self.limits).waveform
            return PreparedAudio(heard_chunks(wave, audio), AudioFacts(len(wave)))
        if item.kind == "image" and vision is not None:
            return prepare_picture(decode_image(item, self.limits), vision)
        return self._prepare_video(item)

    def _prepare_video(self, item: MediaItem) -> PreparedVideo:
        vision, audio, order = self.media.vision, self.media.audio, self.media.video.order

        def see(frame: Picture) -> Tensor | None:
            return None if vision is None or order == "audio" else prepare_image(frame, vision)

        seen, duration_s, track = watch(item, self.media, self.limits, see)
        sound: tuple[Heard, ...] = ()
        count = 0
        if audio is not None and track is not None and order != "video":
            wave = resample(track.waveform, track.sample_rate_hz, audio.sample_rate_hz)
            if item.decoded is None:
                wave = fitted(wave, timed_count(duration_s, audio.sample_rate_hz))
            sound, count = heard_chunks(wave, audio), len(wave)
        return PreparedVideo(tuple(f for f in seen if f is not None), sound, VideoFacts(duration_s, count))


@contextmanager
def _named(item: MediaItem) -> Iterator[None]:
    """Say which medium is being read, to whoever must tell why it was given up, and in what is raised."""
    note(file=item.name())
    try:
        yield
    except MediaError as error:
        error.file = error.file or item.name()
        raise


def _size(prepared: Prepared) -> int:
    if isinstance(prepared, PreparedImage):
        tensors = [prepared.pixels, *([] if prepared.detail is None else [prepared.detail])]
    else:
        frames = prepared.frames if isinstance(prepared, PreparedVideo) else ()
        tensors = [*frames, *(h.features for chunk in prepared.sound for h in (chunk, chunk.beside) if h is not None)]
    return sum(math.prod(t.shape) * t.element_size() for t in tensors)
