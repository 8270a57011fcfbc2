"""Prepare decoded media as encoders take them, and keep what is prepared.

Pictures are resized here, in torch; what encoders take of a sound is in `features`. What is
prepared is small, the same every time, and kept in memory by `MediaReader` while there
is room. Decoding itself is in `decode`.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from avlm.config.media import MediaSpec, VisionSpec
from avlm.data.decode import LIMITS, Limits, article, decode_audio, decode_image, decode_video, resample
from avlm.data.features import heard_chunks
from avlm.errors import MediaError
from avlm.layout import VideoFacts
from avlm.samples import Heard, MediaItem, Picture


@dataclass(frozen=True, slots=True)
class PreparedImage:
    """uint8 [3, side, side]."""

    pixels: Tensor


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


def prepare_image(picture: Picture, spec: VisionSpec) -> Tensor:
    """Resize a picture to the encoder's square: uint8 [3, side, side].

    Source:
        Antialiased bicubic, as Pillow's within one grey level.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(picture.pixels)).permute(2, 0, 1)
    side = spec.image_size_px
    if spec.fit == "crop":
        pixels = _centre_square(pixels)
    elif spec.fit == "pad":
        pixels = _padded_square(pixels, spec)
    if pixels.shape[1:] == (side, side):
        return pixels.contiguous()
    return F.interpolate(pixels[None], (side, side), mode="bicubic", antialias=True)[0]


def _centre_square(pixels: Tensor) -> Tensor:
    height, width = pixels.shape[1:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[:, top : top + side, left : left + side]


def _padded_square(pixels: Tensor, spec: VisionSpec) -> Tensor:
    """Pad with the mean colour, which is zero after normalising (LLaVA-1.5)."""
    height, width = pixels.shape[1:]
    if max(height, width) > WIDEST:  # a thin strip must not become a square of its length
        share = WIDEST / max(height, width)
        size = max(1, round(height * share)), max(1, round(width * share))
        pixels = F.interpolate(pixels[None], size, mode="bicubic", antialias=True)[0]
        height, width = size
    side = max(height, width)
    colour = torch.tensor([round(255 * m) for m in spec.mean], dtype=torch.uint8)
    square = colour[:, None, None].expand(3, side, side).clone()
    top, left = (side - height) // 2, (side - width) // 2
    square[:, top : top + height, left : left + width] = pixels
    return square


WIDEST = 8192
"""Longest side, in pixels, that is padded to a square as it is; longer ones are made smaller first."""


def normalise(pixels: Tensor, spec: VisionSpec) -> Tensor:
    """uint8 [..., 3, h, w] to float32, (x / 255 - mean) / std per channel."""
    mean = torch.tensor(spec.mean)[:, None, None]
    std = torch.tensor(spec.std)[:, None, None]
    return (pixels.float() / 255 - mean) / std


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
        self._kept: OrderedDict[tuple[str, Path], Prepared] = OrderedDict()
        self._lock = threading.Lock()

    def prepare(self, item: MediaItem) -> Prepared:
        """Decode and prepare one item.

        Raises:
            MediaError: It cannot be decoded, or the model has no sense for it.
        """
        key = (item.kind, item.path) if item.path is not None else None
        if key is not None:
            with self._lock:
                if key in self._kept:
                    self._kept.move_to_end(key)
                    return self._kept[key]
        prepared = self._prepare(item)
        if key is not None and _size(prepared) <= self._capacity:
            self._remember(key, prepared)
        return prepared

    def _remember(self, key: tuple[str, Path], prepared: Prepared) -> None:
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
        if vision is None:
            raise MediaError(
                f"{item.name()}: is {article(item.kind)}, and this model does not see. Use a model with a vision part"
            )
        if item.kind == "image":
            return PreparedImage(prepare_image(decode_image(item, self.limits), vision))
        clip = decode_video(item, self.media, self.limits)
        frames = tuple(prepare_image(frame, vision) for frame in clip.frames)
        sound: tuple[Heard, ...] = ()
        count = 0
        if audio is not None and clip.sound is not None and self.media.video.order != "video":
            wave = resample(clip.sound.waveform, clip.sound.sample_rate_hz, audio.sample_rate_hz)
            sound, count = heard_chunks(wave, audio), len(wave)
        return PreparedVideo(frames, sound, VideoFacts(clip.duration_s, count))


def _size(prepared: Prepared) -> int:
    if isinstance(prepared, PreparedImage):
        tensors = [prepared.pixels]
    else:
        frames = prepared.frames if isinstance(prepared, PreparedVideo) else ()
        tensors = [*frames, *(h.features for chunk in prepared.sound for h in (chunk, chunk.beside) if h is not None)]
    return sum(math.prod(t.shape) * t.element_size() for t in tensors)
