"""Keys and values of tokens that are remembered, in memory that is given out token by token.

Beginnings of conversations are of every length, and come and go with each request. In memory of their own they leave
holes in which the next ones do not fit, and a server grows for hours; here a place is as good as any other.

Shapes in this file:
    R  places for tokens    T  tokens    K  key/value heads    D  head width
"""

from __future__ import annotations

import torch
from torch import Tensor

from avlm.models.slots import Kept

LEAST = 1024
"""Tokens that there are places for at first."""


class Pool:
    """Places for tokens, each for what one of them left in all layers.

    Args:
        capacity: Bytes.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._layers: Kept = []
        """Keys and values (R, K, D) of each layer."""
        self._places = 0
        self._free: list[int] = []

    def most(self, states: Kept) -> int:
        """How many tokens fit, at the size of what these left."""
        each = sum(t.shape[0] * t.shape[2] * t.element_size() for pair in states for t in pair)
        return self.capacity // each

    def put(self, states: Kept) -> Tensor:
        """Copy what tokens left, for whom there is room.

        Args:
            states: Keys and values (K, T, D) of each layer.

        Returns:
            Their places, int64 (T,).
        """
        tokens = states[0][0].shape[1]
        if tokens > len(self._free):
            self._grow(states, tokens)
        taken = torch.tensor([self._free.pop() for _ in range(tokens)], device=states[0][0].device)
        for ours, given in zip(self._layers, states, strict=True):
            for own, one in zip(ours, given, strict=True):
                own.index_copy_(0, taken, one.transpose(0, 1))
        return taken

    def get(self, places: Tensor) -> Kept:
        """A copy of what tokens left: keys and values (K, T, D) of each layer."""
        return [
            (keys.index_select(0, places).transpose(0, 1), values.index_select(0, places).transpose(0, 1))
            for keys, values in self._layers
        ]

    def give_back(self, places: Tensor) -> None:
        """Nobody needs what is there any more."""
        self._free += places.tolist()

    def _grow(self, states: Kept, tokens: int) -> None:
        """Double the places until so many are free, up to all that there may be."""
        places = max(self._places, LEAST)
        while len(self._free) + places - self._places < tokens:
            places *= 2
        places = min(places, self.most(states))
        if not self._layers:
            self._layers = [(_places(keys, 0), _places(values, 0)) for keys, values in states]
        for number, (keys, values) in enumerate(self._layers):  # the old of one layer beside the new, never of all
            self._layers[number] = _longer(keys, places), _longer(values, places)
        self._free += range(self._places, places)
        self._places = places


def _places(like: Tensor, count: int) -> Tensor:
    """Room (R, K, D) for so many tokens of (K, T, D)."""
    return like.new_empty(count, like.shape[0], like.shape[2])


def _longer(old: Tensor, count: int) -> Tensor:
    """Room for so many tokens, with what was there before."""
    new = old.new_empty(count, *old.shape[1:])
    new[: len(old)] = old
    return new
