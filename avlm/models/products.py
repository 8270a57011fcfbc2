"""float32 products of matrices on a processor, by the library that uses all of it.

torch hands them to MKL, which uses AVX-512 on processors of its own maker only, and computes at half their speed on
others. torch's other library, oneDNN, uses it on all, and is asked once its float32 products may be rounded to bfloat16
first. It does that where a processor has units for such products (AMX). Where it has none, the products are float32 to
the last place, as they are without; and whether they are is tried, not assumed.
"""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

SHAPES = ((8, 64, 64), (17, 160, 24), (64, 64, 64), (130, 512, 48), (256, 1024, 256))
"""Of the products that are tried: rows, places that are summed over, columns."""

WIDE = 256
"""Places that a layer sums over from which on its products are worth oneDNN's: it writes a program for each shape that
it meets, and packed rows are never equally long. For layers of 128 that took longer than all their products."""

PROGRAMS = 64
"""Of these that are kept, each about a megabyte: enough for all layers of a row, and for the steps of a few answers."""

LONG = 512
"""Tokens from which on attention is as fast by oneDNN, or faster."""


@contextmanager
def fast_products(wanted: bool) -> Iterator[None]:
    """While the block runs, float32 products on the processor are oneDNN's, where those are exact and are the faster.

    Sums are added up in another order than MKL's, so last bits differ between the two. It follows from the processor
    alone which it is, never from a stopwatch.

    Args:
        wanted: Otherwise nothing changes; nor does it where the program has chosen a precision itself.
    """
    how = _settings()
    wanted = wanted and how.fp32_precision == "none" and half_used(*processor())
    if not (wanted and exact()):
        yield
        return
    how.fp32_precision = "bf16"
    try:
        with _ShortApart():
            yield
    finally:
        how.fp32_precision = "none"


def keep_few_programs() -> None:
    """Ask oneDNN to keep few of the programs that it writes, unless the user has asked for a number.

    It keeps a thousand for the shapes that it met, and torch a thousand more of what it has made of them. Rows and
    prompts are hardly ever equally long, so most of them are never asked for again, and a process grows by several
    hundred megabytes. It looks when it is first asked, be it for a convolution of an encoder, and never again: so every
    model asks when it is made.

    Source:
        oneDNN's documentation of its primitive cache; LRU_CACHE_CAPACITY in PyTorch's tutorial on inference on
        Graviton.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(PROGRAMS))


def wide(model: nn.Module) -> bool:
    """Whether the layers of a model are mostly so wide that their products are worth oneDNN's."""
    sides = [min(layer.weight.shape) for layer in model.modules() if isinstance(layer, nn.Linear)]
    return bool(sides) and statistics.median(sides) >= WIDE


def by_onednn() -> bool:
    """Whether float32 products on the processor are oneDNN's now."""
    return rounding() == "bf16"


def rounding() -> str:
    """What float32 products on the processor may be rounded to first, by torch's name for it."""
    return str(_settings().fp32_precision)


def _settings() -> Any:
    """torch's settings of such products; its types do not know of them."""
    backend: Any = torch.backends.mkldnn
    return backend.matmul


class _ShortApart(TorchFunctionMode):
    """Leaves attention over few tokens to MKL: it is cut into products so small that calling oneDNN takes longest."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention or args[0].shape[-2] >= LONG or not by_onednn():
            return func(*args, **(kwargs or {}))
        left = _Left()
        left.leave()
        try:
            output = func(*args, **(kwargs or {}))
        finally:
            left.come_back()
        if output.grad_fn is not None:  # the same in the backward pass
            output.grad_fn.register_prehook(lambda grads: left.leave())
            output.grad_fn.register_hook(lambda made, grads: left.come_back())
        return output


class _Left:
    """Products are torch's own choice for a while, and then whosever they were."""

    def __init__(self) -> None:
        self.before = "none"

    def leave(self) -> None:
        self.before, _settings().fp32_precision = rounding(), "none"

    def come_back(self) -> None:
        _settings().fp32_precision = self.before


def half_used(machine: str, maker: str, capability: str) -> bool:
    """Whether MKL leaves half of a processor unused.

    Args:
        machine: As `platform.machine` names it.
        maker: As the processor names its maker; empty where that is not known.
        capability: The most that torch's own kernels use of it.
    """
    other = maker not in ("", "GenuineIntel")
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return both and other and machine == "x86_64" and capability == "AVX512"


@lru_cache(maxsize=1)
def exact() -> bool:
    """Whether oneDNN's products are float32's where it may round to bfloat16.

    Whole numbers of eleven binary digits, of which bfloat16 keeps eight, are added to and taken from each other, and
    float32 holds all their sums. So there is one right result, in whatever order it is made.
    """
    how = _settings()
    before = how.fp32_precision
    draw = torch.Generator().manual_seed(0)
    how.fp32_precision = "bf16"
    try:
        return all(_right(rows, inner, columns, draw) for rows, inner, columns in SHAPES)
    finally:
        how.fp32_precision = before


def _right(rows: int, inner: int, columns: int, draw: torch.Generator) -> bool:
    """Whether a product is right, either way round and beside others."""
    fine = 1025.0 + 2 * torch.randint(0, 256, (rows, inner), generator=draw)
    signs = 1.0 - 2 * torch.randint(0, 2, (inner, columns), generator=draw)
    wanted = (fine.double() @ signs.double()).float()
    found = (
        fine @ signs,
        (signs.T @ fine.T).T,
        fine @ signs.T.contiguous().T,
        torch.addmm(torch.zeros(columns), fine, signs),
        (fine[None] @ signs[None])[0],
    )
    return all(torch.equal(product, wanted) for product in found)


@lru_cache(maxsize=1)
def processor() -> tuple[str, str, str]:
    """What `half_used` asks for, of this machine."""
    try:
        told = Path("/proc/cpuinfo").read_text()
    except OSError:
        told = ""
    makers = [line.partition(":")[2].strip() for line in told.splitlines() if line.startswith("vendor_id")]
    return platform.machine(), makers[0] if makers else "", torch.backends.cpu.get_cpu_capability()
