"""One token of one answer through a decoder of Llama's shape, in NumPy.

Behind each matrix that a token is multiplied with, the processor's nearest memory is full of that matrix, and torch's
way to the next function, which is long, comes from far away: thirty calls a layer, for a few hundred numbers each, take
a third of a token's time. NumPy's way is shorter. Matrices are still multiplied by whoever reads them fastest
(`vectors.py`).

Shapes in this file:
    D  language-model width    H  heads    K  key/value heads    G  heads to a key/value head    W  head width
    C  tokens that a slot has room for
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avlm.models.slots import SlotLayer, Slots
from avlm.models.vectors import Seen

if TYPE_CHECKING:
    from avlm.models.written import Layer, Norm

Turns = tuple[np.ndarray, np.ndarray]
"""Cosine and signed sine (W,) of a token's position."""


class Single:
    """Layers, for one token of the answer in the first slot.

    Args:
        layers, last: As `written.Written` has them: float32, on the processor.
    """

    def __init__(self, layers: Sequence[Layer], last: Norm) -> None:
        self._layers = [_Layer(layer) for layer in layers]
        self._last = _Norm(last)

    def read(self, embed_D: Tensor, turns: Turns, place: int, slots: Slots) -> Tensor:
        """The last hidden state (D,) of a token; its keys and values are written.

        Args:
            place: Its position in its answer.
        """
        x_D = embed_D.numpy()
        with np.errstate(over="ignore"):  # of an exponential that something is divided by
            for layer, own in zip(self._layers, slots.own, strict=True):
                x_D = layer.read(x_D, turns, place, own)
        return torch.from_numpy(self._last(x_D))


class _Layer:
    """One layer; of its parameters always what they are at that moment."""

    def __init__(self, layer: Layer) -> None:
        self._of = layer
        self._first, self._second = _Norm(layer.first), _Norm(layer.second)
        self._query_norm = None if layer.query_norm is None else _Norm(layer.query_norm)
        self._key_norm = None if layer.key_norm is None else _Norm(layer.key_norm)
        self._scale = np.float32(layer.how.scale)
        self._silu = _is_silu(layer.act)
        rows = np.cumsum([len(product.weight) for product in (layer.query, layer.key, layer.value)])
        self._key_row, self._value_row, self._rows = (int(row) for row in rows)
        self._heads, self._turned_heads = self._key_row // layer.width, self._value_row // layer.width

    def read(self, x_D: np.ndarray, turns: Turns, place: int, own: SlotLayer) -> np.ndarray:
        of, heads = self._of, self._heads
        q_and_k, v_KW = self._asked(self._first(x_D))
        turned = _turned(q_and_k, turns)
        keys_KCW, values_KCW = own.arrays()
        keys_KCW[:, place], values_KCW[:, place] = turned[heads:], v_KW
        seen = _attended(turned[:heads] * self._scale, keys_KCW[:, : place + 1], values_KCW[:, : place + 1])
        x_D = x_D + of.out.one(seen)
        h_D = self._second(x_D)
        inner = self._activated(of.gate.one(h_D))
        inner *= of.up.one(h_D)
        made = of.down.one(inner)
        made += x_D
        return made

    def _asked(self, h_D: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Queries and keys (H + K, W), which are turned together, and values (K, W)."""
        of, made = self._of, np.empty(self._rows, np.float32)
        of.query.one(h_D, made[: self._key_row])
        of.key.one(h_D, made[self._key_row : self._value_row])
        of.value.one(h_D, made[self._value_row :])
        by_head = made.reshape(-1, of.width)
        if self._query_norm is not None and self._key_norm is not None:
            by_head[: self._heads] = self._query_norm(by_head[: self._heads])
            keys = by_head[self._heads : self._turned_heads]
            keys[:] = self._key_norm(keys)
        return by_head[: self._turned_heads], by_head[self._turned_heads :]

    def _activated(self, x: np.ndarray) -> np.ndarray:
        """What the activation makes of numbers, which may be written over."""
        if not self._silu:
            made: Tensor = self._of.act(torch.from_numpy(x))
            return made.numpy()
        below = np.exp(-x)
        below += 1
        return np.divide(x, below, out=below)


def _is_silu(act: nn.Module) -> bool:
    """Whether an activation is x / (1 + exp(-x)), by whatever name."""
    x = torch.linspace(-20, 20, 81)
    return torch.equal(act(x), F.silu(x))


class _Norm:
    """A root-mean-square norm."""

    def __init__(self, norm: Norm) -> None:
        self._weight, self._eps = Seen(norm[0]), norm[1]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        weight = self._weight.array()
        if x.ndim == 1:
            normed: np.ndarray = x * (1 / math.sqrt(float(np.dot(x, x)) / len(x) + self._eps))
        else:
            normed = x / np.sqrt(np.vecdot(x, x)[:, None] / x.shape[1] + self._eps)
        normed *= weight
        return normed


def _turned(x_HW: np.ndarray, turns: Turns) -> np.ndarray:
    """As `written`'s, for one token."""
    cos, sin = turns
    half = x_HW.shape[1] // 2
    made: np.ndarray = x_HW * cos + np.concatenate((x_HW[:, half:], x_HW[:, :half]), 1) * sin
    return made


def _attended(q_HW: np.ndarray, keys_KCW: np.ndarray, values_KCW: np.ndarray) -> np.ndarray:
    """Attention of one token over all that its answer has read: (H * W,)."""
    q_KGW = q_HW.reshape(len(keys_KCW), -1, q_HW.shape[1])
    scores_KGC = np.matmul(q_KGW, keys_KCW.transpose(0, 2, 1))
    scores_KGC -= scores_KGC.max(-1, keepdims=True)
    np.exp(scores_KGC, out=scores_KGC)
    scores_KGC /= scores_KGC.sum(-1, keepdims=True)
    return np.matmul(scores_KGC, values_KCW).reshape(-1)
