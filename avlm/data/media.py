"""Prepare decoded media as encoders take them, and keep what is prepared.

`prepare_*` apply an encoder's spec: resize in torch, Whisper's log-mel in torch. What is
prepared is small, the same every time, and kept in memory by `MediaReader` while there
is room. Decoding itself is in `decode`.

Shapes in this file:
    B  mel bins    M  mel frames    S  samples
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.audio_utils import mel_filter_bank

from avlm.config.media import AudioSpec, MediaSpec, VisionSpec
from avlm.data.decode import decode_audio, decode_image, decode_video, resample
from avlm.data.files import LIMITS, Limits, article
from avlm.errors import MediaError
from avlm.layout import VideoFacts
from avlm.samples import MediaItem, Picture


@dataclass(frozen=True, slots=True)
class PreparedImage:
    """uint8 [3, side, side]."""

    pixels: Tensor


@dataclass(frozen=True, slots=True)
class PreparedAudio:
    """float32 [B, M], with the length that its layout follows from."""

    mel: Tensor
    num_samples: int


@dataclass(frozen=True, slots=True)
class PreparedVideo:
    """Frames in order, the sound track's mel (None without sound), and the facts of its layout."""

    frames: tuple[Tensor, ...]
    mel: Tensor | None
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


def log_mel(waveform: np.ndarray, spec: AudioSpec) -> Tensor:
    """Whisper's log-mel spectrogram: float32 [B, M].

    Args:
        waveform: Mono at ``spec.sample_rate_hz``.
        spec: With a window the sound is padded with silence to it; without, M is the sound's own.

    Source:
        arXiv:2212.04356, section 2.2, and the feature extractor released with it: power spectrum of a periodic Hann
        window, Slaney mel filters, log10 floored 8 below the clip's peak, (x + 4) / 4.
    """
    wave = torch.from_numpy(waveform)
    wanted = spec.n_fft if spec.window_frames is None else spec.window_frames * spec.hop
    if len(wave) < wanted:
        wave = F.pad(wave, (0, wanted - len(wave)))
    spectrum = torch.stft(wave, spec.n_fft, spec.hop, window=_hann(spec.n_fft), return_complex=True)
    power = spectrum[:, :-1].abs().square()
    mel = _mel_filters(spec.mel_bins, spec.n_fft, spec.sample_rate_hz) @ power
    log = mel.clamp(min=1e-10).log10()
    return (torch.maximum(log, log.max() - 8.0) + 4.0) / 4.0


def levelled(mel: Tensor, spec: AudioSpec) -> Tensor:
    """A clip's log-mel at the level that the encoder wants.

    With ``level="clip"``: what is 48 dB below the peak is floor, and the lower three quarters of the bins (a telephone
    has nothing above) get mean 0 and standard deviation 0.4.
    """
    if spec.level == "whisper":
        return mel
    mel = torch.maximum(mel, mel.max() - 1.2)
    heard = mel[: 3 * spec.mel_bins // 4]
    return (mel - heard.mean()) / (heard.std() + 1e-3) * 0.4


@lru_cache(maxsize=8)
def _hann(n_fft: int) -> Tensor:
    return torch.hann_window(n_fft)


@lru_cache(maxsize=8)
def _mel_filters(bins: int, n_fft: int, rate_hz: int) -> Tensor:
    filters = mel_filter_bank(
        num_frequency_bins=1 + n_fft // 2,
        num_mel_filters=bins,
        min_frequency=0.0,
        max_frequency=rate_hz / 2,
        sampling_rate=rate_hz,
        norm="slaney",
        mel_scale="slaney",
    )
    return torch.from_numpy(filters.T.astype(np.float32)).contiguous()


_Key = tuple[str, Path, float, float | None]
"""Kind, file, and the cut of it."""


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

    def prepare(self, item: MediaItem) -> Prepared:
        """Decode and prepare one item.

        Raises:
            MediaError: It cannot be decoded, or the model has no sense for it.
        """
        key = (item.kind, item.path, item.start_s, item.end_s) if item.path is not None else None
        if key is not None:
            with self._lock:
                if key in self._kept:
                    self._kept.move_to_end(key)
                    return self._kept[key]
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

    def _prepare(self, item: MediaItem) -> Prepared:
        vision, audio = self.media.vision, self.media.audio
        if item.kind == "audio":
            if audio is None:
                raise MediaError(
                    f"{item.name()}: is a sound, and this model does not hear. Use a model with an audio part"
                )
            sound = decode_audio(item, audio.sample_rate_hz, self.limits)
            return PreparedAudio(self._mel(sound.waveform, item), len(sound.waveform))
        if item.kind == "video" and self.media.video.order == "audio" and audio is not None:
            return self._prepare_video(item)  # its sound alone, which needs no eyes
        if vision is None:
            raise MediaError(
                f"{item.name()}: is {article(item.kind)}, and this model does not see. Use a model with a vision part"
            )
        if item.kind == "image":
            return PreparedImage(prepare_image(decode_image(item, self.limits), vision))
        return self._prepare_video(item)

    def _prepare_video(self, item: MediaItem) -> PreparedVideo:
        vision, audio, order = self.media.vision, self.media.audio, self.media.video.order
        clip = decode_video(item, self.media, self.limits)
        frames: tuple[Tensor, ...] = ()
        if vision is not None and order != "audio":
            frames = tuple(prepare_image(frame, vision) for frame in clip.frames)
        mel, count = None, 0
        if audio is not None and clip.sound is not None and order != "video":
            wave = resample(clip.sound.waveform, clip.sound.sample_rate_hz, audio.sample_rate_hz)
            mel, count = self._mel(wave, item), len(wave)
        return PreparedVideo(frames, mel, VideoFacts(clip.duration_s, count))

    def _mel(self, wave: np.ndarray, item: MediaItem) -> Tensor:
        spec = self.media.audio
        assert spec is not None
        longest = (spec.window_frames or spec.max_frames) * spec.hop
        if len(wave) >= longest + spec.hop:
            raise MediaError(
                f"{item.name()}: lasts {len(wave) / spec.sample_rate_hz:.2f} s, and the audio encoder hears at most "
                f"{longest / spec.sample_rate_hz:g} s. Cut it into shorter clips"
            )
        return log_mel(wave[:longest], spec)


def _size(prepared: Prepared) -> int:
    tensors = {
        PreparedImage: lambda p: [p.pixels],
        PreparedAudio: lambda p: [p.mel],
        PreparedVideo: lambda p: [*p.frames, *([] if p.mel is None else [p.mel])],
    }[type(prepared)](prepared)
    return int(sum(math.prod(t.shape) * t.element_size() for t in tensors))
