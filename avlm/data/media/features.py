"""What audio encoders take: features of a waveform, in torch alone and on the processor.

`sound_features` gives those of one chunk, as the encoder's own feature extractor would; `heard_chunks` cuts a whole
sound into chunks first. How many frames there are is `layout`'s to say.

Shapes in this file:
    B  bins    M  frames    S  samples    W  samples of one analysis window    F  frequencies of its spectrum
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.audio_utils import mel_filter_bank

from avlm.config.media import AudioSpec, Features
from avlm.data.decoding.decode import resample
from avlm.layout import audio_chunks, chunk_sample_count, frame_count, heard_frame_count, smallest_sample_count
from avlm.samples import Heard

PREEMPHASIS = 0.97
"""How much of the sample before is taken from each one, wherever it is done at all."""


def heard_chunks(waveform: np.ndarray, spec: AudioSpec) -> tuple[Heard, ...]:
    """Cut a sound into what an encoder hears at once, and prepare each chunk by itself.

    Args:
        waveform: float32 [S], mono at ``spec.sample_rate_hz``.

    Returns:
        The chunks in order, as `layout.audio_chunks` counts them; each with what a second encoder takes of it.
    """
    found, start = [], 0
    for length in audio_chunks(len(waveform), spec):
        found.append(_heard(waveform[start : start + length], spec))
        start += length
    return tuple(found)


def _heard(chunk: np.ndarray, spec: AudioSpec) -> Heard:
    beside = None
    if spec.beside is not None:
        other = resample(chunk, spec.sample_rate_hz, spec.beside.sample_rate_hz)
        beside = _heard(other, spec.beside)
    return Heard(sound_features(chunk, spec), heard_frame_count(len(chunk), spec), beside)


def sound_features(waveform: np.ndarray, spec: AudioSpec) -> Tensor:
    """Features of one chunk: float32 [B, M], with ``B = mel_bins * stack`` and M as `layout.frame_count` says.

    Args:
        waveform: float32 [S], mono at ``spec.sample_rate_hz``. What is too short for the encoder is padded with silence
            to the shortest that is not.
    """
    frames = frame_count(len(waveform), spec)
    waveform = _padded(waveform, smallest_sample_count(spec))
    found = _EXTRACT[spec.features](waveform, spec)[:, :frames]
    assert found.shape == (spec.mel_bins * spec.stack, frames), (found.shape, frames)
    return found.float().contiguous()


def _padded(waveform: np.ndarray, count: int) -> np.ndarray:
    return waveform if len(waveform) >= count else np.pad(waveform, (0, count - len(waveform)))


# ---------------------------------------------------------------- Whisper


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
    wave = F.pad(wave, (0, max(0, wanted - len(wave))))
    frames_MW = _centred(wave, spec, "reflect")[:-1]
    heard = math.ceil((len(waveform) + spec.n_fft // 2) / spec.hop)  # behind that a window holds nothing but silence
    power_FM = _power(frames_MW[:heard], _hann(spec.n_fft), spec.n_fft)
    log_BM = _filters(spec, "slaney", "slaney", 0.0, None)(power_FM).clamp_(min=1e-10).log10_()
    log_BM = F.pad(log_BM, (0, max(0, len(frames_MW) - heard)), value=-10.0)
    return torch.maximum(log_BM, log_BM.max() - 8.0).add_(4.0).div_(4.0)


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


# ---------------------------------------------------------------- Kaldi, and the samples themselves


def _fbank(waveform: np.ndarray, spec: AudioSpec) -> Tensor:
    """Kaldi's filterbank without dither: of AST (Hann), BEATs and VITA (Povey, 16-bit scale), Wav2Vec2-BERT.

    A window is filled with zeros before the mean is taken off, and frames are stacked last.

    Source:
        Kaldi's compute-fbank-feats: windows that lie within the sound, each without its mean, pre-emphasis within the
        window, power spectrum, triangles on Kaldi's mel scale, natural logarithm with a floor of float32's epsilon.
    """
    width = spec.frame or spec.n_fft
    frames_MW = _windows(waveform * np.float32(spec.scale), width, spec.hop)
    frames_MW = _emphasised(frames_MW - frames_MW.mean(1, keepdim=True))
    shape = torch.hann_window(width, periodic=False, dtype=torch.float64)
    power_FM = _power(frames_MW, shape if spec.window == "hann" else shape**0.85, spec.n_fft)
    mel_BM = _filters(spec, "kaldi", None, 20.0, None)(power_FM)
    log_BM = mel_BM.clamp(min=torch.finfo(torch.float32).eps).log().float()  # as released, before any difference
    if spec.normalise == "bins":
        spread = (log_BM.var(1, keepdim=True) + 1e-7).sqrt()
        log_BM = (log_BM - log_BM.mean(1, keepdim=True)) / spread
    if spec.window_frames is not None:
        log_BM = F.pad(log_BM, (0, max(0, spec.window_frames * spec.stack - log_BM.shape[1])))
    log_BM = _standardised(log_BM, spec)
    whole = log_BM.shape[1] // spec.stack
    stacked_MB = log_BM[:, : whole * spec.stack].T.reshape(whole, spec.stack * spec.mel_bins)
    return stacked_MB.T


def _wave(waveform: np.ndarray, spec: AudioSpec) -> Tensor:
    """The samples themselves, [1, S], as wav2vec 2.0 and its kin take them."""
    wave = torch.from_numpy(waveform)
    if spec.normalise == "clip":
        variance, mean = torch.var_mean(wave, correction=0)
        wave = (wave - mean) / (variance + 1e-7).sqrt()
    return wave[None]


# ---------------------------------------------------------------- one model's own


def _parakeet(waveform: np.ndarray, spec: AudioSpec) -> Tensor:
    """NeMo's mel spectrogram: pre-emphasis over the whole sound, natural logarithm, mean 0 and spread 1 in each bin.

    Source:
        The front end of NeMo's FastConformer models (arXiv:2305.05084), as released for transformers.
    """
    wave = torch.from_numpy(waveform)
    wave = torch.cat([wave[:1], wave[1:] - PREEMPHASIS * wave[:-1]])
    window = torch.hann_window(spec.frame or spec.n_fft, periodic=False)
    aside = spec.n_fft - len(window)
    window = F.pad(window, (aside // 2, aside - aside // 2))
    power_FM = _power(_centred(wave, spec, "constant")[: len(wave) // spec.hop], window, spec.n_fft)
    log = (_filters(spec, "slaney", "slaney", 0.0, None)(power_FM) + 2.0**-24).log()
    return (log - log.mean(1, keepdim=True)) / (log.std(1, keepdim=True) + 1e-5)


def _gemma3n(waveform: np.ndarray, spec: AudioSpec) -> Tensor:
    """Gemma 3n's mel spectrogram: pre-emphasis in HTK's way, magnitudes, logarithm above a floor of 1e-5.

    Source:
        The front end of the Universal Speech Model (arXiv:2303.01037), as released for transformers.
    """
    frames_MW = _emphasised(_gemma_windows(waveform, spec))
    mel_BM = _filters(spec, "htk", None, 125.0, 7600.0)(_gemma_spectrum(frames_MW, spec))
    return _standardised(mel_BM.clamp(min=1e-5).log(), spec)


def _gemma4(waveform: np.ndarray, spec: AudioSpec) -> Tensor:
    """Gemma 4's mel spectrogram: half a window of silence before the sound, magnitudes, logarithm over 0.001."""
    width = spec.frame or spec.n_fft
    frames_MW = _gemma_windows(np.pad(waveform, (width // 2, 0)), spec)
    mel_BM = _filters(spec, "htk", None, 0.0, 8000.0)(_gemma_spectrum(frames_MW, spec))
    return _standardised((mel_BM + 1e-3).log(), spec)


def _gemma_windows(waveform: np.ndarray, spec: AudioSpec) -> Tensor:
    """Windows [M, W] of a sound padded to a multiple of 128 samples; each needs one sample more than it has."""
    width = spec.frame or spec.n_fft
    waveform = np.pad(waveform, (0, -len(waveform) % 128))
    return _windows(waveform, width + 1, spec.hop)[:, :-1]


def _gemma_spectrum(frames_MW: Tensor, spec: AudioSpec) -> Tensor:
    width = frames_MW.shape[1]
    return _power(frames_MW, torch.hann_window(width, dtype=torch.float64), spec.n_fft).sqrt()


def _clap(waveform: np.ndarray, spec: AudioSpec) -> Tensor:
    """CLAP's mel spectrogram in decibels. A short sound is repeated while it fits whole; silence fills the rest.

    Source:
        arXiv:2211.06687, section 2.2, and the feature extractor released with it.
    """
    whole = chunk_sample_count(spec.model_copy(update={"beside": None}))
    if len(waveform) < whole:
        waveform = _padded(np.tile(waveform, whole // len(waveform)), whole)
    frames_MW = _centred(torch.from_numpy(waveform).double(), spec, "reflect")
    power_FM = _power(frames_MW, torch.hann_window(spec.n_fft, dtype=torch.float64), spec.n_fft)
    norm: Literal["slaney"] | None = "slaney" if spec.mel_scale == "slaney" else None
    mel_BM = _filters(spec, spec.mel_scale, norm, 0.0, 14_000.0)(power_FM)
    return mel_BM.clamp_(min=1e-10).log10_().mul_(10.0)


_EXTRACT: dict[Features, Callable[[np.ndarray, AudioSpec], Tensor]] = {
    "whisper": log_mel,
    "fbank": _fbank,
    "wave": _wave,
    "parakeet": _parakeet,
    "gemma3n": _gemma3n,
    "gemma4": _gemma4,
    "clap": _clap,
}


# ---------------------------------------------------------------- what they have in common


def _windows(waveform: np.ndarray, width: int, hop: int) -> Tensor:
    """Stretches of `width` samples, a hop apart, that lie within the sound: float64 [M, W]."""
    return torch.from_numpy(waveform).double().unfold(0, width, hop)


def _centred(wave: Tensor, spec: AudioSpec, beyond: Literal["reflect", "constant"]) -> Tensor:
    """Stretches of `n_fft` samples around every hop, from the first sample on: [M, W].

    Args:
        beyond: What is heard before the beginning and behind the end: the sound backwards, or silence.
    """
    half = spec.n_fft // 2
    return F.pad(wave[None], (half, half), mode=beyond)[0].unfold(0, spec.n_fft, spec.hop)


def _emphasised(frames_MW: Tensor) -> Tensor:
    """Pre-emphasis within each window, as Kaldi and HTK do it: the first sample is its own predecessor."""
    before = torch.cat([frames_MW[:, :1], frames_MW[:, :-1]], 1)
    return frames_MW - PREEMPHASIS * before


def _power(frames_MW: Tensor, window_W: Tensor, n_fft: int) -> Tensor:
    """Power spectrum [F, M] of each window, filled with zeros to ``n_fft`` samples.

    Several times faster than the squared absolute values of `torch.stft`: no root is drawn, and the sum of two squares
    is one pass over memory.
    """
    real, imaginary = torch.view_as_real(torch.fft.rfft(frames_MW * window_W, n_fft)).unbind(-1)
    return torch.addcmul(real * real, imaginary, imaginary).T


def _standardised(features_BM: Tensor, spec: AudioSpec) -> Tensor:
    mean, std = (torch.tensor(v, dtype=features_BM.dtype).reshape(-1, 1) for v in (spec.mean, spec.std))
    return (features_BM - mean) / std


@lru_cache(maxsize=8)
def _hann(n_fft: int) -> Tensor:
    return torch.hann_window(n_fft)


def _filters(
    spec: AudioSpec,
    scale: Literal["slaney", "htk", "kaldi"],
    norm: Literal["slaney"] | None,
    low_hz: float,
    high_hz: float | None,
) -> _Filters:
    """Triangular mel filters between the spec's limits, or between these where it has none."""
    low = low_hz if spec.low_hz is None else spec.low_hz
    high = spec.high_hz or high_hz or spec.sample_rate_hz / 2
    return _mel_filters(spec.mel_bins, spec.n_fft, spec.sample_rate_hz, scale, norm, low, high)


class _Filters:
    """Mel filters [B, F], in bands of a few that lie side by side and reach over few frequencies.

    Nearly all of such a matrix is zero, and leaving out what is makes its product several times faster.
    """

    def __init__(self, filters_BF: Tensor) -> None:
        self.bands = {torch.float32: _banded(filters_BF), torch.float64: _banded(filters_BF.double())}

    def __call__(self, power_FM: Tensor) -> Tensor:
        """Energy in each bin: [B, M]."""
        return torch.cat([filters @ power_FM[reach] for filters, reach in self.bands[power_FM.dtype]])


BAND = 16
"""Filters that are applied together."""


def _banded(filters_BF: Tensor) -> list[tuple[Tensor, slice]]:
    found = []
    for band in torch.split(filters_BF, BAND):
        used = band.any(0).nonzero().flatten().tolist() or [0]  # filters between two frequencies have none
        reach = slice(used[0], used[-1] + 1)
        found.append((band[:, reach].contiguous(), reach))
    return found


@lru_cache(maxsize=8)
def _mel_filters(
    bins: int, n_fft: int, rate_hz: int, scale: str, norm: str | None, low_hz: float, high_hz: float
) -> _Filters:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # released filters have empty ones, and that they are empty is right
        filters = mel_filter_bank(
            num_frequency_bins=1 + n_fft // 2,
            num_mel_filters=bins,
            min_frequency=low_hz,
            max_frequency=high_hz,
            sampling_rate=rate_hz,
            norm=norm,
            mel_scale=scale,
            triangularize_in_mel_space=scale == "kaldi",
        )
    return _Filters(torch.from_numpy(filters.T.astype(np.float32)))
