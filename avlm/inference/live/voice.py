"""Spoken answers: clause by clause, as soon as a clause is there."""

from __future__ import annotations

import re
from typing import Protocol

import numpy as np

from avlm.data.voice.drawing import OWN_VOICE
from avlm.data.voice.gate import SAMPLE_RATE_HZ
from avlm.data.world.speech import Espeak, require_speech, trim

SHORTEST = 5
"""Characters of a clause that is spoken by itself; VITA's demo has the same figure."""
_END = re.compile(r"[.!?;:,\u3002\uff01\uff1f\uff0c](?=\s|$)")


class Voice(Protocol):
    """Says a text."""

    def say(self, text: str) -> np.ndarray:
        """The text as sound: float32, mono, 16 kHz."""


class EspeakVoice:
    """espeak-ng, one clause at a time. Make one, once: the library keeps global state.

    Raises:
        MissingExtraError: espeakng-loader is not installed.
        AvlmError: There is no such voice (when it speaks first).
    """

    def __init__(self, voice: str = OWN_VOICE, rate_wpm: int = 170) -> None:
        require_speech()
        self._espeak, self.voice, self.rate_wpm = Espeak(), voice, rate_wpm

    def say(self, text: str) -> np.ndarray:
        said = trim(self._espeak.say(text, voice=self.voice, rate_wpm=self.rate_wpm, pitch=50))
        return np.pad(said, (0, SAMPLE_RATE_HZ // 20)).astype(np.float32)


class Clauses:
    """Cuts a text that arrives in pieces where a speaker would draw breath."""

    def __init__(self) -> None:
        self._open = ""

    def add(self, text: str) -> list[str]:
        """Clauses that are complete now. A mark at the very end waits: what follows may belong to it (3.5, e.g.)."""
        self._open += text
        found, start = [], 0
        for mark in _END.finditer(self._open):
            end = mark.end()
            if end - start >= SHORTEST and end < len(self._open):
                found.append(self._open[start:end].strip())
                start = end
        self._open = self._open[start:]
        return [clause for clause in found if clause]

    def end(self) -> list[str]:
        """What is left; a clause without a letter or a digit is nothing to say."""
        rest, self._open = self._open.strip(), ""
        return [rest] if any(c.isalnum() for c in rest) else []
