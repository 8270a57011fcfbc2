"""A model of which is known what it will say: it looks into a list of sounds, not into itself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from avlm.data.voice.gate import SAMPLE_RATE_HZ
from avlm.inference.live.mind import Judgement
from avlm.samples import MediaItem


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
