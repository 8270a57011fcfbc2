"""Which sample stands at which place: shuffles of any size, blends, length grouping, a curriculum."""

from __future__ import annotations

import pickle
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avlm.data.planning import order as order_module
from avlm.data.planning.order import ByLength, Climbing, Order, Stream, turns
from avlm.data.planning.shuffle import WHOLE, shuffled


def stream(count: int = 100, *, seed: int = 0, stage: str = "a", shuffle: bool = True) -> Stream:
    return Stream([count], None, seed=seed, stage=stage, shuffle=shuffle)


def members(order: Order, first: int, last: int) -> list[tuple[int, int]]:
    rows, epochs = order.read(first, last)
    return list(zip(rows.tolist(), epochs.tolist(), strict=True))


def test_up_to_65536_rows_the_order_is_numpys_permutation() -> None:
    """What it was in every version before: runs that exist go on."""
    for count in (7, 65_536):
        rows, epochs = stream(count, seed=5, stage="a").read(count, 2 * count)
        assert np.array_equal(rows, np.random.default_rng([5, 0xE8B7BE43, 1]).permutation(count))
        assert set(epochs.tolist()) == {1}


@pytest.mark.parametrize("count", [WHOLE + 1, 65_557, 70_000, 99_856, 316**2 + 316])  # squares, primes, full grids
def test_a_large_shuffle_reads_every_row_once(count: int) -> None:
    rows = shuffled(np.arange(count), count, (3, 1, 4))
    assert np.array_equal(np.sort(rows), np.arange(count))


@settings(deadline=None, max_examples=30)
@given(st.integers(WHOLE + 1, 10**10), st.integers(0, 2**63 - 1), st.data())
def test_places_of_a_large_shuffle_can_be_asked_for_in_any_company(count: int, seed: int, data: st.DataObject) -> None:
    places = np.array(data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=50, unique=True)))
    rows = shuffled(places, count, (seed, 1))
    assert ((rows >= 0) & (rows < count)).all()
    assert len(set(rows.tolist())) == len(places)
    alone = [int(shuffled(places[i : i + 1], count, (seed, 1))[0]) for i in range(len(places))]
    assert rows.tolist() == alone


