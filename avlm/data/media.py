"""Prepare decoded media as encoders take them, and keep what is prepared.

An encoder's spec is applied: pictures in `pictures`, Whisper's log-mel in torch here. What is
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

from avlm.config.media import AudioSpec, MediaSpec
from avlm.data.decode import LIMITS, Limits, article, decode_audio, decode_image, decode_video, resample
from avlm.data.pictures import PreparedImage, prepare_image, prepare_picture
from avlm.errors import MediaError
from avlm.layout import VideoFacts
from avlm.samples import MediaItem


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
            sound = decode_audio(item, audio.sample_rate_hz, self.limits)
            return PreparedAudio(self._mel(sound.waveform, item), len(sound.waveform))
        if vision is None:
            raise MediaError(
                f"{item.name()}: is {article(item.kind)}, and this model does not see. Use a model with a vision part"
            )
        if item.kind == "image":
            return prepare_picture(decode_image(item, self.limits), vision)
        clip = decode_video(item, self.media, self.limits)
        frames = tuple(prepare_image(frame, vision) for frame in clip.frames)
        mel, count = None, 0
        if audio is not None and clip.sound is not None and self.media.video.order != "video":
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
        PreparedImage: lambda p: [p.pixels, *([] if p.detail is None else [p.detail])],
        PreparedAudio: lambda p: [p.mel],
        PreparedVideo: lambda p: [*p.frames, *([] if p.mel is None else [p.mel])],
    }[type(prepared)](prepared)
    return int(sum(math.prod(t.shape) * t.element_size() for t in tensors))
