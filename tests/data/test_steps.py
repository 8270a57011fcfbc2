"""A stage's plan: each step's rows, the same for whoever asks, from wherever it goes on, on however many ranks."""

from __future__ import annotations

import math
import pickle
import time
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avlm.config.data import Order
from avlm.config.run import RunConfig
from avlm.config.stage import Stage
from avlm.data.planning import plan as plan_module
from avlm.data.planning.plan import Measures, Plan, pack_rows, positions
from avlm.data.planning.state import PlanState
from avlm.errors import ConfigError
from tests.data.planning.test_packing import bench_plan

ORDERS: tuple[Order, ...] = ("shuffled", "as_is", "by_length", "curriculum")


def stage(**how: Any) -> Stage:
    return Stage.model_validate({"name": "joint", "epochs": 1, "row_tokens": 1000, **how})


def measures(count: int, seed: int = 0) -> Measures:
    rng = np.random.default_rng(seed)
    tiles = rng.integers(0, 4, count)
    return Measures(rng.integers(1, 400, count) + 100 * tiles, tiles, tiles, rng.integers(0, 50, count))


def plan(count: int = 500, *, sizes: list[int] | None = None, how: Any = None, **more: Any) -> Plan:
    sizes = sizes or [count]
    return Plan(sizes, measures(sum(sizes)), **{"seed": 0, "stage": stage(**(how or {"batch_rows": 4})), **more})


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of 64 samples, so that a few hundred have many."""
    monkeypatch.setattr(plan_module, "WINDOW", 64)
    monkeypatch.setattr(plan_module, "NEAR", 64)


# ---------------------------------------------------------------- by samples


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 200), st.integers(1, 17), st.integers(0, 2**63 - 1))
def test_by_samples_steps_read_what_they_always_read(count: int, batch: int, seed: int) -> None:
    how = {"batch_samples": batch}
    made = plan(count, how=how, seed=seed)
    lengths = np.asarray(made.measures.tokens) if made.measures else None
    assert lengths is not None
    for k in (0, 1, 7):
        wanted = positions(k, batch, count, seed=seed, stage="joint")
        assert made.samples(k) == Plan([count], seed=seed, stage=stage(**how)).samples(k) == wanted
        packed = pack_rows([int(lengths[row]) for row, _ in wanted], 1000)
        assert made.step(k).rows == [[wanted[i] for i in row] for row in packed]
    run = RunConfig.model_validate({"recipe": "r", "out": "o", "model": "m", "stages": [stage(**how)]})
    for epochs in (1, 0.5, 3, 2.3):
        longer = stage(**how, epochs=epochs)
        assert made.steps(epochs) == run.stage_steps(longer, count)


@pytest.mark.parametrize("order", ORDERS)
def test_by_samples_every_order_reads_each_sample_once_an_epoch(order: Order) -> None:
    made = plan(640, how={"batch_samples": 16}, order=order)
    read = [member for k in range(640 // 16) for member in made.samples(k)]
    assert len(set(read)) == len(read)
    assert sorted(row for row, epoch in read if epoch == 0) == list(range(640))
    assert made.samples(3) == read[48:64]


def test_by_length_a_step_has_samples_of_like_length() -> None:
    made = plan(6400, how={"batch_samples": 32}, order="by_length")
    assert made.measures is not None
    spans = [np.ptp(made.measures.tokens[np.array([row for row, _ in made.samples(k)])]) for k in range(100)]
    assert np.mean(spans) < 10  # of 700


# ---------------------------------------------------------------- by rows


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(1, 150), min_size=1, max_size=3),
    st.integers(1, 20),
    st.sampled_from(ORDERS),
    st.booleans(),
    st.integers(0, 2**63 - 1),
)
def test_every_sample_of_an_epoch_is_read_once_and_no_row_is_too_large(
    sizes: list[int], batch: int, order: Order, tight: bool, seed: int
) -> None:
    how = {"batch_rows": batch, **({"row_tiles": 5, "row_frames": 90} if tight else {})}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "WINDOW", 64)
        patch.setattr(plan_module, "NEAR", 32)
        made = plan(sizes=sizes, how=how, order=order, seed=seed)
        steps = [made.step(k) for k in range(made.steps(2))]
    assert all(len(step.rows) == batch for step in steps)
    rows = [row for step in steps for row in step.rows]
    by = made.measures
    assert by is not None and by.tiles is not None and by.frames is not None
    for row in rows:
        numbers = np.array([number for number, _ in row])
        assert by.tokens[numbers].sum() <= 1000
        assert not tight or (by.tiles[numbers].sum() <= 5 and by.frames[numbers].sum() <= 90)
    read = [member for row in rows for member in row]
    count = sum(sizes)
    assert sorted(m for m in read if m[1] < 2) == [(row, epoch) for row in range(count) for epoch in (0, 1)]
    assert {epoch for _, epoch in read[: sum(map(len, rows[: sum(made.packs[: len(made.cuts) - 1])]))]} == {0}


@pytest.mark.usefixtures("narrow")
def test_costs_are_those_of_the_rows() -> None:
    made = plan()
    by = made.measures
    assert by is not None and by.cost is not None
    for k in range(made.steps(1)):
        step = made.step(k)
        for row, (squares, encoders) in zip(step.rows, step.costs, strict=True):
            numbers = np.array([number for number, _ in row])
            assert squares == (by.tokens[numbers] ** 2).sum() and encoders == by.cost[numbers].sum()


@pytest.mark.usefixtures("narrow")
def test_the_length_of_a_stage_is_what_it_takes_to_read_it() -> None:
    """Counted by reading on until so many samples were read; a part of an epoch to within a row of a window's."""
    made = plan(how={"batch_rows": 3})
    sums = np.cumsum([len(row) for k in range(130) for row in made.step(k).rows])
    for epochs in (1, 2):
        assert made.steps(epochs) == math.ceil((int(np.searchsorted(sums, epochs * 500)) + 1) / 3)
    for epochs in (0.3, 0.77, 1.5):
        rows = int(np.searchsorted(sums, epochs * 500)) + 1
        assert made.steps(epochs) == pytest.approx(rows / 3, abs=2)
    run = RunConfig.model_validate({"recipe": "r", "out": "o", "model": "m", "stages": [made.stage]})
    assert run.stage_steps(made.stage, planned=made.steps) == made.steps(1)
    assert run.model_copy(update={"max_steps": 2}).stage_steps(made.stage, planned=made.steps) == 2


