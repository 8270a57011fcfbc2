"""Small numbers by which texts, pictures and sounds that are nearly the same find each other.

A *sketch* is a few bytes that near ones mostly share; a *view* is what two that share
them are compared by: a picture of 32 x 32 pixels, or how loud 16 bands are at 32 moments.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

import numpy as np
from PIL import Image

SHINGLE = 5
"""Characters in a row that are compared as one."""
BANDS, ROWS = 10, 4
"""Texts with a share s of shingles in common share one of the bands with probability 1 - (1 - s^4)^10."""
NEAR_TEXT = 0.8
"""Share of shingles from which on texts are nearly the same; 0.995 of the pairs with it share a band."""
LONGEST = 20_000
"""Characters of a text that are compared."""

SIDE = 32
MOMENTS, PITCHES = 32, 16
FRAME = 512
"""Samples of one spectrum of a sound."""
RATE_HZ = 16_000
LOW_HZ, HIGH_HZ = 100.0, 3800.0
"""Bands of a sound that is compared: what telephone recordings have, too."""
FLOOR_DB = -50.0

_WORDS = re.compile(r"[\W_]+")
_U64 = np.uint64


@lru_cache(maxsize=1)
def _hashes() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Powers for shingles, and factors and terms of as many hash functions as there are rows in all bands."""
    rng = np.random.default_rng(20_040)
    factors = rng.integers(0, 2**63, BANDS * ROWS, dtype=_U64) * _U64(2) + _U64(1)
    terms = rng.integers(0, 2**63, BANDS * ROWS, dtype=_U64)
    powers = rng.integers(0, 2**63, SHINGLE, dtype=_U64) * _U64(2) + _U64(1)
    return powers, factors, terms


def plain(text: str) -> str:
    """A text as it is compared: in small letters, without punctuation."""
    return _WORDS.sub(" ", unicodedata.normalize("NFKC", text[:LONGEST]).casefold()).strip()


def shingles(text: str) -> np.ndarray:
    """uint64, a number for each run of characters of a plain text, each once and ascending."""
    letters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(_U64)
    if len(letters) < SHINGLE:
        letters = np.pad(letters, (0, SHINGLE - len(letters)))
    powers, _, _ = _hashes()
    runs = np.lib.stride_tricks.sliding_window_view(letters, SHINGLE)
    mixed = (runs * powers).sum(1)
    return np.unique(mixed ^ (mixed >> _U64(29)))


def text_bands(text: str) -> np.ndarray:
    """MinHash: uint32 [bands] of a text. Two with one band in common are candidates.

    Source:
        Broder, "On the resemblance and containment of documents" (1997); bands as in Leskovec, Rajaraman and Ullman,
        "Mining of Massive Datasets", section 3.4.
    """
    _, factors, terms = _hashes()
    found = shingles(plain(text))
    least = ((factors[:, None] * found + terms[:, None]) >> _U64(32)).min(1).reshape(BANDS, ROWS)
    mixed = np.zeros(BANDS, _U64)
    for row in range(ROWS):
        mixed = (mixed ^ least[:, row]) * factors[0]
        mixed ^= mixed >> _U64(32)
    return mixed.astype(np.uint32)


def resemblance(one: str, other: str) -> float:
    """Share of shingles that two texts have in common, of those that either has (Jaccard)."""
    a, b = shingles(plain(one)), shingles(plain(other))
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / (len(a) + len(b) - both)


# ---------------------------------------------------------------- pictures


def picture_view(pixels: np.ndarray) -> np.ndarray:
    """uint8 [h, w, 3] to uint8 [32, 32, 3], each pixel the mean of what it covers."""
    return np.asarray(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BOX))


def picture_sketch(view: np.ndarray) -> tuple[int, int]:
    """Where a picture gets lighter to the right, and where downwards, on a grid of 8 x 8: 64 bits each.

    Source:
        The difference hash (dHash; Neal Krawetz, "Kind of Like That", 2013), in both directions.
    """
    grey = Image.fromarray(view).convert("L")
    across = np.asarray(grey.resize((9, 8), Image.Resampling.BOX), np.int16)
    down = np.asarray(grey.resize((8, 9), Image.Resampling.BOX), np.int16)
    return _bits(np.diff(across, axis=1) > 2), _bits(np.diff(down, axis=0) > 2)


