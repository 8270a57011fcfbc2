"""How a step is computed: memory against time, and fused kernels. None of it changes what is learned."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from avlm.config.base import Settings

Layered = Literal["vision", "audio", "audio_beside", "language"]
"""Parts that are a stack of layers."""


class Recompute(Settings):
    """Layers whose inner results are thrown away and computed again for the gradients (arXiv:1604.06174).

    A third more computing for these layers, and memory for what goes into each of them only.
    """

    parts: tuple[Layered, ...] = Field(("language",), min_length=1)
    """In which parts. A part that no gradient goes through keeps nothing anyway and is passed over."""

    every: int = Field(1, ge=1)
    """Every so manieth layer of each part, beginning with its first; 1 is all of them."""


class Speed(Settings):
    """Ways to compute the same in less memory or in less time."""

    recompute: Recompute | None = None
    """Default: everything that gradients need is kept."""

    onednn: Literal["auto", "off"] = "auto"
    """float32 products of matrices by oneDNN on a processor: `auto` uses it for wide layers where the processor has
    AVX-512 and is of another maker than MKL, which uses one half of it then; they are as exact. `off` leaves the choice
    to torch."""

    compile: bool = False
    """The language model's layers through torch.compile in training: fewer passes over memory, most of all in bfloat16,
    after a minute in which code is made. Sums are rounded in another order then."""

    liger: Literal["auto", "on", "off"] = "auto"
    """Liger Kernel's fused norms, rotations and feed-forward layers for the language model: `auto` uses them on a GPU
    where they are installed and know the family. The loss is avlm's own in any case."""
