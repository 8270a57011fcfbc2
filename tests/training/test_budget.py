"""How many bad samples a run stands: a share of all, and so many one after the other."""

from __future__ import annotations

from typing import Any

import pytest

from avlm.config.data import DataConfig
from avlm.data.loader import Bad, StepData
from avlm.errors import DataError
from avlm.training.budget import BadBudget


def step(number: int, marks: str) -> StepData:
    """A step by its samples in order: ``x`` is bad, ``.`` is good."""
    places = [at for at, mark in enumerate(marks) if mark == "x"]
    bad = [Bad(f"{number}.{at}", f"rows.jsonl line {at}", f"broken {number}.{at}", "a.png") for at in places]
    return StepData(number, [], bad, len(marks) - len(bad), places)


def stopped_at(marks: str, batch: int, **data: Any) -> int | None:
    """The step whose samples stop the run."""
    budget = BadBudget(DataConfig(**data))
    for number in range(len(marks) // batch):
        budget.count(step(number, marks[number * batch : (number + 1) * batch]))
        try:
            budget.check()
        except DataError:
            return number
    return None


@pytest.mark.parametrize("batch", [1, 2, 3, 6])
@pytest.mark.parametrize(
    ("marks", "longest"),
    [
        ("..xx.xxx....", 3),
        ("xxxx........", 4),
        ("........xxxx", 4),
        (".x.x.x.x.x.x", 1),
        ("............", 0),
        ("x" * 12, 12),
    ],
)
def test_a_run_is_as_long_as_it_is_however_steps_cut_it(marks: str, longest: int, batch: int) -> None:
    assert stopped_at(marks, batch, max_bad=1, max_bad_run=longest + 1) is None
    if longest:
        end = marks.index("x" * longest) + longest  # the sample with which it is as long as that
        assert stopped_at(marks, batch, max_bad=1, max_bad_run=longest) == (end - 1) // batch


def test_a_share_of_all_with_a_few_for_nothing() -> None:
    assert stopped_at("x" * 10, 1, max_bad=0) is None
    assert stopped_at("x" * 11, 1, max_bad=0) == 10
    assert stopped_at(("x" + "." * 9) * 30, 10, max_bad=0.1) is None
    assert stopped_at(("xx" + "." * 8) * 30, 10, max_bad=0.1) == 5


def test_the_report_names_the_last_ones_and_what_to_do() -> None:
    budget = BadBudget(DataConfig(max_bad=1, max_bad_run=5))
    budget.count(step(0, "..xx"))
    budget.check()
    budget.count(step(1, "xxx."))
    with pytest.raises(DataError) as error:
        budget.check()
    assert str(error.value) == (
        "rows.jsonl line 2: 5 samples one after the other were bad, and data.max_bad_run=5; the last one: broken 1.2; "
        "before it rows.jsonl line 1: broken 1.1; before it rows.jsonl line 0: broken 1.0. All are listed in "
        "quarantine.jsonl; correct them, or raise data.max_bad_run"
    )
    assert (error.value.where, error.value.sample_id) == ("rows.jsonl line 2", "1.2")


def test_a_run_that_goes_on_counts_on() -> None:
    before = BadBudget(DataConfig(max_bad=1, max_bad_run=4))
    before.count(step(0, ".xxx"))
    after = BadBudget(DataConfig(max_bad=1, max_bad_run=4))
    after.bad, after.run = before.bad, before.run
    after.count(step(1, "x..."))
    assert after.bad == 4
    with pytest.raises(DataError, match="4 samples one after the other"):
        after.check()


def test_what_is_left_out_of_every_reading_counts_as_if_it_had_been_read() -> None:
    """100 of 1,000 are left out, and 1 in 90 of the others is bad: 11 of 100 together."""
    left_out = [Bad(str(i), f"rows.jsonl line {i}", "broken") for i in range(100)]

    def read(max_bad: float) -> None:
        budget = BadBudget(DataConfig(max_bad=max_bad))
        budget.begin(left_out, 900)
        for number in range(20):
            budget.count(step(number, "x" + "." * 89))
            budget.check()

    with pytest.raises(DataError, match=r"11 of 100 samples were bad, more than data\.max_bad=0\.105 allows"):
        read(0.105)
    read(0.112)
    with pytest.raises(DataError, match=r"100 of 1000 samples were bad.*the last one: broken; before it rows"):
        BadBudget(DataConfig(max_bad=0.09)).begin(left_out, 900)