@pytest.mark.parametrize("order", ["as_is", "curriculum"])
@pytest.mark.usefixtures("narrow")
def test_rows_follow_an_order_that_is_asked_for(order: Order) -> None:
    made = plan(order=order)
    by = made.measures
    assert by is not None
    rows = [row for k in range(made.steps(1)) for row in made.step(k).rows]
    if order == "as_is":
        place = [np.mean([number for number, _ in row]) for row in rows]
        assert np.mean(np.abs(np.array(place) - np.linspace(0, 500, len(place)))) < 32  # half a window
    else:
        mean = [by.tokens[np.array([number for number, _ in row])].mean() for row in rows]
        assert np.corrcoef(mean, np.arange(len(mean)))[0, 1] > 0.95


def test_a_curriculum_climbs_over_the_stage_and_not_over_an_epoch() -> None:
    made = plan(100, how={"batch_samples": 10}, order="curriculum", span=200)
    by = made.measures
    assert by is not None
    mean = [by.tokens[np.array([row for row, _ in made.samples(k)])].mean() for k in range(20)]
    assert all(a < b + 40 for a, b in pairwise(mean)) and mean[19] > 4 * mean[0]
    assert sorted(m for k in range(20) for m in made.samples(k)) == [(r, e) for r in range(100) for e in range(2)]


def test_a_blend_with_weights_is_planned_by_rows_too() -> None:
    made = plan(sizes=[50, 400], weights=[1, 1])
    read = [member for k in range(made.steps(2)) for row in made.step(k).rows for member in row]
    assert np.mean([row < 50 for row, _ in read]) == pytest.approx(0.5, abs=0.02)
    small = sorted(member for member in read if member[0] < 50)
    assert len(set(small)) == len(small) and max(epoch for _, epoch in small) >= 8


