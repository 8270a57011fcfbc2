"""Beginnings of conversations whose keys and values are remembered.

What was read once need not be read again where a conversation goes on, or another one begins with the same words and
media. Token ids do not tell that alone: two pictures have the same placeholders, so what stands behind them is compared
too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

from avlm.inference.kept import Kept
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
    """Tokens, and what reading them left."""

    read: Read
    states: slots.Kept

    def size(self) -> int:
        """Bytes."""
        return self.read.ids.nbytes + sum(t.numel() * t.element_size() for pair in self.states for t in pair)


class Prefixes:
    """Remembers beginnings.

    Args:
        capacity: Bytes of keys and values; 0 remembers nothing.
    """

    def __init__(self, capacity: int) -> None:
        self._kept: Kept[int, Prefix] = Kept(capacity)
        self._numbers = count()

    @property
    def capacity(self) -> int:
        return self._kept.capacity

    def longest(self, wanted: Read) -> tuple[int, Prefix | None]:
        """The remembered beginning that has most in common with what is to be read, and how much that is."""
        found = [(common(wanted, prefix.read), key) for key, prefix in self._kept.items()]
        tokens, key = max(found, default=(0, -1))
        return (tokens, self._kept.get(key)) if tokens else (0, None)

    def remember(self, wanted: Read, states: Callable[[], slots.Kept]) -> None:
        """Remember a beginning, if it is not known; shorter ones that it begins with are forgotten.

        Args:
            states: What reading it left.
        """
        alike = [(common(wanted, prefix.read), key, len(prefix.read)) for key, prefix in self._kept.items()]
        for tokens, key, _ in alike:
            if tokens == len(wanted):
                self._kept.get(key)  # used now
                return
        prefix = Prefix(wanted, states())
        within = [key for tokens, key, size in alike if tokens == size]
        too_many = [key for _, key, _ in alike][: max(0, len(alike) - len(within) + 1 - MOST)]
        for key in (*within, *too_many):
            self._kept.drop(key)
        self._kept.put(next(self._numbers), prefix, prefix.size())


def closest(wanted: Read, others: Iterable[tuple[int, Read]]) -> tuple[int, int]:
    """Of others that are known by a number, the one that has most in common: how much, and its number (-1: none)."""
    return max(((common(wanted, other), number) for number, other in others), default=(0, -1))