def test_a_large_shuffle_is_fair() -> None:
    """Chi-squared, against its distribution: each stretch has rows from everywhere, and neighbours are strangers."""
    count, parts = 1_000_000, 20
    rows = shuffled(np.arange(count), count, (0, 0))
    part = rows * parts // count
    degrees = parts * parts - 1
    bound = degrees + 5 * (2 * degrees) ** 0.5  # five standard deviations
    for table in (
        Counter(zip((np.arange(count) * parts // count).tolist(), part.tolist(), strict=True)),
        Counter(pairwise(part.tolist())),
        Counter(zip(part[:-1000].tolist(), part[1000:].tolist(), strict=True)),  # the root of the count apart
    ):
        expected = sum(table.values()) / parts**2
        assert sum((table[a, b] - expected) ** 2 / expected for a in range(parts) for b in range(parts)) < bound
    step = np.abs(np.diff(rows))
    assert (step < 10).mean() == pytest.approx(2 * 9.5 / count, rel=0.5)  # as likely as chance has it
    again = shuffled(np.arange(count), count, (0, 1))
    assert (rows == again).sum() < 12  # of fixed points there is one, give or take (Poisson)


def test_the_large_shuffle_is_the_same_on_every_machine() -> None:
    """A slow walk through the network by whole numbers, its tables by numpy's promise for PCG64 and SeedSequence."""
    count, seeds = 100_003, (7, 2, 1)
    a, b = 316, 317  # the root, and what it takes to hold the count
    bits = np.random.PCG64(np.random.SeedSequence(seeds))
    tables = [[(int(raw) >> 32) * below >> 32 for raw in bits.random_raw(n)] for below, n in [(a, b), (b, a)] * 3]

    def walk(place: int) -> int:
        high, low = divmod(place, b)
        for i in (0, 2, 4):
            high = (high + tables[i][low]) % a
            low = (low + tables[i + 1][high]) % b
        row = high * b + low
        return row if row < count else walk(row)

    places = np.arange(0, count, 97)
    assert shuffled(places, count, seeds).tolist() == [walk(p) for p in places.tolist()]


@pytest.mark.parametrize("sizes", [[40], [65_000, 5_000]])
def test_a_stream_is_its_pieces_end_to_end(sizes: list[int]) -> None:
    order = Stream(sizes, None, seed=1, stage="a")
    count = sum(sizes)
    whole = members(order, 0, 2 * count)
    assert sorted(whole) == [(row, epoch) for row in range(count) for epoch in range(2)]
    cuts = [0, 1, count - 1, count + 3, 2 * count]
    assert [m for a, b in pairwise(cuts) for m in members(order, a, b)] == whole


def test_as_is_is_as_it_is() -> None:
    assert members(stream(3, shuffle=False), 1, 8) == [(1, 0), (2, 0), (0, 1), (1, 1), (2, 1), (0, 2), (1, 2)]


# ---------------------------------------------------------------- blends


def webster(weights: list[int], seats: int) -> list[int]:
    """Who gets each seat by Sainte-Lague's rule as electoral laws have it: the largest quotient w / (2n + 1)."""
    had = [0] * len(weights)
    given = []
    for _ in range(seats):
        best = max(range(len(weights)), key=lambda i: (Fraction(weights[i], 2 * had[i] + 1), -i))
        had[best] += 1
        given.append(best)
    return given


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=9), st.integers(0, 200), st.integers(1, 60))
def test_turns_are_the_seats_of_a_parliament(weights: list[int], first: int, count: int) -> None:
    expected = webster(weights, first + count)
    source, at = turns(first, first + count, weights, [True] * len(weights))
    assert source.tolist() == expected[first:]
    assert at.tolist() == [expected[:p].count(expected[p]) for p in range(first, first + count)]


def test_each_source_has_its_share_at_any_point() -> None:
    weights = [5.0, 1.0, 0.1, 3.0, 0.9]
    source, _ = turns(0, 20_000, weights, [True] * 5)
    had = np.cumsum(source[:, None] == np.arange(5), 0)
    due = np.arange(1, 20_001)[:, None] * np.array(weights) / 10
    assert np.abs(had - due).max() < 1.5
    far, at = turns(10**11, 10**11 + 10_000, weights, [True] * 5)
    assert np.bincount(far) == pytest.approx([5000, 1000, 100, 3000, 900], abs=2)
    assert at[far == 0][0] == pytest.approx(10**11 / 2, abs=2)


def test_a_source_without_rows_has_no_turn() -> None:
    source, at = turns(0, 6, [1, 8, 2], [True, False, True])
    assert source.tolist() == [2, 0, 2, 2, 0, 2]  # 2 : 1
    assert at.tolist() == [0, 0, 1, 2, 1, 3]


def test_sources_with_weights_go_through_their_own_epochs() -> None:
    order = Stream([4, 0, 100], [1, 5, 3], seed=0, stage="a")
    read = members(order, 0, 400)
    small = [(row, epoch) for row, epoch in read if row < 4]
    large = [(row, epoch) for row, epoch in read if row >= 4]
    assert (len(small), len(large)) == (100, 300)
    assert [epoch for _, epoch in small] == [i // 4 for i in range(100)]
    assert sorted(small) == [(row, epoch) for row in range(4) for epoch in range(25)]
    assert sorted(large) == [(row, epoch) for row in range(4, 104) for epoch in range(3)]
    assert len({tuple(small[i : i + 4]) for i in range(0, 100, 4)}) > 5  # each epoch has its own order
    assert [m for a in range(0, 400, 7) for m in members(order, a, min(a + 7, 400))] == read


# ---------------------------------------------------------------- by length


def lengths_of(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 1000, count)


def test_by_length_a_run_has_samples_of_like_length() -> None:
    lengths = lengths_of(6400)
    order = ByLength(stream(6400), lengths.__getitem__, 32, (0, 1), 6400)
    read = members(order, 0, 6400)
    assert read[100:300] == members(order, 100, 300)
    assert sorted(read) == sorted(members(stream(6400), 0, 6400))
    runs = lengths[[row for row, _ in read]].reshape(-1, 32)
    assert np.ptp(runs, 1).mean() < 10  # by chance: 939
    assert (np.diff(runs.min(1)) < 0).mean() == pytest.approx(0.5, abs=0.1)  # and the runs are in no order


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 50), st.integers(0, 9))
def test_by_length_a_lap_has_its_own_samples_and_runs_begin_where_steps_do(
    count: int, run: int, piece: int, seed: int
) -> None:
    lengths = np.random.default_rng(seed).permutation(count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order_module, "WHOLE", 64)
        order = ByLength(stream(count, seed=seed), lengths.__getitem__, run, (seed,), count)
        read = [m for a in range(0, 3 * count, piece) for m in members(order, a, min(a + piece, 3 * count))]
    window = run * max(1, 64 // run)
    for lap in range(3):
        own = read[lap * count : (lap + 1) * count]
        assert sorted(own) == [(row, lap) for row in range(count)]
        for first in range(0, count, window):  # a run has what stands side by side in its window, sorted
            inside = [row for row, _ in own[first : first + window]]
            places = {row: i for i, row in enumerate(sorted(inside, key=lengths.__getitem__))}
            cut = [0, *range(-(lap * count + first) % run, len(inside), run), len(inside)]
            for a, b in pairwise(cut):
                found = [places[row] for row in inside[a:b]]
                assert found == list(range(min(found, default=0), min(found, default=0) + len(found)))


# ---------------------------------------------------------------- curriculum


def test_a_curriculum_climbs_and_reads_every_sample_once() -> None:
    lengths = lengths_of(640)
    order = Climbing(stream(640), lengths.__getitem__, 640)
    read = members(order, 0, 640)
    assert sorted(read) == [(row, 0) for row in range(640)]
    climbed = lengths[[row for row, _ in read]]
    assert np.abs(climbed - np.sort(lengths)).max() < 1000 / 64 * 3  # off by the width of a stratum or two
    assert [row for row, _ in read] != np.argsort(lengths, kind="stable").tolist()
    assert sorted(members(order, 640, 1280)) == [(row, 1) for row in range(640)]
    other = members(Climbing(stream(640, seed=1), lengths.__getitem__, 640), 0, 640)
    assert other != read and sorted(other) == sorted(read)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 120), st.integers(1, 400), st.integers(1, 50), st.integers(0, 9))
