"""Changes to pictures and sounds while training. None changes how many tokens a medium takes.

Every function is pure: the draw comes from the generator it is given.

Shapes in this file:
    B  bins    M  frames
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from avlm.config.media import Features
from avlm.config.stage import Augment
from avlm.errors import ConfigError


def augment_image(pixels: Tensor, how: Augment, rng: np.random.Generator) -> Tensor:
    """Move, mirror, recolour and blot out: uint8 [3, h, w] to the same."""
    height, width = pixels.shape[-2:]
    side = min(height, width)
    if how.shift:
        reach = round(how.shift * side)
        dx, dy = (int(d) for d in rng.integers(-reach, reach + 1, 2))
        padded = F.pad(pixels[None].float(), (reach,) * 4, mode="replicate")[0].to(torch.uint8)
        pixels = padded[:, reach + dy : reach + dy + height, reach + dx : reach + dx + width]
    if how.flip and rng.random() < 0.5:
        pixels = pixels.flip(-1)
    if how.jitter:
        contrast, light = 1 + how.jitter * rng.uniform(-1, 1), how.jitter * rng.uniform(-1, 1)
        values = pixels.float()
        middle = values.mean()
        pixels = ((values - middle) * contrast + middle + 255 * light).clamp(0, 255).to(torch.uint8)
    if how.erase and rng.random() < 0.5:
        size = int(rng.integers(0, round(how.erase * side) + 1))
        if size:
            top, left = (int(v) for v in rng.integers(0, side - size + 1, 2))
            pixels = pixels.clone()
            pixels[:, top : top + size, left : left + size] = int(rng.integers(0, 256))
    return pixels


def augment_features(features: Tensor, kind: Features, how: Augment, rng: np.random.Generator) -> Tensor:
    """Another voice, another room, blanks: float [B, M] to the same shape.

    Raises:
        ConfigError: Changes are asked for that would mean something else in features of this kind.
    """
    if kind == "whisper":
        return augment_mel(features, how, rng)
    asked = [name for name in ("pitch", "tilt", "noise", "squeeze", "tempo") if getattr(how, name)]
    blanks = bool(how.mask_bins or how.mask_frames)
    if kind == "wave" and blanks:
        asked.append("mask_bins" if how.mask_bins else "mask_frames")
    if asked:
        raise ConfigError(
            f"augment.{asked[0]} changes log-mel frames as Whisper takes them, and this encoder takes {kind} features. "
            f"Set augment.{asked[0]}=0"
        )
    return torch.from_numpy(_masked(features.numpy(), how, rng)) if blanks else features


def augment_mel(mel: Tensor, how: Augment, rng: np.random.Generator) -> Tensor:
    """Another voice, another pace, another room: float [B, M] to the same shape.

    Args:
        mel: Log-mel frames in Whisper's normalisation, of which one unit is 40 dB.
        how: Strengths; each change that is on is made to most clips, not to all.
        rng: Where the draws come from.

    Source:
        Vocal tract length perturbation (Jaitly and Hinton, 2013); SpecAugment (arXiv:1904.08779).
    """
    values = mel.numpy()
    for strength, change in (
        (how.pitch, _vocal_tract),
        (how.tilt, _room),
        (how.noise, _noise),
        (how.squeeze, _squeezed),
        (how.tempo, _bent),
    ):
        if strength and rng.random() < OFTEN:
            values = change(values, strength, rng)
    if how.mask_bins or how.mask_frames:
        values = _masked(values, how, rng)
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


OFTEN = 0.7
"""Share of clips to which each change is made."""


def _vocal_tract(mel: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Move the formants as a longer or shorter vocal tract would, up to half the band; above it nothing moves."""
    hertz = _mel_hertz(mel.shape[0])
    top = hertz[-1] / 2
    factor = float(np.exp(rng.uniform(-strength, strength)))
    knee = 0.8 * top * min(factor, 1.0)
    rising = knee / factor + (hertz - knee) * (top - knee / factor) / (top - knee)
    source = np.where(hertz <= knee, hertz / factor, np.where(hertz < top, rising, hertz))
    return _read(mel, np.interp(source, hertz, np.arange(mel.shape[0])))


@lru_cache(maxsize=8)
def _mel_hertz(bins: int) -> np.ndarray:
    """Centres of Slaney's mel filters up to 8 kHz."""
    steps = np.linspace(0, 15 + np.log(8.0) * 27 / np.log(6.4), bins + 2)[1:-1]
    return np.where(steps < 15, steps * 200 / 3, 1000 * np.exp((steps - 15) * np.log(6.4) / 27))


def _room(mel: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Another microphone: a tilt and a smooth random curve along frequency."""
    at = np.linspace(-1, 1, mel.shape[0])
    curve = rng.uniform(-strength, strength) * at
    curve += np.interp(at, np.linspace(-1, 1, 6), rng.normal(0, 0.6 * strength, 6))
    return mel + curve[:, None]


def _noise(mel: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Steady noise of random colour, added as power; at strength 1 up to 20 dB below the clip's peak."""
    at = np.linspace(-1, 1, mel.shape[0])[:, None]
    level = mel.max() - 0.5 / strength - rng.uniform(0, 1.1) + rng.uniform(-0.25, 0.25) * at
    to_log = 4 * np.log(10)
    noisy: np.ndarray = np.logaddexp(mel * to_log, (level + rng.normal(0, 0.06, mel.shape)) * to_log) / to_log
    return noisy


def _squeezed(mel: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Quicker speech somewhere in the same length, with quiet around it."""
    frames = mel.shape[1]
    count = max(4, round(frames * rng.uniform(1 - strength, 1.0)))
    if count >= frames:
        return mel
    start = int(rng.integers(0, frames - count + 1))
    quiet = np.repeat(np.minimum(mel[:, :1], mel[:, -1:]), frames, 1) + rng.normal(0, 0.03, mel.shape)
    quiet[:, start : start + count] = _read(mel.T, np.linspace(0, frames - 1, count)).T
    return quiet


def _bent(mel: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Time runs faster here and slower there; both ends stay."""
    frames = mel.shape[1]
    knots = np.array([0, 1 / 3, 2 / 3, 1])
    moved = knots + np.array([0, *rng.uniform(-strength / 2, strength / 2, 2), 0])
    moved = np.maximum.accumulate(moved)  # above a third the knots could change places: time would run backwards
    return _read(mel.T, np.interp(np.linspace(0, 1, frames), knots, moved) * (frames - 1)).T


def _read(rows: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Rows at fractional positions, linearly between neighbours."""
    at = np.clip(at, 0, len(rows) - 1)
    low = np.minimum(at.astype(np.int64), max(0, len(rows) - 2))
    weight = (at - low).astype(np.float32)[:, None]
    between: np.ndarray = rows[low] * (1 - weight) + rows[np.minimum(low + 1, len(rows) - 1)] * weight
    return between


def _masked(mel: np.ndarray, how: Augment, rng: np.random.Generator) -> np.ndarray:
    """SpecAugment's blanks, filled with the clip's mean."""
    mel = mel.copy()
    bins, frames = mel.shape
    fill = mel.mean()
    for _ in range(2):
        width = int(rng.integers(0, min(how.mask_bins, bins) + 1))
        start = int(rng.integers(0, bins - width + 1))
        mel[start : start + width] = fill
        width = int(rng.integers(0, int(how.mask_frames * frames) + 1))
        start = int(rng.integers(0, frames - width + 1))
        mel[:, start : start + width] = fill
    return mel
