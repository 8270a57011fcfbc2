"""What a device can do at most: the speed of one large product of matrices, measured once for a run."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path

import torch

from avlm.models.products import by_onednn

SIZES = (256, 384, 512, 768, 1024, 1536, 2048, 4096, 8192)
LONG_S = 0.008
"""A product that takes so long is large enough: smaller ones are slowed down by what surrounds them."""
TRIES = 5


def matrix_peak(device: torch.device, dtype: torch.dtype, cache: Path) -> float:
    """Floating-point operations a second of a matrix product.

    Args:
        cache: A file that keeps what was measured, by device, numbers and threads.
    """
    library = ", oneDNN" if by_onednn() else ""
    threads = f", {torch.get_num_threads()} threads{library}" if device.type == "cpu" else ""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    key = f"{name}, {str(dtype).removeprefix('torch.')}{threads}"
    known: dict[str, float] = {}
    with suppress(OSError, ValueError):
        known = dict(json.loads(cache.read_bytes()))
    if key not in known:
        known[key] = _measured(device, dtype)
        with suppress(OSError):
            cache.write_text(json.dumps(known, indent=1))
    return float(known[key])


def _measured(device: torch.device, dtype: torch.dtype) -> float:
    """The fastest of several products, each at least twice as long as what surrounds it."""
    generator = torch.Generator(device).manual_seed(0)  # zeros would be quicker to multiply
    best = 0.0
    for size in SIZES:
        a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
        times = [_timed(a, b, device) for _ in range(TRIES)][1:]  # the first one warms up
        best = max(best, 2 * size**3 / min(times))
        if min(times) >= LONG_S:
            break
    return best


def _timed(a: torch.Tensor, b: torch.Tensor, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    a @ b
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
