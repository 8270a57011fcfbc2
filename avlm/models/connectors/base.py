"""What every connector is.

Shapes in these files:
    N  items    n  embeddings of one item    C  encoder width    k  tokens of one item    D  language-model width
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avlm.config.media import Reduction
from avlm.layout import Size, reduced_count

Key = TypeVar("Key", bound=Hashable)
Grids = Sequence[Size | None]
"""Rows and columns of each item's embeddings; None for what is no picture."""


class Connector(nn.Module, ABC):
    """Turns items' embeddings into the language model's tokens; a kind of connector says how, in `translate`.

    Args:
        reduction: How many tokens it makes, learned prompts included.
        out_width: D.
    """

    def __init__(self, reduction: Reduction, out_width: int) -> None:
        super().__init__()
        self.reduction, self.out_width = reduction, out_width
        self.prompts = Vectors(reduction.prompts, out_width) if reduction.prompts else None

    @abstractmethod
    def translate(self, items: list[Tensor], grids: Grids) -> Tensor:
        """Tokens of at least one item, end to end and without prompts; no item is empty."""

    def forward(self, items: list[Tensor], grids: list[Size] | None = None) -> Tensor:
        """Translate items, each as if it were alone.

        Args:
            items: N tensors (n_i, C).
            grids: Rows and columns of each picture's embeddings, in raster order; None for sound.

        Returns:
            (sum of k_i, D), items end to end; k_i is `layout.reduced_count`, and an item without embeddings has none.

        Raises:
            LayoutError: The connector joins squares, and an item has no grid or one of another size.
        """
        known: Grids = [None] * len(items) if grids is None else grids
        there = [(item, grid) for item, grid in zip(items, known, strict=True) if len(item)]
        if not there:
            return next(self.parameters()).new_zeros(0, self.out_width)
        items, known = [item for item, _ in there], [grid for _, grid in there]
        tokens = self.translate(items, known)
        return tokens if self.prompts is None else self._behind(self.prompts.weight, tokens, items, known)

    def _behind(self, prompts: Tensor, tokens: Tensor, items: list[Tensor], grids: Grids) -> Tensor:
        """Every item's tokens with the prompts before them."""
        counts = [reduced_count(len(x), self.reduction, g) - len(prompts) for x, g in zip(items, grids, strict=True)]
        prompts = prompts.to(tokens.dtype)
        return torch.cat([part for piece in tokens.split(counts) for part in (prompts, piece)])


class Vectors(nn.Module):
    """Vectors that are learned as they stand: prompts, queries."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small and different from each other, as BLIP-2 and SALMONN begin theirs."""
        nn.init.normal_(self.weight, std=0.02)


class ScaledNorm(nn.Module):
    """RMSNorm (arXiv:1910.07467) whose weights start from a value of their own.

    Weights that start below 1 let a connector begin softly; Ultravox chose 0.4 after arXiv:2206.10139.
    """

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), eps=1e-6)


def mlp(width: int, hidden: int, out_width: int, layers: int, bias: bool) -> nn.Sequential:
    """Linear layers with GELU between."""
    widths = [width, *[hidden] * (layers - 1), out_width]
    made: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        made += [nn.GELU()] if made else []
        made.append(nn.Linear(a, b, bias=bias))
    return nn.Sequential(*made)


def by_shape(items: list[Tensor], keys: Sequence[Key], change: Callable[[Tensor, Key], Tensor]) -> list[Tensor]:
    """Change items of one shape in one call.

    Args:
        items: N tensors (n_i, C).
        keys: What items must agree in to go together; equal keys have equal n.
        change: Takes (items of one key, n, C) and the key, and returns as many results.

    Returns:
        What became of each item, in the order of the items.
    """
    groups: dict[Key, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    found: dict[int, Tensor] = {}
    for key, members in groups.items():
        found.update(zip(members, change(torch.stack([items[i] for i in members]), key), strict=True))
    return [found[i] for i in range(len(items))]
