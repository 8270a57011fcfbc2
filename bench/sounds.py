"""Sounds: a waveform to what an audio encoder takes, against transformers' feature extractors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from harness import Case, Table, timed
from material import RATE_HZ, speech
from transformers import (
    ASTFeatureExtractor,
    ClapFeatureExtractor,
    ParakeetFeatureExtractor,
    SeamlessM4TFeatureExtractor,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
)
from transformers.models.gemma3n.feature_extraction_gemma3n import Gemma3nAudioFeatureExtractor

from avlm.config.media import AudioSpec
from avlm.data.media.features import sound_features

SECONDS = (1, 5, 10, 20, 30)
KALDI: dict[str, Any] = {"features": "fbank", "n_fft": 512, "frame": 400}
Extract = Callable[[np.ndarray], Any]


def alike(found: torch.Tensor, expected: Any) -> None:
    """Within 1e-4, in the frames that both have."""
    expected = torch.as_tensor(np.asarray(expected)).squeeze()
    expected = expected[None] if expected.ndim == 1 else expected
    expected = expected if expected.shape[0] == found.shape[0] else expected.T
    frames = min(found.shape[1], expected.shape[1])
    assert (found[:, :frames] - expected[:, :frames]).abs().max() < 1e-4


def whisper() -> Table:
    """Whisper's log-mel, at true lengths and in full windows."""
    table = Table(
        "mel",
        "Whisper's log-mel",
        "ms",
        [
            "The extractor without padding (padding=longest) does what ours does at a true length; by default it pads "
            "to 30 s, as ours does with a window. Its way with NumPy alone is the one of a user without torch.",
        ],
    )
    for bins in (80, 128):
        extractor = WhisperFeatureExtractor(feature_size=bins)
        true, window = AudioSpec(mel_bins=bins), AudioSpec(mel_bins=bins, window_frames=3000)
        for seconds in SECONDS:
            wave = speech(seconds)

            def theirs(padding: str, wave: np.ndarray = wave, extractor: Any = extractor) -> Any:
                return extractor(wave, sampling_rate=RATE_HZ, padding=padding, return_tensors="pt")["input_features"]

            table.lines += timed(
                Case(
                    f"{bins} bins, {seconds} s, true length",
                    lambda w=wave, s=true: sound_features(w, s),
                    {
                        "transformers, unpadded": lambda f=theirs: f("longest"),
                        "transformers, NumPy": lambda w=wave, e=extractor: e._np_extract_fbank_features(w[None], "cpu"),
                    },
                    rounds=25,
                    bar=1.5,
                    check=lambda w=wave, s=true, f=theirs: alike(sound_features(w, s), f("longest")),
                )
            )
            table.lines += timed(
                Case(
                    f"{bins} bins, {seconds} s, window of 30 s",
                    lambda w=wave, s=window: sound_features(w, s),
                    {"transformers, default": lambda f=theirs: f("max_length")},
                    rounds=25,
                    bar=1.0,
                    check=lambda w=wave, s=window, f=theirs: alike(sound_features(w, s), f("max_length")),
                )
            )
    return table


def others() -> Table:
    """The other features, ten seconds each."""
    table = Table("features", "Other features of sound, 10 s", "ms", ["Each against its own feature extractor."])
    clap = AudioSpec(
        features="clap", sample_rate_hz=48_000, mel_bins=64, n_fft=1024, hop=480, embeddings=64, window_frames=1001,
        max_frames=1001, low_hz=50, high_hz=14_000,
    )  # fmt: skip
    ast = AudioSpec(**KALDI, mel_bins=128, window_frames=1024, max_frames=1024, mean=-4.2677393, std=2 * 4.5689974)
    bert = AudioSpec(**KALDI, window="povey", scale=32_768.0, normalise="bins", stack=2)
    samples = AudioSpec(features="wave", mel_bins=1, n_fft=1, hop=1, normalise="clip", max_frames=480_000)
    parakeet = AudioSpec(features="parakeet", n_fft=512, frame=400)
    gemma = AudioSpec(features="gemma3n", mel_bins=128, n_fft=1024, frame=512)
    for name, spec, extractor, key in (
        ("AST, filterbank", ast, ASTFeatureExtractor(), "input_values"),
        ("Wav2Vec2-BERT, filterbank", bert, SeamlessM4TFeatureExtractor(), "input_features"),
        ("wav2vec 2.0, samples", samples, Wav2Vec2FeatureExtractor(do_normalize=True), "input_values"),
        ("Parakeet", parakeet, ParakeetFeatureExtractor(), "input_features"),
        ("Gemma 3n", gemma, Gemma3nAudioFeatureExtractor(), "input_features"),
        (
            "CLAP", clap, ClapFeatureExtractor(truncation="rand_trunc", frequency_min=50, frequency_max=14_000),
            "input_features",
        ),
    ):  # fmt: skip
        wave = speech(10, rate_hz=spec.sample_rate_hz)

        def theirs(e: Any = extractor, w: np.ndarray = wave, r: int = spec.sample_rate_hz, k: str = key) -> Any:
            return e(w, sampling_rate=r, return_tensors="pt")[k][0]

        def mine(w: np.ndarray = wave, s: AudioSpec = spec) -> torch.Tensor:
            return sound_features(w, s)

        table.lines += timed(
            Case(name, mine, {"transformers": theirs}, rounds=9, check=lambda m=mine, t=theirs: alike(m(), t()))
        )
    return table


def main() -> list[Table]:
    return [whisper(), others()]
