"""Connectors: from an encoder's embeddings to the language model's.

Shapes in this file:
    n  embeddings of one item    C  encoder width    k  tokens of one item    D  language-model width
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.nn import functional as F

from avlm.config.model import Connector as ConnectorConfig
from avlm.config.model import LinearConnector, MlpConnector, PoolConnector, PrefixConnector
from avlm.layout import Size

_CONFIG: TypeAdapter[LinearConnector | MlpConnector | PrefixConnector | PoolConnector] = TypeAdapter(ConnectorConfig)


def build_connector(config: dict[str, Any], width: int, out_width: int, *, newline: bool = False) -> nn.Module:
    """Build a connector.

    Args:
        config: Its settings as they stand in a model's `config.json`.
        width: C.
        out_width: D.
        newline: With a learned vector `image_newline` (D), which ends each row of a picture's grid.

    Returns:
        A module that turns a list of (n_i, C) into one tensor (sum of k_i, D); k_i is `layout.reduced_count`.
    """
    connector = _connector(config, width, out_width)
    if newline:
        connector.register_parameter("image_newline", nn.Parameter(torch.randn(out_width) / out_width**0.5))
    return connector


def _connector(config: dict[str, Any], width: int, out_width: int) -> nn.Module:
    settings = _CONFIG.validate_python(config)
    if isinstance(settings, PoolConnector):
        return Pool(settings, width, out_width)
    if isinstance(settings, PrefixConnector):
        return Prefix(settings, width, out_width)
    return Stack(settings, width, out_width)


class Stack(nn.Module):
    """Join `stack` consecutive embeddings, then one linear layer or several with GELU between."""

    def __init__(self, settings: LinearConnector | MlpConnector, width: int, out_width: int) -> None:
        super().__init__()
        self.stack = settings.stack
        width = width * settings.stack
        if isinstance(settings, LinearConnector):
            self.layers = nn.Sequential(nn.Linear(width, out_width, bias=settings.bias))
            return
        hidden = settings.hidden_size or out_width
        widths = [width, *[hidden] * (settings.layers - 1), out_width]
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(widths):
            layers += (
                [nn.GELU(), nn.Linear(a, b, bias=settings.bias)] if layers else [nn.Linear(a, b, bias=settings.bias)]
            )
        self.layers = nn.Sequential(*layers)

    def forward(self, items: list[Tensor], grids: list[Size] | None = None) -> Tensor:
        joined = torch.cat([stack_frames(item, self.stack) for item in items])
        output: Tensor = self.layers(joined)
        return output


class Prefix(nn.Module):
    """Join `stack` consecutive embeddings, then one linear layer to several tokens at once."""

    def __init__(self, settings: PrefixConnector, width: int, out_width: int) -> None:
        super().__init__()
        self.stack, self.out_width = settings.stack, out_width
        self.linear = nn.Linear(width * settings.stack, out_width * settings.tokens, bias=settings.bias)

    def forward(self, items: list[Tensor], grids: list[Size] | None = None) -> Tensor:
        joined = torch.cat([stack_frames(item, self.stack) for item in items])
        output: Tensor = self.linear(joined)
        return output.reshape(-1, self.out_width)


def stack_frames(item: Tensor, stack: int) -> Tensor:
    """Join consecutive embeddings: (n, C) to (ceil(n / stack), C * stack); a short last group is padded with zeros."""
    if stack == 1:
        return item
    item = F.pad(item, (0, 0, 0, -item.shape[0] % stack))
    return item.reshape(-1, stack * item.shape[1])


class Pool(nn.Module):
    """Average-pool each item to a fixed number of tokens, LayerNorm before or after, one matrix."""

    def __init__(self, settings: PoolConnector, width: int, out_width: int) -> None:
        super().__init__()
        self.tokens = settings.tokens
        self.norm_first = settings.norm == "before"
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, out_width, bias=settings.bias)

    def forward(self, items: list[Tensor], grids: list[Size] | None = None) -> Tensor:
        if self.norm_first:
            items = [self.norm(item) for item in items]
        pooled = torch.cat([F.adaptive_avg_pool1d(item.T[None], self.tokens)[0].T for item in items])
        output: Tensor = self.linear(pooled if self.norm_first else self.norm(pooled))
        return output
