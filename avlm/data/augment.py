"""Changes to pictures and sounds while training. None changes how many tokens a medium takes.

Every function is pure: the draw comes from the generator it is given.

Shapes in this file:
    B  mel bins    M  mel frames
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from avlm.config.run import Augment


def augment_image(pixels: Tensor, how: Augment, rng: np.random.Generator) -> Tensor:
    """Move, mirror, recolour and blot out: uint8 [3, h, w] to the same."""
    side = pixels.shape[-1]
    if how.shift:
        reach = round(how.shift * side)
        dx, dy = (int(d) for d in rng.integers(-reach, reach + 1, 2))
        padded = F.pad(pixels[None].float(), (reach,) * 4, mode="replicate")[0].to(torch.uint8)
        pixels = padded[:, reach + dy : reach + dy + side, reach + dx : reach + dx + side]
    if how.flip and rng.random() < 0.5:
        pixels = pixels.flip(-1)
    if how.jitter:
        contrast, light = 1 + how.jitter * rng.uniform(-1, 1), how.jitter * rng.uniform(-1, 1)
        values = pixels.float()
        middle = values.mean()
        pixels = ((values - middle) * contrast + middle + 255 * light).clamp(0, 255).to(torch.uint8)
    if how.erase:
        size = int(rng.integers(0, round(how.erase * side) + 1))
        if size:
            top, left = (int(v) for v in rng.integers(0, side - size + 1, 2))
            pixels = pixels.clone()
            pixels[:, top : top + size, left : left + size] = int(rng.integers(0, 256))
    return pixels


def augment_mel(mel: Tensor, how: Augment, rng: np.random.Generator) -> Tensor:
    """Another voice, another pace, another room: float [B, M] to the same.

    Source:
        Vocal tract length perturbation (Jaitly and Hinton, 2013); SpecAugment (arXiv:1904.08779).
    """
    bins, frames = mel.shape
    if how.pitch or how.tempo:
        factor = 1 + how.pitch * rng.uniform(-1, 1)
        rows = _warped(bins, factor)
        columns = _bent(frames, how.tempo * rng.uniform(-1, 1))
        mel = _sample_grid(mel, rows, columns)
    if how.tilt:
        knots = torch.from_numpy(rng.uniform(-1, 1, 4).astype(np.float32))
        curve = F.interpolate(knots[None, None], bins, mode="linear", align_corners=True)[0, 0]
        mel = mel + how.tilt * curve[:, None]
    if how.noise:
        mel = mel + how.noise * torch.from_numpy(rng.standard_normal((bins, frames), dtype=np.float32))
    if how.mask_bins or how.mask_frames:
        mel = _masked(mel, how, rng)
    return mel


def _warped(bins: int, factor: float) -> Tensor:
    """Where each mel bin is read from when the frequency axis is stretched."""
    return (torch.arange(bins) * factor).clamp(max=bins - 1.0)


def _bent(frames: int, amount: float) -> Tensor:
    """Where each frame is read from when time runs faster first and slower later, or the other way round."""
    at = torch.linspace(0, 1, frames)
    return (at + amount * torch.sin(torch.pi * at) / torch.pi).clamp(0, 1) * (frames - 1)


def _sample_grid(mel: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Read a mel at fractional bins and frames, linearly."""
    for axis, at in ((0, rows), (1, columns)):
        low = at.floor().long()
        high = (low + 1).clamp(max=mel.shape[axis] - 1)
        weight = (at - low).unsqueeze(1 - axis)
        mel = mel.index_select(axis, low) * (1 - weight) + mel.index_select(axis, high) * weight
    return mel


def _masked(mel: Tensor, how: Augment, rng: np.random.Generator) -> Tensor:
    mel = mel.clone()
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
