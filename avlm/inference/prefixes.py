"""Beginnings of conversations whose keys and values are remembered.

What was read once need not be read again where a conversation goes on, or another one begins with the same words and
media. Token ids do not tell that alone: two pictures have the same placeholders, so what stands behind them is compared
too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

from avlm.inference.kept import Kept
from avlm.inference.prompts import Prompt
from avlm.models import slots


@dataclass(frozen=True)
class Read:
    """Tokens that were read, and the media among them."""

    ids: np.ndarray
    """int64 [tokens]."""
    marks: Sequence[tuple[int, int, bytes]]
    """First position, end and content of each medium."""

    def __len__(self) -> int:
        return len(self.ids)


def read(prompt: Prompt, answer: Sequence[int] = (), tokens: int | None = None) -> Read:
    """The first tokens of a prompt and of what was answered to it."""
    ids = np.array([*prompt.ids, *answer][:tokens], np.int64)
    return Read(ids, [mark for mark in prompt.marks if mark[0] < len(ids)])


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

    def add(self, prefix: Prefix) -> None:
        """Remember a beginning; shorter ones that it begins with are forgotten."""
        for key, other in self._kept.items():
            if common(prefix.read, other.read) == len(other.read):
                self._kept.drop(key)
        self._kept.put(next(self._numbers), prefix, prefix.size())

    def has(self, wanted: Read) -> bool:
        """Whether all of it is remembered."""
        return self.longest(wanted)[0] == len(wanted)


def closest(wanted: Read, others: Iterable[tuple[int, Read]]) -> tuple[int, int]:
    """Of others that are known by a number, the one that has most in common: how much, and its number (-1: none)."""
    return max(((common(wanted, other), number) for number, other in others), default=(0, -1))