def test_a_curriculum_is_a_stable_sort_by_strata(count: int, span: int, piece: int, seed: int) -> None:
    """Against a sort of everything in memory, over several chunks of the stream and several readings of it."""
    lengths = lengths_of(count, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order_module, "WHOLE", 64)
        order = Climbing(stream(count, seed=seed), lengths.__getitem__, span)
        read = [m for a in range(0, 2 * span, piece) for m in members(order, a, min(a + piece, 2 * span))]
    for lap in range(2):
        population = members(stream(count, seed=seed), lap * span, (lap + 1) * span)
        some = sorted(int(lengths[row]) for row, _ in population[:64])
        edges = [some[i * len(some) // 64] for i in range(1, 64)]
        population.sort(key=lambda m: sum(edge <= lengths[m[0]] for edge in edges))
        assert read[lap * span : (lap + 1) * span] == population


def test_an_order_can_be_sent_to_another_process() -> None:
    lengths = lengths_of(5000)
    for order in (
        ByLength(stream(5000), lengths.__getitem__, 8, (1,), 5000),
        Climbing(stream(5000), lengths.__getitem__, 99),
    ):
        before = members(order, 10, 300)
        copy = pickle.dumps(order)
        assert len(copy) < 60_000  # the lengths, and nothing that was worked out
        assert members(pickle.loads(copy), 10, 300) == before
