"""A voice activity gate: where somebody may be speaking. Whether it is meant for the model is not its business.

A frame of 20 ms may be speech where it is louder than the room by some decibels and its
spectrum, divided by the room's, is not flat. The room is what the last seconds had at
their quietest, so it follows a fan that is switched on and is not lifted by somebody who
talks; its spectrum is learned while the gate is shut. Plain NumPy, some 40 us a frame.

Source:
    Minimum statistics for the floor (Martin, IEEE Transactions on Speech and Audio
    Processing 9(5), 2001, without its bias correction) and spectral flatness
    (Gray and Markel, IEEE Transactions on ASSP 22(3), 1974).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Literal

import numpy as np

from avlm.errors import ConfigError

SAMPLE_RATE_HZ = 16_000
FRAME = 320
"""Samples in a frame: 20 ms."""
FRAME_MS = 1000 * FRAME // SAMPLE_RATE_HZ

_FFT = 512
_LOW, _HIGH = 150 * _FFT // SAMPLE_RATE_HZ, 4000 * _FFT // SAMPLE_RATE_HZ
_WINDOW = np.hanning(FRAME + 80)
_SILENCE_DB = -65.0
_ROOM_DB = -50.0
"""What a room is taken for before it was heard."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GateSettings:
    """When the gate opens, and when it shuts."""

    above_db: float = 8.0
    """So much louder than the room a frame must be."""
    flatness: float = 0.42
    """Flatter frames are noise. White noise is at 0.56 (the geometric over the arithmetic mean), voices under 0.3."""
    start_ms: int = 60
    """So long must it last before the gate opens."""
    pause_ms: int = 160
    """A pause after which it is worth asking what was said so far."""
    end_ms: int = 400
    """A pause after which somebody has finished."""
    before_ms: int = 120
    """So much of what was before somebody spoke is handed over with it, as beginnings are soft; and behind it
    `pause_ms`, however long the pause was, so that what is judged in a pause is what is answered after it."""
    shortest_ms: int = 160
    """Anything shorter is a click."""
    longest_ms: int = 15_000
    """Who speaks longer is taken in parts."""
    room_ms: int = 3000
    """The room is what the quietest of so much time was."""

    def __post_init__(self) -> None:
        if not FRAME_MS <= self.pause_ms <= self.end_ms:
            raise ConfigError(
                f"pause_ms={self.pause_ms} is no pause within end_ms={self.end_ms}. "
                f"Use at least {FRAME_MS} and at most {self.end_ms}"
            )
        if not 0 < self.flatness <= 1:
            raise ConfigError(f"flatness={self.flatness} is no share of 1, and at 0 nothing is speech. Use 0.42, say")
        if self.longest_ms <= self.shortest_ms:
            raise ConfigError(
                f"longest_ms={self.longest_ms} is not longer than shortest_ms={self.shortest_ms}, so nothing would "
                "pass. Use 15000, say"
            )


@dataclass(frozen=True, slots=True)
class Passage:
    """Something that went through the gate, or is going."""

    start: int
    """First sample that is speech, counted from the beginning of the stream."""
    end: int
    """End of its last frame of speech."""
    wave: np.ndarray
    """float32, with a little of what was before and behind it."""


@dataclass(frozen=True, slots=True)
class Gated:
    """What the gate noticed with one frame."""

    what: Literal["opened", "paused", "shut", "dropped"]
    """`paused` comes once in each pause, before `shut`; `dropped` is too short to be anything."""
    passage: Passage


