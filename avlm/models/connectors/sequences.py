"""Connectors that join neighbours in a sequence: stacked, pooled or convolved.

Shapes are those of `base`.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avlm.config.connectors import (
    ConvConnector,
    LinearConnector,
    MlpConnector,
    PoolConnector,
    PrefixConnector,
    SwigluConnector,
)
from avlm.models.connectors.base import Connector, Grids, ScaledNorm, by_shape, mlp


class Stack(Connector):
    """Join `stack` consecutive embeddings, then one linear layer or several with GELU between."""

    def __init__(self, settings: LinearConnector | MlpConnector, width: int, out_width: int) -> None:
        super().__init__(settings.reduction(), out_width)
        self.stack = settings.stack
        layers, hidden = 1, None
        if isinstance(settings, MlpConnector):
            layers, hidden = settings.layers, settings.hidden_size
        self.layers = mlp(width * settings.stack, hidden or out_width, out_width, layers, settings.bias)

    def translate(self, items: list[Tensor], grids: Grids) -> Tensor:
        output: Tensor = self.layers(stack_all(items, self.stack))
        return output


class Swiglu(Connector):
    """Join `stack` consecutive embeddings, RMSNorm, values times gates (arXiv:2002.05202), RMSNorm, one matrix."""

    def __init__(self, settings: SwigluConnector, width: int, out_width: int) -> None:
        super().__init__(settings.reduction(), out_width)
        self.stack = settings.stack
        width, hidden = width * settings.stack, settings.hidden_size
        self.norm_in = ScaledNorm(width, settings.scale)
        self.widen = nn.Linear(width, 2 * hidden, bias=False)
        self.norm_hidden = ScaledNorm(hidden, settings.scale)
        self.linear = nn.Linear(hidden, out_width, bias=False)

    def translate(self, items: list[Tensor], grids: Grids) -> Tensor:
        values, gates = self.widen(self.norm_in(stack_all(items, self.stack))).chunk(2, -1)
        output: Tensor = self.linear(self.norm_hidden(values * F.silu(gates)))
        return output


class Prefix(Connector):
    """Join `stack` consecutive embeddings, then one linear layer to several tokens at once."""

    def __init__(self, settings: PrefixConnector, width: int, out_width: int) -> None:
        super().__init__(settings.reduction(), out_width)
        self.stack = settings.stack
        self.linear = nn.Linear(width * settings.stack, out_width * settings.tokens, bias=settings.bias)

    def translate(self, items: list[Tensor], grids: Grids) -> Tensor:
        output: Tensor = self.linear(stack_all(items, self.stack))
        return output.reshape(-1, self.out_width)


def stack_all(items: list[Tensor], stack: int) -> Tensor:
    """`stack_frames` of all items, end to end."""
    return torch.cat([stack_frames(item, stack) for item in items])


def stack_frames(item: Tensor, stack: int) -> Tensor:
    """Join consecutive embeddings: (n, C) to (ceil(n / stack), C * stack); a short last group is padded with zeros."""
    if stack == 1:
        return item
    if len(item) % stack:
        item = F.pad(item, (0, 0, 0, -len(item) % stack))
    return item.reshape(-1, stack * item.shape[1])


class Pool(Connector):
    """Average-pool each item to a fixed number of tokens, LayerNorm before or after, one matrix."""

    def __init__(self, settings: PoolConnector, width: int, out_width: int) -> None:
        super().__init__(settings.reduction(), out_width)
        self.tokens = settings.tokens
        self.norm_first = settings.norm == "before"
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, out_width, bias=settings.bias)

    def translate(self, items: list[Tensor], grids: Grids) -> Tensor:
        pooled = torch.cat(by_shape(items, [len(item) for item in items], self._pool))
        output: Tensor = self.linear(pooled if self.norm_first else self.norm(pooled))
        return output

    def _pool(self, items: Tensor, length: int) -> Tensor:
        """(N, n, C) to (N, tokens, C); token i is the mean of embeddings floor(i n / k) to ceil((i + 1) n / k)."""
        if self.norm_first:
            items = self.norm(items)
        return F.adaptive_avg_pool1d(items.transpose(1, 2), self.tokens).transpose(1, 2)


class Conv(Connector):
    """A strided convolution over each item, LayerNorm, ReLU, one matrix.

    Token i is made from embeddings i * stride to i * stride + kernel - 1; zeros follow the last one.
    """

    def __init__(self, settings: ConvConnector, width: int, out_width: int) -> None:
        super().__init__(settings.reduction(), out_width)
        hidden = settings.hidden_size or 2 * width
        self.stride = settings.stride
        self.reach = math.ceil(settings.kernel / settings.stride) - 1  # whole strides that a token sees past its own
        self.conv = nn.Conv1d(width, hidden, settings.kernel, settings.stride)
        self.norm = nn.LayerNorm(hidden)
        self.linear = nn.Linear(hidden, out_width)

    def translate(self, items: list[Tensor], grids: Grids) -> Tensor:
        # All items go through as one line. Each takes whole strides of it, with zeros behind as far as its last token
        # reaches; the places between two items see both and are left out.
        counts = [math.ceil(len(item) / self.stride) for item in items]
        strides = [count + self.reach for count in counts]
        line = torch.cat([F.pad(x, (0, 0, 0, m * self.stride - len(x))) for x, m in zip(items, strides)])
        made = self.conv(line.T[None])[0].T
        starts = itertools.accumulate(strides, initial=0)
        kept = torch.cat([made[start : start + count] for start, count in zip(starts, counts)])
        output: Tensor = self.linear(F.relu(self.norm(kept)))
        return output
