"""What two conversations begin with alike, by their tokens and by what stands behind placeholders; and what is kept."""

from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avlm.inference.kept import Kept
from avlm.inference.prefixes import Prefixes, Read, closest, common

PLACE = 0
"""A placeholder, the same for every medium."""


@st.composite
def conversations(draw: st.DrawFn) -> list[tuple[int, bytes | None, int]]:
    """Tokens one by one: id, the medium that it is a place of, and which place of that."""
    found: list[tuple[int, bytes | None, int]] = []
    for _ in range(draw(st.integers(0, 6))):
        if draw(st.booleans()):
            medium, size = draw(st.sampled_from([b"a", b"b"])), draw(st.integers(1, 3))
            found += [(PLACE, medium, i) for i in range(size)]
        else:
            found.append((draw(st.integers(1, 2)), None, 0))
    return found


def as_read(conversation: list[tuple[int, bytes | None, int]]) -> Read:
    marks: list[tuple[int, int, bytes]] = []
    for at, (_, medium, place) in enumerate(conversation):
        if medium is not None and place == 0:
            marks.append((at, at + 1, medium))
        elif medium is not None:
            start, _, content = marks[-1]
            marks[-1] = (start, at + 1, content)
    return Read(np.array([token for token, *_ in conversation], np.int64), marks)


@settings(max_examples=400, deadline=None)
@given(conversations(), conversations())
def test_what_is_common_is_what_is_alike_token_by_token_without_half_a_medium(
    one: list[tuple[int, bytes | None, int]], other: list[tuple[int, bytes | None, int]]
) -> None:
    first, second = as_read(one), as_read(other)
    found = common(first, second)
    alike = 0
    while alike < min(len(one), len(other)) and one[alike] == other[alike]:
        alike += 1
    assert found <= alike  # nothing is taken for the same that is not
    cut = [m for read in (first, second) for m in read.marks if m[0] < alike < m[1]]
    ends = [m for m in first.marks if m[1] <= alike and m not in second.marks]
    ends += [m for m in second.marks if m[1] <= alike and m not in first.marks]
    assert found == min([alike, *(m[0] for m in (*cut, *ends))])
    assert common(second, first) == found
    assert common(first, first) == len(one)


def test_media_of_unknown_content_are_never_the_same() -> None:
    read = Read(np.array([1, PLACE, PLACE, 2]), [(1, 3, b"")])
    assert common(read, read) == 1


SIZE = 2 * 2 * 25 * 4
"""Bytes of the states of two tokens."""


def remember(prefixes: Prefixes, *ids: int) -> None:
    states = torch.tensor(ids).float()[None, :, None].expand(1, -1, 25)
    prefixes.remember(read(*ids), [(states, -states)])


def has(prefixes: Prefixes, *ids: int) -> bool:
    return prefixes.longest(read(*ids))[0] == len(ids)


def read(*ids: int) -> Read:
    return Read(np.array(ids, np.int64), [])


def test_the_longest_beginning_is_found_and_shorter_ones_of_it_are_forgotten() -> None:
    prefixes = Prefixes(10_000)
    assert prefixes.longest(read(1, 2)) == (0, None)
    for ids in ([1, 2], [1, 2, 3, 4], [1, 5, 6], [1, 2, 3]):
        remember(prefixes, *ids)
    assert len(prefixes) == 2  # what 1 2 3 4 begins with is not kept beside it
    tokens, found = prefixes.longest(read(1, 2, 3, 9))
    assert tokens == 3 and found is not None and found.read.ids.tolist() == [1, 2, 3, 4]
    assert has(prefixes, 1, 5) and not has(prefixes, 1, 5, 7)
    assert closest(read(1, 5, 6), [(0, read(1, 2)), (7, read(1, 5, 9)), (3, read(4))]) == (2, 7)
    assert closest(read(1), []) == (0, -1)


def test_what_was_not_used_for_longest_goes() -> None:
    prefixes = Prefixes(3 * SIZE)
    for i in range(3):
        remember(prefixes, i, 9)
    assert has(prefixes, 0, 9)  # used now
    remember(prefixes, 7, 9)
    assert [has(prefixes, i, 9) for i in (0, 1, 2, 7)] == [True, False, True, True]
    nothing = Prefixes(0)
    remember(nothing, 1)
    assert not has(nothing, 1)


def test_there_are_never_more_than_can_be_compared_in_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("avlm.inference.prefixes.MOST", 4)
    prefixes = Prefixes(10**6)
    for i in range(9):
        remember(prefixes, i, 9)
        assert len(prefixes) == min(i + 1, 4)
    assert [has(prefixes, i, 9) for i in (4, 5, 8)] == [False, True, True]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 20), st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.integers(1, 9)), max_size=40))
def test_kept_values_are_those_of_a_slow_list(capacity: int, asked: list[tuple[bool, int, int]]) -> None:
    kept: Kept[int, int] = Kept(capacity)
    slow: OrderedDict[int, int] = OrderedDict()
    for put, key, size in asked:
        if put:
            kept.put(key, size, size)
            if size <= capacity:
                slow.pop(key, None)
                slow[key] = size
                while sum(slow.values()) > capacity:
                    slow.popitem(last=False)
        else:
            assert kept.get(key) == slow.get(key)
            if key in slow:
                slow.move_to_end(key)
        assert kept.used == sum(slow.values()) <= capacity
    assert [kept.get(key) for key in range(6)] == [slow.get(key) for key in range(6)]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 60), st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=12), max_size=40))
def test_what_is_remembered_is_what_was_read_and_takes_no_more_than_it_may(room: int, asked: list[list[int]]) -> None:
    """Two layers of different heads; a value tells the token, and how many came before it."""
    capacity = room * 2 * (1 * 2 + 2 * 3) * 4
    prefixes = Prefixes(capacity)
    for ids in asked:
        told = torch.tensor([10 * token + at for at, token in enumerate(ids)]).float()[None, :, None]
        layers = [told.expand(1, -1, 2), 100 + told.expand(2, -1, 3)]
        prefixes.remember(read(*ids), [(states, -states) for states in layers])
        tokens, found = prefixes.longest(read(*ids))
        assert (found is not None and tokens == len(ids)) == (len(ids) <= room)
        held = [t for pair in prefixes._pool._layers for t in pair]
        assert sum(t.numel() * t.element_size() for t in held) <= capacity
    for prefix in prefixes._kept.values():
        ids = prefix.read.ids.tolist()
        told = torch.tensor([10 * token + at for at, token in enumerate(ids)]).float()[None, :, None]
        (one, two), (three, four) = prefixes.states(prefix, len(ids))
        assert torch.equal(one, told.expand(1, -1, 2)) and torch.equal(two, -one)
        assert torch.equal(three, 100 + told.expand(2, -1, 3)) and torch.equal(four, -three)
    places = [place for prefix in prefixes._kept.values() for place in prefix.places.tolist()]
    assert len(set(places)) == len(places)
    assert sorted(places + prefixes._pool._free) == list(range(prefixes._pool._places))