class Gate:
    """Takes a stream frame by frame."""

    def __init__(self, settings: GateSettings | None = None) -> None:
        self.settings = settings or GateSettings()
        self.now = 0
        """Samples taken."""
        self._quietest: deque[float] = deque([_ROOM_DB] * 25, maxlen=self.settings.room_ms // FRAME_MS)
        self._loudness: deque[float] = deque(maxlen=5)
        self._room: np.ndarray | None = None
        self._last = np.zeros(80, np.float32)
        self._kept: deque[np.ndarray] = deque(maxlen=self._frames("before_ms") + self._frames("start_ms"))
        self._speech: list[np.ndarray] = []
        self._start = self._end = 0
        self._run = 0

    def _frames(self, name: str) -> int:
        return max(1, int(getattr(self.settings, name)) // FRAME_MS)

    @property
    def open(self) -> bool:
        """Whether somebody is speaking, or has just paused."""
        return bool(self._speech)

    def take(self, frame: np.ndarray) -> list[Gated]:
        """One frame more.

        Args:
            frame: float32 [320], mono at 16 kHz.

        Returns:
            What was noticed; mostly nothing.
        """
        active = self._is_speech(frame)
        self.now += FRAME
        if self._speech:
            return self._go_on(frame, active)
        self._kept.append(frame)
        self._run = self._run + 1 if active else 0
        if self._run < self._frames("start_ms"):
            return []
        self._start, self._end = self.now - self._run * FRAME, self.now
        self._speech = list(self._kept)
        self._kept.clear()
        self._run = 0
        return [Gated("opened", self._passage())]

    def _go_on(self, frame: np.ndarray, active: bool) -> list[Gated]:
        self._speech.append(frame)
        if active:
            self._end = self.now
        silent = (self.now - self._end) // FRAME
        if len(self._speech) >= self._frames("longest_ms") or silent >= self._frames("end_ms"):
            return self._shut()
        return [Gated("paused", self._passage())] if silent == self._frames("pause_ms") and self._is_long() else []

    def finish(self) -> list[Gated]:
        """The stream ends; whoever is speaking has finished."""
        return self._shut() if self._speech else []

    def _shut(self) -> list[Gated]:
        passage = self._passage()
        self._speech = []
        return [Gated("shut" if self._is_long() else "dropped", passage)]

    def _is_long(self) -> bool:
        """Whether what is being said is more than a click."""
        return self._end - self._start >= self.settings.shortest_ms * SAMPLE_RATE_HZ // 1000

    def _passage(self) -> Passage:
        wave = np.concatenate(self._speech)
        behind = self.settings.pause_ms * SAMPLE_RATE_HZ // 1000
        return Passage(self._start, self._end, wave[: len(wave) - max(0, self.now - self._end - behind)])

    def _is_speech(self, frame: np.ndarray) -> bool:
        """Whether a frame may be speech; the room is learned on the way."""
        whole = np.concatenate([self._last, frame])
        self._last = frame[-80:]
        power = np.abs(np.fft.rfft(whole * _WINDOW, _FFT)) ** 2
        band = power[_LOW:_HIGH] + 1e-12
        loudness_db = max(10 * float(np.log10(band.sum() / (_WINDOW**2).sum() / _FFT * 2)), _SILENCE_DB)
        self._loudness.append(loudness_db)
        self._quietest.append(sum(self._loudness) / len(self._loudness))
        if self._room is None:
            self._room = np.full_like(band, band.mean())
        whitened = band / self._room
        flatness = float(np.exp(np.log(whitened).mean()) / whitened.mean())
        active = loudness_db > min(self._quietest) + self.settings.above_db and flatness < self.settings.flatness
        if not active and not self._speech:
            self._room = 0.95 * self._room + 0.05 * band
        return active


def passages(wave: np.ndarray, settings: GateSettings | None = None) -> list[Passage]:
    """What a gate lets through of a recording: what a session hears of it, if it hears nothing else before.

    Args:
        wave: float32, mono, 16 kHz; what is left behind its last whole frame is not heard.
    """
    gate = Gate(settings)
    frames = wave[: len(wave) // FRAME * FRAME].reshape(-1, FRAME)
    noticed = [gated for frame in frames for gated in gate.take(frame)] + gate.finish()
    return [gated.passage for gated in noticed if gated.what == "shut"]