# ---------------------------------------------------------------- ranks and resume


@settings(deadline=None, max_examples=30)
@given(st.data(), st.sampled_from([1, 5, 8, 24]), st.sampled_from(ORDERS), st.integers(0, 2**32))
def test_interrupted_anywhere_it_goes_on_the_same_on_any_number_of_ranks(
    data: st.DataObject, batch: int, order: Order, seed: int
) -> None:
    """The global sequence of samples and rows of an uninterrupted run, put together from what each rank reads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "WINDOW", 64)
        patch.setattr(plan_module, "NEAR", 64)

        def begun() -> Plan:
            return plan(300, how={"batch_rows": batch}, order=order, seed=seed, sources={"rows.jsonl": "5eed"})

        one = begun()
        whole = [one.step(k).rows for k in range(one.steps(2))]
        last = len(whole)
        stops = sorted(data.draw(st.lists(st.integers(0, last), max_size=3)))
        state = begun().state(0).to_json()
        for first, end in pairwise([0, *stops, last]):
            ranks = data.draw(st.sampled_from([1, 2, 3, 8]))
            made = begun()
            assert made.resume(PlanState.from_json(state)) == first
            for k in range(first, end):
                step = made.step(k)
                parts = [made.step(k).of_rank(rank, ranks) for rank in range(ranks)]
                assert sorted(row for part in parts for row in part) == sorted(whole[k])
                assert step.rows == whole[k]
                assert max(map(len, parts)) - min(map(len, parts)) <= 1
            state = made.state(end).to_json()


@pytest.mark.usefixtures("narrow")
def test_going_on_plans_no_window_twice() -> None:
    before = plan(2000)
    last = before.steps(1)
    state = PlanState.from_json(before.state(last - 3).to_json())
    after = plan(2000)
    read: list[int] = []
    places = after.order.read
    after.order.read = lambda first, end: (read.append(first), places(first, end))[1]  # type: ignore[method-assign]
    assert after.step(after.resume(state)).rows == before.step(last - 3).rows
    assert len(read) <= 2  # of 32 windows
    assert after.steps(1) == last and len(read) <= 2
    assert plan(2000).step(last - 3).rows == before.step(last - 3).rows  # and without the counts, by planning all


def test_a_plan_can_be_sent_to_another_process() -> None:
    for order in ORDERS:
        made = plan(order=order)
        rows = made.step(3).rows
        assert pickle.loads(pickle.dumps(made)).step(3).rows == rows


def test_other_data_or_settings_are_refused_by_name() -> None:
    def with_(**more: Any) -> Plan:
        return plan(**{"sources": {"a.jsonl": "1", "b.jsonl": "2"}, **more})

    state = PlanState.from_json(with_().state(7).to_json())
    assert state == with_().state(7)
    assert with_().resume(state) == 7
    assert with_(sources={"moved.jsonl": "1", "b.jsonl": "2"}).resume(state) == 7
    end = "so other samples would follow than without the interruption."
    back = "Put the data back as it was, or begin in another directory with out=DIR"
    for other, message in (
        ({"sources": {"a.jsonl": "1", "b.jsonl": "3"}}, f"b.jsonl has changed since step 7 was saved, {end} {back}"),
        ({"sources": {"a.jsonl": "1"}}, f"b.jsonl is no longer read since step 7 was saved, {end} {back}"),
        (
            {"sources": {"a.jsonl": "1", "b.jsonl": "2", "c": "3"}},
            f"c is new since step 7 was saved, {end} {back}",
        ),
        (
            {"sources": {"b.jsonl": "2", "a.jsonl": "1"}},
            f"the order of b.jsonl, a.jsonl has changed since step 7 was saved, {end} {back}",
        ),
        (
            {"seed": 1},
            f"the data of step 7 was planned with seed=0, and now seed=1, {end} Set seed as it was, or begin in "
            "another directory with out=DIR",
        ),
    ):
        with pytest.raises(ConfigError) as error:
            with_(**other).resume(state)
        assert str(error.value) == message
    for other in (
        {"order": "as_is"},
        {"count": 501},
        {"weights": [2.0]},
        {"how": {"batch_rows": 5}},
        {"how": {"batch_rows": 4, "row_tokens": 2000}},
        {"how": {"batch_rows": 4, "row_tiles": 9}},
    ):
        with pytest.raises(ConfigError, match="was planned with"):
            with_(**other).resume(state)


def test_a_damaged_state_is_refused() -> None:
    text = plan().state(7).to_json()
    for damaged in ("", "7", "[]", "{}", text[:-9], text.replace('"step": 7', '"step": 8')):
        with pytest.raises(ConfigError, match="the state of the data is not what was written"):
            PlanState.from_json(damaged)


def test_what_goes_by_lengths_needs_them() -> None:
    asked = "goes by the lengths of samples, and the data of stage joint have no index to tell them."
    for how, order, message in (
        ({"batch_rows": 4}, "shuffled", f"stages.joint.batch_rows {asked}"),
        ({"batch_samples": 4}, "curriculum", f"data.order=curriculum {asked}"),
    ):
        with pytest.raises(ConfigError) as error:
            Plan([9], seed=0, stage=stage(**how), order=order)
        assert str(error.value).startswith(message) and "`avlm data index`" in str(error.value)
    with pytest.raises(ConfigError, match=r"have no index\. Make one with `avlm data index`"):
        Plan([9], seed=0, stage=stage(batch_samples=4)).step(0)
    with pytest.raises(ConfigError, match="row_tiles=3 limits what the index does not tell"):
        Plan([9], Measures(np.ones(9, int)), seed=0, stage=stage(batch_rows=4, row_tiles=3))
    with pytest.raises(ConfigError) as error:
        Plan([2], Measures(np.array([5, 1001])), seed=0, stage=stage(batch_rows=4)).step(0)
    assert str(error.value) == (
        "sample 1 of stage joint takes 1001 tokens, and a row of the stage holds 1000. "
        "Raise stages.joint.row_tokens, or leave such samples out with data.too_long=drop"
    )


# ---------------------------------------------------------------- what it shows


@pytest.mark.parametrize("batch_rows", [8, 64])
def test_ranks_are_even_in_each_step(batch_rows: int) -> None:
    """Over 8 ranks: what the slowest of each step has, summed, by the mean. With 8 rows each rank has one."""
    bench = bench_plan()
    count = 100_000
    _, fill, spreads = bench.whole_plan(bench.measured(count), count, batch_rows)
    assert fill >= 0.995
    assert max(spreads) <= 1.05


def test_sounds_and_pictures_of_many_tiles_are_even_too() -> None:
    rng = np.random.default_rng(0)
    tokens, pictures = bench_plan().llava_mix(60_000)
    tiles = pictures * rng.integers(1, 6, 60_000)
    seconds = rng.uniform(1, 30, 60_000) * (rng.random(60_000) < 0.3)
    tokens = tokens + 576 * (tiles - pictures) + (12.5 * seconds).astype(int)
    by = Measures(np.minimum(tokens, 8192), 577 * tiles + 50 * seconds)
    bench = bench_plan()
    _, fill, spreads = bench.whole_plan(by, 60_000, 8)
    assert fill >= 0.99
    assert max(spreads) <= 1.05


@pytest.mark.slow
def test_a_million_samples_are_planned_in_a_second_and_a_half() -> None:
    bench = bench_plan()
    known = bench.measured(1_000_000)
    best = math.inf
    for _ in range(3):
        began = time.process_time()
        _, fill, spreads = bench.whole_plan(known, 1_000_000, 64)
        best = min(best, time.process_time() - began)
    assert best <= 1.5  # of processor time; about 0.7 on a free core
    assert fill >= 0.995 and max(spreads) <= 1.05


@pytest.mark.slow
def test_memory_is_flat_from_one_million_to_a_hundred() -> None:
    bench = bench_plan()
    small, large = bench.peak_apart(1_000_000, 4), bench.peak_apart(100_000_000, 4)
    assert small < 20e6
    assert large < small + 3e6  # tables of the root of the count
