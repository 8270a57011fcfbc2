"""Connectors whose learned queries read the embeddings by attention: Q-Former and perceiver.

Keys and values are made of all items' embeddings at once, end to end; what pads items to one length are only the keys
and values that are then left out. So no item sees another, and nothing is computed for padding but attention itself.

Shapes in this file, beside those of `base`:
    M  embeddings of all items, end to end    G  readings: an item, or a window of one    L  embeddings of the longest
    Q  queries    W  width of the queries    I  width of all attention heads
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from avlm.config.connectors import PerceiverConnector, QformerConnector, WindowQformerConnector
from avlm.config.media import Windows
from avlm.layout import window_count
from avlm.models.connectors.base import Connector, Grids, Vectors


class Readings(NamedTuple):
    """Which embeddings are read together, by the same queries."""

    shape: tuple[int, int]
    """G, L"""
    rows: Tensor | None
    """(G, L) rows of the embeddings of all items; None where the readings follow each other and nothing is left out."""
    inside: Tensor | None
    """(G, L) True where a row is read; None where all are."""

    def take(self, states_MI: Tensor) -> Tensor:
        """(M, I) to (G, L, I)."""
        return states_MI.unflatten(0, self.shape) if self.rows is None else states_MI[self.rows]


def whole_items(lengths: list[int], device: torch.device) -> Readings:
    """Each item is read whole."""
    sizes = torch.tensor(lengths, device="cpu")
    return _readings(sizes.cumsum(0) - sizes, sizes, sum(lengths), device)


def windows_of(lengths: list[int], windows: Windows, rest_joined: bool, device: torch.device) -> Readings:
    """Each item is read window by window; what fills no window goes with the last one, or is left out."""
    starts, sizes, at = list[Tensor](), list[Tensor](), 0
    for length in lengths:
        first = torch.arange(window_count(length, windows), device="cpu") * windows.stride
        size = torch.full_like(first, windows.size)
        left = length - int(first[-1])
        size[-1] = left if rest_joined else min(left, windows.size)
        starts.append(first + at)
        sizes.append(size)
        at += length
    return _readings(torch.cat(starts), torch.cat(sizes), at, device)


def _readings(starts_G: Tensor, sizes_G: Tensor, embeddings: int, device: torch.device) -> Readings:
    """Readings that start at rows of M embeddings. Made on the processor, so that no device is waited for."""
    count, longest, shortest = len(sizes_G), int(sizes_G.max()), int(sizes_G.min())
    steps = torch.arange(longest, device="cpu")
    index = starts_G[:, None] + steps
    if shortest == longest:
        in_order = count * longest == embeddings and bool((index.flatten().diff() == 1).all())
        return Readings((count, longest), None if in_order else index.to(device), None)
    inside = steps < sizes_G[:, None]
    index = index.where(inside, starts_G[:, None])
    return Readings((count, longest), index.to(device), inside.to(device))


class Attention(nn.Module):
    """Multi-head attention, as its matrices: of queries (G, Q, W) on states of another width."""

    def __init__(self, width: int, read_width: int, heads: int, inner: int, *, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, inner, bias=bias)
        self.key = nn.Linear(read_width, inner, bias=bias)
        self.value = nn.Linear(read_width, inner, bias=bias)
        self.out = nn.Linear(inner, width, bias=bias)

    def forward(
        self, queries_GQW: Tensor, keys_GLI: Tensor, values_GLI: Tensor, inside_GL: Tensor | None, dropout: float
    ) -> Tensor:
        """Attend, with keys and values that `key` and `value` made."""
        states = (self.query(queries_GQW), keys_GLI, values_GLI)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in states)
        mask = None if inside_GL is None else inside_GL[:, None, None]
        attended = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout if self.training else 0.0)
        output: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return output


class QformerLayer(nn.Module):
    """A layer of BERT (arXiv:1810.04805) whose queries also look at embeddings, in some of the layers.

    Each sublayer's output is added and then normed.
    """

    def __init__(self, settings: QformerConnector | WindowQformerConnector, read_width: int | None) -> None:
        super().__init__()
        width, heads = settings.width, settings.heads
        self.rate = settings.dropout
        self.dropout = nn.Dropout(settings.dropout)
        self.own = Attention(width, width, heads, width, bias=True)
        self.own_norm = nn.LayerNorm(width, eps=1e-12)
        self.cross = self.cross_norm = None
        if read_width is not None:
            self.cross = Attention(width, read_width, heads, width, bias=True)
            self.cross_norm = nn.LayerNorm(width, eps=1e-12)
        self.widen = nn.Linear(width, settings.feedforward)
        self.narrow = nn.Linear(settings.feedforward, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor, states_MC: Tensor, readings: Readings) -> Tensor:
        own = self.own(x, self.own.key(x), self.own.value(x), None, self.rate)
        x = self.own_norm(x + self.dropout(own))
        if self.cross is not None and self.cross_norm is not None:
            keys, values = (readings.take(made(states_MC)) for made in (self.cross.key, self.cross.value))
            x = self.cross_norm(x + self.dropout(self.cross(x, keys, values, readings.inside, self.rate)))
        output: Tensor = self.norm(x + self.dropout(self.narrow(F.gelu(self.widen(x)))))
        return output


class Qformer(Connector):
    """Learned queries through layers of self- and cross-attention, one matrix; for each item or for each window."""

    def __init__(self, settings: QformerConnector | WindowQformerConnector, width: int, out_width: int) -> None:
        super().__init__(settings.reduction(), out_width)
        self.rest_joined = isinstance(settings, WindowQformerConnector) and settings.rest == "joined"
        self.norm = nn.LayerNorm(width) if settings.norm == "before" else nn.Identity()
        self.queries = Vectors(settings.queries, settings.width)
        self.queries_norm = nn.LayerNorm(settings.width, eps=1e-12)
        self.dropout = nn.Dropout(settings.dropout)
        self.layers = nn.ModuleList(
            QformerLayer(settings, None if i % settings.cross_every else width) for i in range(settings.layers)
        )
        self.linear = nn.Linear(settings.width, out_width)

    def translate(self, items: list[Tensor], grids: Grids) -> Tensor:
        lengths, device = [len(item) for item in items], items[0].device
        if self.reduction.windows is None:
            readings = whole_items(lengths, device)
        else:
            readings = windows_of(lengths, self.reduction.windows, self.rest_joined, device)
        states = self.norm(torch.cat(items))
        x = self.queries_norm(self.queries.weight).expand(readings.shape[0], -1, -1)
        x = self.dropout(x)
        for layer in self.layers:
            x = layer(x, states, readings)
        output: Tensor = self.linear(x.flatten(0, 1))
        return output


class PerceiverLayer(nn.Module):
    """Queries attend to the embeddings and to themselves at once, then a feed-forward; both are added to them."""

    def __init__(self, settings: PerceiverConnector, width: int) -> None:
        super().__init__()
        self.states_norm = nn.LayerNorm(width)
        self.queries_norm = nn.LayerNorm(width)
        self.attention = Attention(width, width, settings.heads, settings.heads * settings.head_size, bias=False)
        self.norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, settings.expansion * width, bias=False)
        self.act = ACT2FN[settings.activation]
        self.narrow = nn.Linear(settings.expansion * width, width, bias=False)

    def forward(self, x: Tensor, states_MW: Tensor, readings: Readings) -> Tensor:
        states, queries = self.states_norm(states_MW), self.queries_norm(x)
        keys, values = (
            torch.cat([readings.take(made(states)), made(queries)], 1)
            for made in (self.attention.key, self.attention.value)
        )
        inside = readings.inside
        if inside is not None:
            inside = torch.cat([inside, inside.new_ones(x.shape[:2])], 1)
        x = x + self.attention(queries, keys, values, inside, 0.0)
        output: Tensor = x + self.narrow(self.act(self.widen(self.norm(x))))
        return output


class Perceiver(Connector):
    """Flamingo's resampler, then one matrix."""

    def __init__(self, settings: PerceiverConnector, width: int, out_width: int) -> None:
        super().__init__(settings.reduction(), out_width)
        inner = settings.width or width
        self.into = nn.Identity() if inner == width else nn.Linear(width, inner)
        self.queries = Vectors(settings.queries, inner)
        self.layers = nn.ModuleList(PerceiverLayer(settings, inner) for _ in range(settings.layers))
        self.norm = nn.LayerNorm(inner)
        self.linear = nn.Linear(inner, out_width)

    def translate(self, items: list[Tensor], grids: Grids) -> Tensor:
        readings = whole_items([len(item) for item in items], items[0].device)
        states = self.into(torch.cat(items))
        x = self.queries.weight.expand(len(items), -1, -1)
        for layer in self.layers:
            x = layer(x, states, readings)
        output: Tensor = self.linear(self.norm(x).flatten(0, 1))
        return output
