"""Eight synthetic sounds, different enough that an ear needs no training to tell them.

Each draw has its own pitch, pace, decay, hiss and loudness. What makes a sound itself is
its course in time (steady, struck, swept, ticking) rather than its pitch, so that no
single frequency gives it away.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.random import Generator

from avlm.data.world.words import Sound

SAMPLE_RATE_HZ = 16_000


def draw_sound(name: Sound, seconds: float, rng: Generator) -> np.ndarray:
    """Make one sound; another call makes another of its kind.

    Returns:
        Mono waveform at 16 kHz, float32 within -1 to 1.
    """
    time_s = np.arange(round(seconds * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    wave = _MAKERS[name](time_s, rng)
    wave = wave / max(float(np.abs(wave).max()), 1e-9)
    hiss = rng.normal(0, 10 ** (-rng.uniform(35, 50) / 20), len(wave))
    return (_soft_ends(wave + hiss) * rng.uniform(0.3, 0.85)).clip(-1, 1).astype(np.float32)


def write_wav(path: Path, wave: np.ndarray) -> None:
    """Write a mono waveform within -1 to 1 as 16-bit PCM at 16 kHz."""
    import soundfile  # costs start-up time that importing the world should not

    soundfile.write(path, wave, SAMPLE_RATE_HZ, subtype="PCM_16", format="WAV")


def _siren(time_s: np.ndarray, rng: Generator) -> np.ndarray:
    """A tone that wails up and down."""
    low_hz, high_hz = rng.uniform(450, 650), rng.uniform(1000, 1400)
    turn = (time_s * rng.uniform(1.6, 3.0) + rng.random()) % 1
    pitch_hz = low_hz + (high_hz - low_hz) * (1 - np.abs(2 * turn - 1))
    return _tone(pitch_hz, (1.0, 0.5, 0.25))


def _bell(time_s: np.ndarray, rng: Generator) -> np.ndarray:
    """Struck metal: partials off the harmonic series, dying away one after the other."""
    pitch_hz, decay_s = rng.uniform(500, 900), rng.uniform(0.25, 0.5)
    wave = np.zeros_like(time_s)
    for strike_s in _beats(time_s, rng, gap_s=(0.45, 0.7), late_s=0.05):
        since_s = np.maximum(time_s - strike_s, 0)
        struck = time_s >= strike_s
        for ratio, loudness in ((1, 1.0), (2.0, 0.6), (2.76, 0.5), (4.1, 0.3), (5.4, 0.25)):
            fade = np.exp(-since_s * ratio**0.6 / decay_s)
            wave += struck * loudness * fade * np.sin(2 * np.pi * pitch_hz * ratio * since_s)
    return wave


def _drum(time_s: np.ndarray, rng: Generator) -> np.ndarray:
    """Low thumps, each falling in pitch, with a slap at the start."""
    pitch_hz, decay_s = rng.uniform(70, 120), rng.uniform(0.06, 0.11)
    wave = np.zeros_like(time_s)
    for beat_s in _beats(time_s, rng, gap_s=(0.18, 0.32), late_s=0.08):
        since_s = np.maximum(time_s - beat_s, 0)
        hit = (time_s >= beat_s) * rng.uniform(0.7, 1.0)
        drop = pitch_hz * (since_s + 0.03 * (1 - np.exp(-since_s / 0.03)))
        wave += hit * np.exp(-since_s / decay_s) * np.sin(2 * np.pi * drop)
        wave += hit * 0.4 * np.exp(-since_s / 0.006) * rng.normal(size=len(time_s))
    return wave


def _rain(time_s: np.ndarray, rng: Generator) -> np.ndarray:
    """A broad rush with drops in it."""
    rush = rng.normal(size=len(time_s))
    # First differences lean on the high frequencies, as rain on leaves does.
    lean = rng.uniform(0.3, 0.7)
    rush[1:] -= lean * rush[:-1]
    drops = rng.random(len(time_s)) < rng.uniform(20, 60) / SAMPLE_RATE_HZ
    splash = np.exp(-np.arange(200) / 40) * rng.normal(size=200)
    return rush + 3 * np.convolve(drops * rng.uniform(0.5, 1.5, len(time_s)), splash)[: len(time_s)]


def _whistle(time_s: np.ndarray, rng: Generator) -> np.ndarray:
    """One high, clear, breathy note that trembles a little."""
    tremble = np.sin(2 * np.pi * rng.uniform(5, 8) * time_s + rng.uniform(0, 6))
    pitch_hz = rng.uniform(1700, 2700) * (1 + 0.012 * tremble)
    onset = 1 - 0.25 * np.exp(-time_s / 0.04)
    breath = rng.normal(0, 0.06, len(time_s))
    return _tone(pitch_hz * onset, (1.0, 0.08)) + breath


def _buzzer(time_s: np.ndarray, rng: Generator) -> np.ndarray:
    """A low, harsh, unmoving note rich in harmonics."""
    pitch_hz = np.full_like(time_s, rng.uniform(100, 190))
    return _tone(pitch_hz, tuple(1 / order**0.7 for order in range(1, 16)))


def _bird(time_s: np.ndarray, rng: Generator) -> np.ndarray:
    """Short quick chirps, each a falling or rising sweep far up."""
    high_hz, span_hz = rng.uniform(3600, 5000), rng.uniform(900, 1700) * rng.choice([-1, 1])
    length_s = rng.uniform(0.05, 0.09)
    wave = np.zeros_like(time_s)
    for chirp_s in _beats(time_s, rng, gap_s=(0.12, 0.2), late_s=0.05):
        part = np.clip((time_s - chirp_s) / length_s, 0, 1)
        pitch_hz = high_hz - span_hz * part
        wave += np.sin(np.pi * part) ** 2 * _tone(pitch_hz, (1.0, 0.1))
    return wave


def _clock(time_s: np.ndarray, rng: Generator) -> np.ndarray:
    """Dry ticks, every other one lower, with silence between."""
    pitch_hz, decay_s = rng.uniform(1800, 2800), rng.uniform(0.004, 0.009)
    wave = np.zeros_like(time_s)
    for number, tick_s in enumerate(_beats(time_s, rng, gap_s=(0.22, 0.34), late_s=0.1)):
        since_s = np.maximum(time_s - tick_s, 0)
        tick_hz = pitch_hz * (0.75 if number % 2 else 1.0)
        ring = np.sin(2 * np.pi * tick_hz * since_s) + 0.5 * rng.normal(size=len(time_s))
        wave += (time_s >= tick_s) * np.exp(-since_s / decay_s) * ring
    return wave


_MAKERS: dict[Sound, Callable[[np.ndarray, Generator], np.ndarray]] = {
    "siren": _siren,
    "bell": _bell,
    "drum": _drum,
    "rain": _rain,
    "whistle": _whistle,
    "buzzer": _buzzer,
    "bird": _bird,
    "clock": _clock,
}


def _tone(pitch_hz: np.ndarray, loudnesses: tuple[float, ...]) -> np.ndarray:
    """A note of moving pitch with its harmonics, those above 7.5 kHz left out."""
    phase = 2 * np.pi * np.cumsum(pitch_hz) / SAMPLE_RATE_HZ
    return sum(
        (
            loudness * np.sin(order * phase) * (order * pitch_hz < 7500)
            for order, loudness in enumerate(loudnesses, start=1)
        ),
        np.zeros_like(phase),
    )


def _beats(time_s: np.ndarray, rng: Generator, *, gap_s: tuple[float, float], late_s: float) -> list[float]:
    """Moments at one pace, a little uneven, from near the start to the end."""
    gap, moment_s = rng.uniform(*gap_s), rng.uniform(0, late_s)
    beats = []
    while moment_s < time_s[-1] - 0.03:
        beats.append(moment_s)
        moment_s += gap * rng.uniform(0.94, 1.06)
    return beats


def _soft_ends(wave: np.ndarray) -> np.ndarray:
    """Fade in and out over 5 ms: a hard edge would click."""
    ramp = np.linspace(0, 1, SAMPLE_RATE_HZ // 200)
    wave[: len(ramp)] *= ramp
    wave[-len(ramp) :] *= ramp[::-1]
    return wave
