"""Something like a voice and something like a room, for tests of what listens."""

from __future__ import annotations

import numpy as np

from avlm.data.voice.gate import SAMPLE_RATE_HZ


def speech(seconds: float, seed: int = 0, pitch_hz: float = 140.0) -> np.ndarray:
    """Something like a vowel: harmonics whose loudness changes four times a second and never falls to nothing."""
    time_s = np.arange(round(seconds * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    rng = np.random.default_rng(seed)
    tones = [np.sin(2 * np.pi * k * pitch_hz * time_s + rng.uniform(0, 6)) / k for k in range(1, 20)]
    envelope = 0.6 + 0.4 * np.sin(2 * np.pi * 4 * time_s) ** 2
    return (0.2 * envelope * np.asarray(sum(tones))).astype(np.float32)


def noise(seconds: float, loudness: float = 0.002, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, loudness, round(seconds * SAMPLE_RATE_HZ)).astype(np.float32)
