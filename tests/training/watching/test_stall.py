"""A step that does not come is told of, with what it waits for and where every thread stands."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from planting import one_stage, train

from avlm.config.run import RunConfig
from avlm.data.loader import StepData, StepLoader
from avlm.training.watching.stall import Stall

Small = Callable[..., RunConfig]


def waits_for_a_lock_that_never_opens(seconds: float) -> None:
    threading.Event().wait(seconds)


def make(tmp_path: Path, said: list[str], **settings: object) -> Stall:
    return Stall(0.1, settings.pop("then", "wait"), said.append, lambda: "it waits", tmp_path / "s.txt", **settings)  # type: ignore[arg-type]


def test_a_stall_is_told_once_with_every_stack_and_again_only_after_a_step(tmp_path: Path) -> None:
    said: list[str] = []
    stall = make(tmp_path, said)
    with stall.watching():
        waits_for_a_lock_that_never_opens(0.5)
        assert stall.told == 1
        stall.alive()
        waits_for_a_lock_that_never_opens(0.5)
    assert stall.told == 2
    assert "(watch.stall_s=0.1): it waits; it goes on waiting. Where every thread stands:" in said[0]
    for text in (said[1], (tmp_path / "s.txt").read_text()):
        assert "waits_for_a_lock_that_never_opens" in text and "_watch" in text


def test_steps_in_time_say_nothing_and_the_thread_ends_with_the_stage(tmp_path: Path) -> None:
    said: list[str] = []
    stall = Stall(5.0, "wait", said.append, str, tmp_path / "s.txt")
    began = time.monotonic()
    with stall.watching():
        for _ in range(10):
            stall.alive()
            time.sleep(0.01)
    assert time.monotonic() - began < 2
    assert not said and not any(thread.name == "stall watch" for thread in threading.enumerate())


def test_a_stall_may_end_the_process(tmp_path: Path) -> None:
    said: list[str] = []
    ended: list[int] = []
    with make(tmp_path, said, then="stop", end=ended.append).watching():
        waits_for_a_lock_that_never_opens(0.5)
    assert ended == [1]
    assert "the process ends here, and the same command goes on from its last checkpoint" in said[0]


def test_a_run_says_which_step_rank_and_rows_it_waits_for(
    small_run: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = StepLoader.steps

    def slow(loader: StepLoader, first: int, last: int) -> Iterator[StepData]:
        for data in steps(loader, first, last):
            if data.step == 1:
                time.sleep(1.5)
            yield data

    monkeypatch.setattr(StepLoader, "steps", slow)
    config = one_stage(small_run(), "watch.stall_s=0.7", "data.workers=0", "data.order=as_is")
    said = train(monkeypatch, config)
    waiting = "stage only, step 2, rank 0 of 1 waits for its data, rows.jsonl line 5, rows.jsonl line 6, "
    assert f"(watch.stall_s=0.7): {waiting}rows.jsonl line 7, rows.jsonl line 8; it goes on waiting" in said
    assert "in slow" in said and "in slow" in (tmp_path / "run" / "stalls.txt").read_text()


def test_a_run_says_which_samples_it_computes(small_run: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    from avlm.training.trainer import Trainer

    def prepare(trainer: Trainer) -> None:
        def linger(*args: object) -> None:
            if trainer.done == 1:
                time.sleep(1.5)

        trainer.model.get_submodule("model.language_model.model.norm").register_forward_hook(linger)

    config = one_stage(small_run(), "watch.stall_s=0.7", "data.workers=0", "data.order=as_is")
    said = train(monkeypatch, config, prepare)
    assert 'stage only, step 2, rank 0 of 1 is being computed, last the row of "4", "5", "6", "7"' in said
    assert "in linger" in said