def same_picture(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two pictures, uint8 [h, w, 3], are one, up to compression, size and noise."""
    (high, wide), (other_high, other_wide) = one.shape[:2], other.shape[:2]
    if abs(high * other_wide - wide * other_high) > 0.03 * high * other_wide:
        return False
    a, b = picture_view(one).astype(np.float32), picture_view(other).astype(np.float32)
    if float(np.abs(a - b).mean()) > 6:
        return False
    spread = float(a.std() * b.std())
    return spread < 4 or float(((a - a.mean()) * (b - b.mean())).mean()) / spread > 0.98


# ---------------------------------------------------------------- sounds


@lru_cache(maxsize=1)
def _bands_of_bins() -> np.ndarray:
    """Which band each bin of a spectrum is in, int [bins]; -1 for none."""
    hz = np.fft.rfftfreq(FRAME, 1 / RATE_HZ)
    edges = np.geomspace(LOW_HZ, HIGH_HZ, PITCHES + 1)
    band = np.searchsorted(edges, hz, side="right") - 1
    band[(hz < LOW_HZ) | (hz >= HIGH_HZ)] = -1
    found: np.ndarray = band
    return found


def sound_view(wave: np.ndarray) -> np.ndarray:
    """float32 [moments, bands]: how loud a sound at 16 kHz is, in decibels below its loudest, to a floor."""
    wave = np.pad(wave, (0, max(0, FRAME - len(wave))))
    per_moment = int(np.clip(len(wave) // (FRAME * MOMENTS), 1, 16))
    starts = np.linspace(0, len(wave) - FRAME, MOMENTS * per_moment).astype(int)
    frames = wave[starts[:, None] + np.arange(FRAME)] * np.hanning(FRAME).astype(np.float32)
    power = np.abs(np.fft.rfft(frames, axis=1)) ** 2
    band = _bands_of_bins()
    loud = np.stack([power[:, band == b].sum(1) for b in range(PITCHES)], 1)
    loud = loud.reshape(MOMENTS, per_moment, PITCHES).mean(1)
    level = 10 * np.log10(loud / max(float(loud.max()), 1e-20) + 1e-12)
    found: np.ndarray = np.maximum(level, FLOOR_DB).astype(np.float32)
    return found


def sound_sketch(view: np.ndarray) -> tuple[int, int]:
    """Which cells of a grid of 8 moments by 16 bands are louder than most: 128 bits."""
    cells = view.reshape(8, MOMENTS // 8, PITCHES).mean(1)
    loud = cells > max(float(np.median(cells)), FLOOR_DB + 3)
    return _bits(loud[:4]), _bits(loud[4:])


def same_sound(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two sounds at 16 kHz are one recording, up to level, rate and compression.

    Both must be about as loud in each band at each moment, and go up and down together from one window to the next: two
    draws of one noise, or one word said twice, are alike in the first and not in the second.
    """
    a, b = sound_view(one), sound_view(other)
    heard = (a > FLOOR_DB) | (b > FLOOR_DB)
    if not heard.any() or float(np.abs(a - b)[heard].mean()) > 3:
        return False
    a, b = _ripple(one), _ripple(other)
    if min(float(a.std()), float(b.std())) < 0.5:
        return True  # steady tones, and their bands are the same
    return max(_likeness(a, b, lag) for lag in range(-4, 5)) > 0.6


def _ripple(wave: np.ndarray) -> np.ndarray:
    """float32 [bands, windows]: how the level in each band changes, window by window of 16 ms, about its mean."""
    wave = np.pad(wave[: RATE_HZ * 30], (0, max(0, 4 * FRAME - len(wave))))
    frames = np.lib.stride_tricks.sliding_window_view(wave, FRAME)[:: FRAME // 2] * np.hanning(FRAME).astype(np.float32)
    power = np.abs(np.fft.rfft(frames, axis=1)) ** 2
    band = _bands_of_bins()
    loud = np.stack([power[:, band == b].sum(1) for b in range(PITCHES)])
    level = np.maximum(10 * np.log10(loud / max(float(loud.max()), 1e-20) + 1e-12), FLOOR_DB)
    ripple: np.ndarray = np.diff(level, axis=1).astype(np.float32)
    return ripple


def _likeness(one: np.ndarray, other: np.ndarray, lag: int) -> float:
    """Correlation of two ripples, one of them later by some windows."""
    a, b = one[:, max(0, lag) :], other[:, max(0, -lag) :]
    count = min(a.shape[1], b.shape[1])
    if count < 2:
        return 0.0
    a, b = a[:, :count], b[:, :count]
    return float((a * b).sum() / max(1e-6, float(np.sqrt((a * a).sum() * (b * b).sum()))))


def _bits(flags: np.ndarray) -> int:
    return int.from_bytes(np.packbits(flags.ravel()).tobytes(), "big")
