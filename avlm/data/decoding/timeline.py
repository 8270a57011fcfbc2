"""Decoded sound, collected as it comes and laid where its clocks say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

JITTER_S = 0.2
"""Clocks of sound that are off by less are taken for imprecise; by more, for a gap or an overlap."""
TOGETHER = 64
"""Stretches whose channels are averaged at once. Decoders give fifty a second, and of so few samples NumPy takes longer
to find out what it is to do than to do it."""
MOST_ROOM = 2**22
"""Samples for which room is made before they come, whatever a header promises."""


class Stretches:
    """Sound in one channel, stretch by stretch, with the clock of each.

    Args:
        expected: Samples for which room is made at once, so that they need not be copied.
    """

    def __init__(self, expected: int = 0) -> None:
        self.clocks: list[float] = []
        """Seconds."""
        self.lengths: list[int] = []
        """Samples."""
        self._room = np.empty(min(expected, MOST_ROOM), np.float32)
        self._count = 0
        """Samples of it that are sound."""
        self._other = np.empty(0, np.float32)
        self._waiting: list[tuple[Any, int]] = []
        """Channels that are not averaged yet, each of them apart, and samples."""

    def __len__(self) -> int:
        return len(self.clocks)

    def add(self, clock: float, frame: Any) -> None:
        """A stretch behind those that are there; `frame` is an `av.AudioFrame`."""
        samples = frame.samples
        self.clocks.append(clock)
        self.lengths.append(samples)
        if frame.format.name != "fltp":  # what nearly all decoders give
            self._average()
            self._next(samples)[:] = _mono(frame)
            return
        planes = frame.planes
        if self._waiting and len(planes) != len(self._waiting[0][0]):
            self._average()
        self._waiting.append((planes, samples))
        if len(self._waiting) == TOGETHER:
            self._average()

    def _average(self) -> None:
        """Average the channels ourselves: libswresample's downmix is louder by the square root of two."""
        if not self._waiting:
            return
        count, channels = sum(samples for _, samples in self._waiting), len(self._waiting[0][0])
        wave = self._next(count)
        if channels > 1 and len(self._other) < count:
            self._other = np.empty(count, np.float32)
        for i in range(channels):
            parts = [np.frombuffer(planes[i], np.float32, samples) for planes, samples in self._waiting]
            np.concatenate(parts, out=self._other[:count] if i else wave)
            if i:
                wave += self._other[:count]
        if channels > 1:
            wave /= np.float32(channels)
        self._waiting = []

    def _next(self, count: int) -> np.ndarray:
        """Room for so many samples behind those that are there."""
        begin, self._count = self._count, self._count + count
        if self._count > len(self._room):
            room = np.empty(max(self._count, len(self._room) * 3 // 2), np.float32)
            room[:begin] = self._room[:begin]
            self._room = room
        return self._room[begin : self._count]

    def laid(self, rate_hz: int, count: int, start_s: float = 0.0) -> np.ndarray:
        """What was heard on a timeline of its own, silent where nothing was.

        Args:
            count: Samples of the timeline.
            start_s: What the clocks say where it begins.

        Returns:
            float32 [count].
        """
        self._average()
        sound = self._room[: self._count]
        return on_timeline(sound, [clock - start_s for clock in self.clocks], self.lengths, rate_hz, count)


def on_timeline(
    sound: np.ndarray, clocks: Sequence[float], lengths: Sequence[int], rate_hz: int, count: int
) -> np.ndarray:
    """Lay sound where its clocks say.

    Args:
        sound: float32, all stretches end to end.
        clocks: Seconds at which each of them is due.
        lengths: Samples of each.

    Returns:
        float32 [count], from time 0 on.
    """
    runs = [(place, begin, end) for place, begin, end in _runs(clocks, lengths, rate_hz) if begin < end]
    if len(runs) == 1:  # as nearly always, and then mostly of all the timeline: it need not be copied
        place, begin, end = runs[0]
        if place <= 0 and place + end - begin >= count:
            return sound[begin - place : begin - place + count]
    wave = np.zeros(count, np.float32)
    for place, begin, end in runs:
        first, last = max(0, place), min(count, place + end - begin)
        if first < last:
            wave[first:last] = sound[begin + first - place : begin + last - place]
    return wave


def _runs(clocks: Sequence[float], lengths: Sequence[int], rate_hz: int) -> Iterator[tuple[int, int, int]]:
    """Where stretches that follow each other without a gap lie: their place on the timeline, and what of the sound they
    are, from which sample to which. Of two that overlap the second gives way."""
    at, place, begin, done = 0, 0, 0, 0
    for number, (clock, length) in enumerate(zip(clocks, lengths, strict=True)):
        due, lost = round(clock * rate_hz), 0
        if number == 0 or abs(due - at) > JITTER_S * rate_hz:
            yield place, begin, done
            at = place = due if number == 0 else max(due, at)
            lost = min(place - due, length)
            begin = done + lost
        at += length - lost
        done += length
    yield place, begin, done


def _mono(frame: Any) -> np.ndarray:
    """The average of the channels of a frame in whatever form its decoder gives it."""
    samples: np.ndarray = frame.to_ndarray()
    if not frame.format.is_planar:
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    if samples.dtype.kind in "iu":
        full = float(2 ** (8 * samples.dtype.itemsize - 1))
        middle = full if samples.dtype.kind == "u" else 0.0
        samples = (samples.astype(np.float32) - middle) / full
    mono: np.ndarray = samples.astype(np.float32).mean(0)
    return mono
