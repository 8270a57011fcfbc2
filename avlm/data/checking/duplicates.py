"""Which of many things are equal or nearly so, found in columns of numbers: a few bytes a thing, no sets of texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

REACH = 32
"""How many neighbours in a bucket a sketch is compared with."""
BITS = 12
"""Sketches of 128 bits that differ in more are of different things."""
_BLOCKS = 8


def equal_groups(values: np.ndarray) -> Iterator[np.ndarray]:
    """Places of each value that comes more than once, ascending, in the order of their first places.

    Args:
        values: uint64 [n]; zeros stand for what is not known and are left out.
    """
    order = np.argsort(values, kind="stable")
    order = order[values[order] != 0]
    found = values[order]
    starts = np.flatnonzero(np.concatenate([[True], found[1:] != found[:-1]])) if len(found) else np.zeros(0, int)
    ends = np.append(starts[1:], len(found))
    many = np.flatnonzero(ends - starts > 1)
    for i in many[np.argsort(order[starts[many]], kind="stable")]:
        yield order[starts[i] : ends[i]]


def first_of_each(values: np.ndarray) -> np.ndarray:
    """Place of the first of each value, ascending; everything that is not known (0) is of its own kind."""
    known = np.flatnonzero(values)
    _, first = np.unique(values[known], return_index=True)
    return np.sort(np.concatenate([known[first], np.flatnonzero(values == 0)]))


def band_pairs(bands: np.ndarray, apart: np.ndarray) -> np.ndarray:
    """Pairs that share a band: each with the one before it in its bucket.

    Args:
        bands: uint32 [n, bands].
        apart: uint64 [n]; things of which it differs are never a pair.

    Returns:
        int64 [pairs, 2], the smaller place first, each pair once.
    """
    found = []
    for number in range(bands.shape[1]):
        key = mixed(bands[:, number].astype(np.uint64), apart)
        order = np.argsort(key, kind="stable")
        same = key[order[1:]] == key[order[:-1]]
        found.append(np.stack([order[:-1][same], order[1:][same]], 1))
    return _once(found)


def near_pairs(sketches: np.ndarray, most: int = BITS) -> np.ndarray:
    """Pairs of sketches that differ in few bits.

    Those that differ in less than 8 bits have one of 8 blocks in common and are found; of those that differ in more,
    most are.

    Args:
        sketches: uint64 [n, 2], 128 bits each.

    Returns:
        As `band_pairs`.

    Source:
        Manku, Jain and Das Sarma, "Detecting near-duplicates for web crawling" (2007), section 3.
    """
    found = []
    for block in range(_BLOCKS):
        word, shift = divmod(block, 4)
        key = (sketches[:, word] >> np.uint64(16 * shift)) & np.uint64(0xFFFF)
        order = np.lexsort([sketches[:, 1], sketches[:, 0], key])
        for step in range(1, min(REACH, len(order) - 1) + 1):
            one, other = order[:-step], order[step:]
            same = key[one] == key[other]
            if not same.any():
                break
            one, other = one[same], other[same]
            bits = np.bitwise_count(sketches[one] ^ sketches[other]).sum(1)
            found.append(np.stack([one, other], 1)[bits <= most])
    return _once(found)


def _once(pairs: list[np.ndarray]) -> np.ndarray:
    if not pairs:
        return np.zeros((0, 2), np.int64)
    return np.unique(np.sort(np.concatenate(pairs).astype(np.int64), axis=1), axis=0)


def mixed(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """uint64 [n]: a number for each two."""
    value = (one ^ (other * np.uint64(0x9E3779B97F4A7C15))) * np.uint64(0xD6E8FEB86659FD93)
    return value ^ (value >> np.uint64(32))


def groups_of(pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Everything that hangs together by pairs, each group ascending, in the order of their first members."""
    leader: dict[int, int] = {}

    def lead(i: int) -> int:
        while leader.setdefault(i, i) != i:
            leader[i] = leader[leader[i]]
            i = leader[i]
        return i

    for one, other in pairs:
        a, b = lead(one), lead(other)
        leader[max(a, b)] = min(a, b)
    groups: dict[int, list[int]] = {}
    for i in sorted(leader):
        groups.setdefault(lead(i), []).append(i)
    return list(groups.values())
