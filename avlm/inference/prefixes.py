"""Beginnings of conversations whose keys and values are remembered.

What was read once need not be read again where a conversation goes on, or another one begins with the same words and
media. Token ids do not tell that alone: two pictures have the same placeholders, so what stands behind them is compared
too.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
from torch import Tensor

from avlm.inference.pool import Pool
from avlm.inference.prompts import Prompt
from avlm.models import slots

MOST = 64
"""Beginnings that are remembered at once: each is compared with every prompt that comes."""


@dataclass(frozen=True)
class Read:
    """Tokens that were read, and the media among them."""

    ids: np.ndarray
    """int64 [tokens]."""
    marks: Sequence[tuple[int, int, bytes]]
    """First position, end and content of each medium."""

    def __len__(self) -> int:
        return len(self.ids)


def read(prompt: Prompt, tokens: int) -> Read:
    """The first tokens of a prompt; one that is no longer has them all."""
    return Read(prompt.array[:tokens], [mark for mark in prompt.marks if mark[0] < tokens])


def read_on(prompt: Prompt, answer: Sequence[int], tokens: int) -> Read:
    """The first tokens of a prompt and of what was answered to it."""
    ids = np.concatenate([prompt.array, np.array(answer, np.int64)])[:tokens]
    return Read(ids, [mark for mark in prompt.marks if mark[0] < tokens])


def common(one: Read, other: Read) -> int:
    """How many tokens they begin with that are the same, media included; no medium is cut."""
    size = min(len(one), len(other))
    differ = np.flatnonzero(one.ids[:size] != other.ids[:size])
    size = int(differ[0]) if len(differ) else size
    for first, second in ((one, other), (other, one)):
        there = set(second.marks)
        for mark in first.marks:
            start, end, content = mark
            if start < size and (end > size or not content or mark not in there):
                size = start
                break
    return size


@dataclass(frozen=True)
class Prefix:
    """Tokens, and where it is kept what reading them left."""

    read: Read
    places: Tensor
    """int64 [tokens]."""


class Prefixes:
    """Remembers beginnings: those used last, as many as there is room for.

    Args:
        capacity: Bytes of keys and values; 0 remembers nothing.
    """

    def __init__(self, capacity: int) -> None:
        self._pool = Pool(capacity)
        self._kept: OrderedDict[int, Prefix] = OrderedDict()
        """What was used last comes last."""
        self._numbers = count()

    @property
    def capacity(self) -> int:
        return self._pool.capacity

    def __len__(self) -> int:
        return len(self._kept)

    def longest(self, wanted: Read) -> tuple[int, Prefix | None]:
        """The remembered beginning that has most in common with what is to be read, and how much that is."""
        tokens, key = closest(wanted, ((key, prefix.read) for key, prefix in self._kept.items()))
        if not tokens:
            return 0, None
        self._kept.move_to_end(key)
        return tokens, self._kept[key]

    def states(self, prefix: Prefix, tokens: int) -> slots.Kept:
        """What the first tokens of a beginning left."""
        return self._pool.get(prefix.places[:tokens])

    def remember(self, wanted: Read, states: slots.Kept) -> None:
        """Remember a beginning, if it is not known; shorter ones that it begins with are forgotten.

        Args:
            states: What reading it left; it is copied.
        """
        alike = {key: common(wanted, prefix.read) for key, prefix in self._kept.items()}
        for key, tokens in alike.items():
            if tokens == len(wanted):
                self._kept.move_to_end(key)
                return
        most = self._pool.most(states)
        if len(wanted) > most:
            return
        for key, tokens in alike.items():
            if tokens == len(self._kept[key].read):
                self._forget(key)
        while len(self._kept) >= MOST or sum(len(one.read) for one in self._kept.values()) + len(wanted) > most:
            self._forget(next(iter(self._kept)))
        self._kept[next(self._numbers)] = Prefix(wanted, self._pool.put(states))

    def _forget(self, key: int) -> None:
        self._pool.give_back(self._kept.pop(key).places)


def closest(wanted: Read, others: Iterable[tuple[int, Read]]) -> tuple[int, int]:
    """Of others that are known by a number, the one that has most in common: how much, and its number (-1: none)."""
    return max(((common(wanted, other), number) for number, other in others), default=(0, -1))
