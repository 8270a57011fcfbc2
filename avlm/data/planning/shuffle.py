"""Shuffled orders that are computed place by place, so that none of them is ever held whole.

Up to `WHOLE` rows an order is numpy's own permutation. Beyond, it is a Feistel network over two digits of about the
root of the count: a permutation of exactly these rows, of which any place can be asked for, in memory of the root's
size. Unlike a shuffle of blocks it has no structure that data sorted by kind or by length would show through.
"""

from __future__ import annotations

import math
import zlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

WHOLE = 65_536
"""Orders of at most this many rows are drawn whole. Changing it changes the order of runs that exist."""

ROUNDS = 6
"""Of the Feistel network; from four on it is as good as a random permutation to who asks fewer than the root of the
count of places (Luby and Rackoff, 1988)."""


def key(text: str) -> int:
    """A number for a name, the same on every machine."""
    return zlib.crc32(text.encode())


def shuffled(places: Ints, count: int, seeds: tuple[int, ...]) -> Ints:
    """Which rows stand at some places of a shuffled order.

    Args:
        places: int64 [n], each from 0 to ``count - 1``.
        count: Rows in the order.
        seeds: What the order follows from.

    Returns:
        int64 [n]. Over all places every row stands once.

    Source:
        Feistel networks over any domain, by walking on where they leave it (Black and Rogaway, 2002, section 4).
    """
    if count <= WHOLE:
        return _permutation(count, seeds)[places]
    rows = _feistel(places, count, seeds)
    outside = np.flatnonzero(rows >= count)  # about one place in the root of the count
    while len(outside):
        rows[outside] = _feistel(rows[outside], count, seeds)
        outside = outside[rows[outside] >= count]
    return rows


@lru_cache(maxsize=16)
def _permutation(count: int, seeds: tuple[int, ...]) -> Ints:
    return np.random.default_rng(list(seeds)).permutation(count)


def _feistel(places: Ints, count: int, seeds: tuple[int, ...]) -> Ints:
    """One walk through the network: a permutation of 0 to ``a * b - 1``, which is `count` or little more."""
    a, b, tables = _network(count, seeds)
    high, low = np.divmod(places, b)
    for for_high, for_low in tables:
        high += for_high[low]
        high[high >= a] -= a
        low += for_low[high]
        low[low >= b] -= b
    return high * b + low


@lru_cache(maxsize=16)
def _network(count: int, seeds: tuple[int, ...]) -> tuple[int, int, list[tuple[NDArray[np.int32], NDArray[np.int32]]]]:
    """The two sizes of the digits, and the random function of each round as a table."""
    a = math.isqrt(count)
    b = -(-count // a)
    bits = np.random.PCG64(np.random.SeedSequence(seeds))

    def drawn(below: int, size: int) -> NDArray[np.int32]:
        return ((bits.random_raw(size) >> np.uint64(32)) * np.uint64(below) >> np.uint64(32)).astype(np.int32)

    return a, b, [(drawn(a, b), drawn(b, a)) for _ in range(ROUNDS // 2)]
