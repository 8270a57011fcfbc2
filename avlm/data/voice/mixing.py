"""Sounds put together as a microphone would hear them: one in front, one behind it, a room around both."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.random import Generator

from avlm.data.voice.gate import SAMPLE_RATE_HZ, GateSettings, passages
from avlm.data.world.words import Split

QUIET = 1e-9


def _coloured(power: float) -> Callable[[int, Generator], np.ndarray]:
    """Noise whose power falls with frequency to this power: 0 is white, 1 pink, 2 brown."""

    def make(samples: int, rng: Generator) -> np.ndarray:
        spectrum = np.fft.rfft(rng.normal(size=samples))
        return np.asarray(np.fft.irfft(spectrum / np.maximum(np.arange(len(spectrum)), 1) ** (power / 2), samples))

    return make


def _hum(samples: int, rng: Generator) -> np.ndarray:
    """The mains and its harmonics, under a little hiss."""
    time_s = np.arange(samples) / SAMPLE_RATE_HZ
    base_hz = rng.choice([50.0, 60.0])
    tones = [np.sin(2 * np.pi * base_hz * k * time_s + rng.uniform(0, 6)) / k for k in (1, 2, 3, 5, 7)]
    return np.asarray(sum(tones)) + rng.normal(0, 0.1, samples)


def _crackle(samples: int, rng: Generator) -> np.ndarray:
    """Single clicks, as of a fire or an old record."""
    clicks = (rng.random(samples) < rng.uniform(5, 25) / SAMPLE_RATE_HZ) * rng.normal(size=samples)
    return np.convolve(clicks, np.exp(-np.arange(60) / 8))[:samples] + rng.normal(0, 0.01, samples)


def _fan(samples: int, rng: Generator) -> np.ndarray:
    """Pink noise that swells and fades as blades go by."""
    time_s = np.arange(samples) / SAMPLE_RATE_HZ
    swell = 1 + 0.5 * np.sin(2 * np.pi * rng.uniform(4, 11) * time_s)
    return np.asarray(_coloured(1.2)(samples, rng) * swell)


def _keys(samples: int, rng: Generator) -> np.ndarray:
    """A keyboard: short dull knocks at an uneven pace."""
    wave = rng.normal(0, 0.01, samples)
    at = int(rng.uniform(0, 0.1) * SAMPLE_RATE_HZ)
    knock = np.exp(-np.arange(480) / rng.uniform(40, 90))
    while at + len(knock) < samples:
        wave[at : at + len(knock)] += rng.uniform(0.4, 1) * knock * rng.normal(size=len(knock))
        at += int(rng.uniform(0.08, 0.35) * SAMPLE_RATE_HZ)
    return wave


NOISES: dict[Split, dict[str, Callable[[int, Generator], np.ndarray]]] = {
    "train": {"white": _coloured(0), "brown": _coloured(2), "hum": _hum, "crackle": _crackle},
    "eval": {"pink": _coloured(1), "fan": _fan, "keys": _keys},
}
"""Noises of each split; those of one are in no other."""


def draw_noise(name: str, split: Split, samples: int, rng: Generator) -> np.ndarray:
    """One of a split's noises, with its highest amplitude at 1.

    Returns:
        float32 [samples], 16 kHz.
    """
    wave = NOISES[split][name](samples, rng)
    return (wave / max(float(np.abs(wave).max()), QUIET)).astype(np.float32)


def level(wave: np.ndarray) -> float:
    """Root mean square of the louder half of a wave's stretches of 20 ms: pauses do not make speech quieter."""
    frames = wave[: len(wave) // 320 * 320].reshape(-1, 320) if len(wave) >= 320 else wave[None]
    powers = np.sort((frames.astype(np.float64) ** 2).mean(1))
    return float(np.sqrt(powers[len(powers) // 2 :].mean()))


def beside(front: np.ndarray, behind: np.ndarray, snr_db: float) -> np.ndarray:
    """Two waves at once, the second quieter by so many decibels; it is cut or repeated to the length of the first."""
    gain = level(front) / max(level(behind), QUIET) * 10 ** (-snr_db / 20)
    return np.asarray(front + gain * np.resize(behind, len(front)))


def in_room(wave: np.ndarray, room: np.ndarray, *, before_s: float, snr_db: float, loudness: float) -> np.ndarray:
    """A wave in a room whose noise goes on before and behind it.

    Args:
        room: Noise of the room; it sets the length of what comes out.
        before_s: When the wave begins.
        snr_db: How much louder than the room it is.
        loudness: Highest amplitude of what comes out.

    Returns:
        float32 [len(room)].
    """
    start = int(before_s * SAMPLE_RATE_HZ)
    out = room * (level(wave) / max(level(room), QUIET) * 10 ** (-snr_db / 20))
    out[start : start + len(wave)] += wave[: len(out) - start]
    return (out / max(float(np.abs(out).max()), QUIET) * loudness).astype(np.float32)


def let_through(heard: np.ndarray, start: int, length: int) -> np.ndarray:
    """What a session's gate hands over of a sound within a recording: the passage that has most of it.

    What no gate opens for (a fan, say) is taken with as much before and behind it as one would leave.

    Returns:
        float32; cut from `heard`.
    """
    end = start + length
    shared = {min(end, p.end) - max(start, p.start): p.wave for p in passages(heard)}
    if shared and max(shared) > 0:
        return shared[max(shared)]
    settings = GateSettings()
    before, behind = (ms * SAMPLE_RATE_HZ // 1000 for ms in (settings.before_ms, settings.pause_ms))
    return heard[max(0, start - before) : end + behind]
