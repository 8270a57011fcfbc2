"""Even work for every rank."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avlm.data.planning.ranks import by_likeness, deal, share_out
from avlm.layout import work


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 40), st.integers(1, 12), st.integers(0, 1000))
def test_every_row_goes_to_one_rank_and_ranks_have_equally_many(steps: int, rows: int, ranks: int, seed: int) -> None:
    costs = np.random.default_rng(seed).lognormal(0, 1, (steps, rows, 2))
    given_to = deal(costs, ranks)
    assert given_to.shape == (steps, rows)
    counts = np.array([np.bincount(step, minlength=ranks) for step in given_to])
    assert counts.shape[1] == ranks and (counts.max(1) - counts.min(1) <= 1).all()
    for step in range(steps):  # a step by itself is dealt as among others
        assert np.array_equal(deal(costs[step : step + 1], ranks)[0], given_to[step])


def test_dealing_evens_out_both_costs() -> None:
    costs = np.random.default_rng(0).lognormal(0, [0.3, 0.15], (200, 64, 2))
    loads = np.zeros((200, 8, 2))
    np.add.at(loads, (np.arange(200)[:, None], deal(costs, 8)), costs)
    spread = loads.max(1).sum(0) / loads.mean(1).sum(0)
    in_turn = costs.reshape(200, 8, 8, 2).sum(1)
    assert (spread < 1.03).all()
    assert (in_turn.max(1).sum(0) / in_turn.mean(1).sum(0) > [1.12, 1.06]).all()  # dealt as they come


def test_costs_that_are_nothing_are_dealt_too() -> None:
    assert sorted(deal(np.zeros((1, 4, 2)), 2)[0].tolist()) == [0, 0, 1, 1]


@pytest.mark.parametrize("encoder", ["none", "equal", "few values", "any value"])
def test_rows_that_follow_each_other_cost_alike(encoder: str) -> None:
    rng = np.random.default_rng(0)
    second = {
        "none": np.zeros(4800),
        "equal": np.full(4800, 3.0),
        "few values": rng.binomial(12, 0.9, 4800).astype(float),
        "any value": rng.lognormal(0, 0.15, 4800),
    }[encoder]
    costs = np.stack([rng.lognormal(0, 0.25, 4800), second], 1)
    order = by_likeness(costs, 8)
    assert sorted(order.tolist()) == list(range(4800))
    groups = costs[order].reshape(-1, 8, 2)
    spread = groups.max(1).sum(0) / np.maximum(groups.mean(1).sum(0), 1e-9)
    assert (spread < 1.03).all()


def most_work(costs: list[float], given_to: Sequence[int], ranks: int) -> float:
    return max(sum(c for c, r in zip(costs, given_to, strict=True) if r == rank) for rank in range(ranks))


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 2)), max_size=7), st.integers(1, 3))
def test_work_is_shared_out_evenly(pieces: list[tuple[int, int]], ranks: int) -> None:
    """Against the best of all ways to share it out, and against an even share and one piece."""
    costs, homes = [float(cost) for cost, _ in pieces], [home % ranks for _, home in pieces]
    given_to = share_out(costs, homes, ranks)
    assert len(given_to) == len(costs) and set(given_to) <= set(range(ranks))
    most = most_work(costs, given_to, ranks)
    best = min(most_work(costs, other, ranks) for other in itertools.product(range(ranks), repeat=len(costs)))
    assert most <= 2 * best
    assert most <= sum(costs) / ranks + max(costs, default=0) + 1e-6


def test_only_what_is_too_much_moves() -> None:
    assert share_out([5, 1, 4, 1, 1], [0] * 5, 2) == [0, 0, 1, 1, 1]  # 6 is an even share: 5 and a 1 stay
    assert share_out([2, 2, 2], [2, 0, 1], 3) == [2, 0, 1]
    assert share_out([3, 1, 1, 1], [0, 1, 1, 1], 2) == [0, 1, 1, 1]
    assert share_out([], [], 3) == []
    assert share_out([2.0], [1], 3) == [1]  # more than an even share, and as good here as anywhere


def test_steps_of_few_rows_are_made_even_by_moving_a_part_of_their_media() -> None:
    """Eight samples to each of 8 ranks: four in ten with one to five tiles of 576 embeddings, two with up to 30 s of
    sound, 50 a second."""
    rng, ranks = np.random.default_rng(0), 8
    busiest, spread, mean, moved = 0.0, 0.0, 0.0, 0.0
    for _ in range(200):
        kinds = rng.random(8 * ranks)
        media = [
            [work(576)] * int(rng.integers(1, 6)) if k < 0.4 else [work(int(rng.uniform(50, 1500)))] for k in kinds
        ]
        media = [each if kind < 0.6 else [] for each, kind in zip(media, kinds, strict=True)]
        costs = [float(cost) for each in media for cost in each]
        homes = [sample % ranks for sample, each in enumerate(media) for _ in each]
        makers = share_out(costs, homes, ranks)
        busiest += most_work(costs, homes, ranks)
        spread += most_work(costs, makers, ranks)
        mean += sum(costs) / ranks
        moved += sum(cost for cost, a, b in zip(costs, homes, makers, strict=True) if a != b) / ranks
    assert busiest > 1.5 * mean and spread < 1.05 * mean and moved < 0.2 * mean
