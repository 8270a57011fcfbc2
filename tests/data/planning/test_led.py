"""A plan that begins with some of a stage's rows is two plans, one behind the other."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avlm.config.data import DataConfig
from avlm.config.stage import First, Stage
from avlm.data.planning.led import StagePlan
from avlm.data.planning.plan import Measures
from avlm.data.planning.planned import plan_of
from avlm.data.readers.joined import JoinedSource, blended
from avlm.data.sources import open_source
from avlm.errors import ConfigError

SIZES = {"a": 900, "b": 100}
"""Rows of two sources; every third one is to come first."""
ALL = sum(SIZES.values())
LENGTHS = np.random.default_rng(0).permutation(ALL) + 10


@cache
def source(*weights: float) -> JoinedSource:
    folder, sources = Path(mkdtemp()), []
    for name, count in SIZES.items():
        rows = [
            {"id": f"{name}{i}", "task": "hard" if i % 3 == 0 else "easy", "messages": [
                {"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"}]}
            for i in range(count)
        ]  # fmt: skip
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources.append(open_source(str(path), DataConfig(train=str(path))))
    return blended(sources, list(weights) or [None, None])


def hard(row: int) -> bool:
    return (row if row < SIZES["a"] else row - SIZES["a"]) % 3 == 0


def plan(stage: Stage, order: str = "shuffled", weights: tuple[float, ...] = (), seed: int = 0) -> StagePlan:
    return plan_of(source(*weights), range(ALL), stage, DataConfig(order=order), seed, Measures(LENGTHS))  # type: ignore[arg-type]


def begun(steps: int, **how: Any) -> Stage:
    length = {} if "epochs" in how else {"steps": 60}
    return Stage(name="s", first=First(of=("hard", "no task"), steps=steps), **length, **how)


def without(stage: Stage) -> Stage:
    return stage.model_copy(update={"first": None})


HOW = st.sampled_from(
    [
        {"batch_samples": 8},
        {"batch_samples": 5},
        {"batch_rows": 1, "row_tokens": 2000},
        {"batch_rows": 4, "row_tokens": 1500},
    ]
)


@settings(deadline=None, max_examples=40)
@given(
    how=HOW, lasts=st.integers(1, 50), order=st.sampled_from(["shuffled", "as_is", "by_length"]), seed=st.integers(0, 9)
)
def test_first_some_rows_and_then_what_would_be_read_without(
    how: dict[str, int], lasts: int, order: str, seed: int
) -> None:
    stage = begun(lasts, **how)
    led, whole = plan(stage, order, seed=seed), plan(without(stage), order, seed=seed)
    read = [led.samples(k) for k in range(60)]
    assert all(hard(row) for step in read[:lasts] for row, _ in step)
    assert read[lasts:] == [whole.samples(k) for k in range(60 - lasts)]
    every = [member for step in read for member in step]
    assert len(set(every)) == len(every)
    for k in (0, lasts - 1, lasts, 59):
        step = led.step(k)
        assert step.step == k and sorted(m for row in step.rows for m in row) == sorted(read[k])
        squares = [sum(float(LENGTHS[row]) ** 2 for row, _ in rows) for rows in step.rows]
        assert step.costs[:, 0].tolist() == squares


@settings(deadline=None, max_examples=20)
@given(how=HOW, lasts=st.integers(1, 30), stopped=st.integers(0, 59))
def test_it_goes_on_where_it_stood(how: dict[str, int], lasts: int, stopped: int) -> None:
    stage = begun(lasts, **how)
    led = plan(stage)
    for k in range(stopped):
        led.step(k)
    state, again = led.state(stopped), plan(stage)
    assert again.resume(state) == stopped
    assert [again.samples(k) for k in range(stopped, 60)] == [led.samples(k) for k in range(stopped, 60)]
    for other in (begun(lasts + 1, **how), without(stage)):
        with pytest.raises(ConfigError, match=r"stages\.s\.first"):
            plan(other).resume(state)


def test_the_first_steps_are_blended_by_weight() -> None:
    led = plan(begun(40, batch_samples=10), weights=(1, 9))
    shares = [
        np.mean([row >= SIZES["a"] for k in steps for row, _ in led.samples(k)]) for steps in (range(40), range(40, 60))
    ]
    assert shares == pytest.approx([0.9, 0.9])


def test_a_curriculum_climbs_twice_each_time_to_the_longest() -> None:
    led = plan(begun(20, batch_samples=10), "curriculum")
    for steps, some in ((range(20), [row for row in range(ALL) if hard(row)]), (range(20, 60), list(range(ALL)))):
        means = [np.mean([LENGTHS[row] for row, _ in led.samples(k)]) for k in steps]
        longest = np.sort(LENGTHS[some])
        assert means[0] < longest[len(some) // 10] and means[-1] > longest[-len(some) // 10]
        assert np.corrcoef(means, np.arange(len(means)))[0, 1] > 0.98


def test_packed_rows_climb_to_the_longest_by_the_end_of_their_epochs() -> None:
    stage = begun(30, batch_rows=1, row_tokens=4000, epochs=1)
    led = plan(stage, "curriculum")
    means = [np.mean([LENGTHS[row] for row, _ in led.samples(k)]) for k in range(led.steps(1))]
    assert len(means) > 100 and means[30] < 100 and max(means[-5:]) > 950  # it may be a row or two longer than reckoned


def test_steps_of_like_length_stay_so() -> None:
    led = plan(begun(7, batch_samples=10), "by_length")
    for k in range(60):
        lengths = [LENGTHS[row] for row, _ in led.samples(k)]
        assert max(lengths) - min(lengths) < 60  # of 10 to 1,009; where runs straddle steps it is hundreds


def test_whether_a_row_comes_again() -> None:
    stage = begun(10, batch_samples=10)  # 334 rows are hard
    assert not plan(stage).reads_again(60)
    assert not plan(begun(33, batch_samples=10)).reads_again(60)
    assert plan(begun(34, batch_samples=10)).reads_again(60)
    assert plan(stage).reads_again(10 + 101) and not plan(stage).reads_again(10 + 100)


def test_epochs_are_as_long_as_without() -> None:
    stage = begun(10, batch_samples=10, epochs=2)
    assert plan(stage).steps(2) == plan(without(stage)).steps(2) == 200
