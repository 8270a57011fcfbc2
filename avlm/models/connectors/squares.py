"""The connector that joins neighbours in a picture, along rows and along columns.

Shapes are those of `base`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avlm.config.connectors import PixelShuffleConnector
from avlm.layout import Size, checked_grid
from avlm.models.connectors.base import Connector, Grids, by_shape, mlp


class PixelShuffle(Connector):
    """Join squares of embeddings on channels, LayerNorm, MLP."""

    def __init__(self, settings: PixelShuffleConnector, width: int, out_width: int) -> None:
        super().__init__(settings.reduction(), out_width)
        self.side = settings.side
        width = width * settings.side**2
        self.norm = nn.LayerNorm(width) if settings.norm == "before" else nn.Identity()
        self.layers = mlp(width, settings.hidden_size or out_width, out_width, settings.layers, settings.bias)

    def translate(self, items: list[Tensor], grids: Grids) -> Tensor:
        if self.side == 1:
            joined = torch.cat(items)
        else:
            keys = [checked_grid(len(item), grid) for item, grid in zip(items, grids, strict=True)]
            joined = torch.cat(by_shape(items, keys, self._join))
        output: Tensor = self.layers(self.norm(joined))
        return output

    def _join(self, items: Tensor, grid: Size) -> Tensor:
        return join_squares(items.unflatten(1, grid), self.side)


def join_squares(maps: Tensor, side: int) -> Tensor:
    """Join squares of embeddings; odd rows and columns are padded with zeros at the bottom and at the right.

    Args:
        maps: (N, rows, columns, C).

    Returns:
        (N, ceil(rows / side) * ceil(columns / side), side * side * C): squares in raster order, and so the embeddings
        within each, as InternVL's released weights want them.
    """
    rows, columns = maps.shape[1:3]
    maps = F.pad(maps, (0, 0, 0, -columns % side, 0, -rows % side))
    squares = maps.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3)
    return squares.flatten(3).flatten(1, 2)
