"""A model of which is known what it will say: it looks into a list of sounds, not into itself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from avlm.inference.live.gate import SAMPLE_RATE_HZ
from avlm.inference.live.mind import Judgement
from avlm.samples import MediaItem


def speech(seconds: float, seed: int = 0, pitch_hz: float = 140.0) -> np.ndarray:
    """Something like a vowel: harmonics whose loudness changes four times a second and never falls to nothing."""
    time_s = np.arange(round(seconds * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    rng = np.random.default_rng(seed)
    tones = [np.sin(2 * np.pi * k * pitch_hz * time_s + rng.uniform(0, 6)) / k for k in range(1, 20)]
    envelope = 0.6 + 0.4 * np.sin(2 * np.pi * 4 * time_s) ** 2
    return (0.2 * envelope * np.asarray(sum(tones))).astype(np.float32)


def noise(seconds: float, loudness: float = 0.002, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, loudness, round(seconds * SAMPLE_RATE_HZ)).astype(np.float32)


class PlantedAnswer:
    """Words one by one; it says whether it was closed."""

    def __init__(self, words: Sequence[str], prompt_tokens: int) -> None:
        self.words, self.prompt_tokens, self.closed = list(words), prompt_tokens, False

    def next(self) -> tuple[str, int] | None:
        return (self.words.pop(0), 1) if self.words else None

    def close(self) -> None:
        self.closed = True


class PlantedMind:
    """High voices ask, low ones do not; every answer is the same.

    Args:
        words: Of every answer.
    """

    def __init__(self, words: Sequence[str] = ("one ", "two ", "three"), prompt_tokens: int = 40) -> None:
        self.words, self.prompt_tokens = words, prompt_tokens
        self.judged: list[int] = []
        self.answers: list[PlantedAnswer] = []
        self.remembered: list[tuple[str, str]] = []
        self.shown: list[MediaItem | None] = []

    def judge(self, wave: np.ndarray) -> Judgement:
        self.judged.append(len(wave))
        spectrum = np.abs(np.fft.rfft(wave * np.hanning(len(wave))))
        loudest_hz = float(np.fft.rfftfreq(len(wave), 1 / SAMPLE_RATE_HZ)[spectrum.argmax()])
        return Judgement(0.9 if loudest_hz > 200 else 0.1, self.prompt_tokens)

    def answer(self, said: np.ndarray | str) -> PlantedAnswer:
        self.answers.append(PlantedAnswer(self.words, self.prompt_tokens))
        return self.answers[-1]

    def show(self, picture: MediaItem | None) -> None:
        self.shown.append(picture)

    def remember(self, said: np.ndarray | str, answer: str) -> None:
        self.remembered.append((said if isinstance(said, str) else "sound", answer))


QUESTION_HZ, TALK_HZ = 260.0, 120.0
