"""Two encoders that hear the same sound, side by side.

Shapes in this file:
    n  embeddings of one chunk    C  encoder width    D  language-model width
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Joined(nn.Module):
    """Both encoders' embeddings, each through a LayerNorm, joined on channels; behind them a connector.

    Args:
        width: C of the first encoder.
        beside_width: C of the second.
        connector: Takes embeddings as wide as both together.

    Source:
        SALMONN (arXiv:2310.13289, section 3.1): Whisper and BEATs in front of one window-level Q-Former.
    """

    def __init__(self, width: int, beside_width: int, connector: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.beside_norm = nn.LayerNorm(beside_width)
        self.connector = connector

    def forward(self, items: list[Tensor], beside: list[Tensor]) -> Tensor:
        """Tokens of all chunks end to end: (sum of k_i, D)."""
        joined = [
            side_by_side(self.norm(first), self.beside_norm(second))
            for first, second in zip(items, beside, strict=True)
        ]
        tokens: Tensor = self.connector(joined)
        return tokens


def side_by_side(first: Tensor, second: Tensor) -> Tensor:
    """Join (n, C) and (m, D) on channels; the shorter one is padded with zeros to the longer: (max(n, m), C + D)."""
    longest = max(len(first), len(second))
    return torch.cat([F.pad(item, (0, 0, 0, longest - len(item))) for item in (first, second)], -1)
