"""Any process of a spread model killed at any moment: every published checkpoint is whole, and the end is the same."""

from __future__ import annotations

import itertools
import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file

from avlm.config.io import build
from avlm.config.run import RunConfig
from avlm.training import checkpoint
from avlm.training.shares import Shares
from tests.training.worlds import lines, train_in, weights

STAGE = {
    "name": "joint",
    "train": {"vision_connector": {"lr": 1e-3}, "language": {"lr": 1e-3}},
    "steps": 4,
    "batch_samples": 5,
    "row_tokens": 96,
}


@pytest.fixture
def spread(small_run: Callable[..., RunConfig]) -> Callable[[str], RunConfig]:
    """One stage with a checkpoint each step, of which each process writes its share."""

    def make(name: str) -> RunConfig:
        config = small_run(name).model_dump(mode="json")
        config |= {"stages": [STAGE], "device": "cpu", "threads": 1, "samples": {"prompts": 0}}
        config |= {"parallel": {"mode": "fsdp"}, "save": {"every_s": 3600.0, "every_steps": 1}}
        return build(RunConfig, config)

    return make


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def this_is(rank: int) -> bool:
    return int(os.environ.get("RANK", 0)) == rank


def in_the_middle_of_a_file(rank: int, patch: pytest.MonkeyPatch) -> None:
    def half(tensors: Any, path: Path, **more: Any) -> None:
        if this_is(rank) and "step-00000003" in str(path):
            data = save(tensors, **more)
            path.write_bytes(data[: len(data) // 2])
            die()
        save_file(tensors, path, **more)

    patch.setattr(checkpoint, "save_file", half)


def with_its_files_there_and_nobody_told(rank: int, patch: pytest.MonkeyPatch) -> None:
    tell, collect = Shares.tell, Shares.collect

    def told(self: Shares, hashes: Any) -> None:
        if this_is(rank):
            die()
        tell(self, hashes)

    def collected(self: Shares, wanted: Any) -> Any:
        if this_is(rank):
            die()
        return collect(self, wanted)

    patch.setattr(Shares, "tell", told)
    patch.setattr(Shares, "collect", collected)


def before_it_is_published(rank: int, patch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def renamed(self: Path, target: Path) -> Path:
        if this_is(rank) and Path(target).name == "step-00000003":
            die()
        return rename(self, target)

    patch.setattr(Path, "rename", renamed)


def when_it_is_published(rank: int, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(checkpoint, "_clear", lambda *_: die() if this_is(rank) else None)


def check_published(out: Path) -> list[int]:
    """Steps of the checkpoints that can be seen; each is looked at."""
    return [checkpoint.examine(path).position.step for path in sorted((out / "checkpoints").glob("step-*"))]


def go_on(config: RunConfig, whole: Path) -> str:
    """Run to the end, and compare with a run that was let alone; returns what was told."""
    out = Path(config.out)
    found = train_in(2, config)
    assert [kind for kind, _ in found] == ["done"] * 2, found
    assert lines(out) == lines(whole)
    ours, theirs = weights(out), weights(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert not (out / "checkpoints").exists()
    return str(found[0][1])


@pytest.mark.parametrize(
    ("rank", "where", "newest"),
    [
        pytest.param(1, in_the_middle_of_a_file, 2),
        pytest.param(0, before_it_is_published, 2, marks=pytest.mark.slow),
        pytest.param(0, in_the_middle_of_a_file, 2, marks=pytest.mark.slow),
        pytest.param(0, with_its_files_there_and_nobody_told, 0, marks=pytest.mark.slow),
        pytest.param(1, with_its_files_there_and_nobody_told, 0, marks=pytest.mark.slow),
        pytest.param(0, when_it_is_published, 1, marks=pytest.mark.slow),
    ],
)
def test_one_that_is_killed_leaves_the_checkpoint_before_or_a_whole_one(
    spread: Callable[[str], RunConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rank: int,
    where: Callable[[int, pytest.MonkeyPatch], None],
    newest: int,
) -> None:
    monkeypatch.setattr("avlm.training.world.LAST_WORDS_S", 0.2)
    monkeypatch.setattr("avlm.training.shares.GIVE_UP_S", 0.2)
    assert [kind for kind, _ in train_in(2, spread("whole"))] == ["done"] * 2
    config = spread("cut")
    with monkeypatch.context() as patch:
        where(rank, patch)
        found = train_in(2, config)
    assert found[rank] == ("ended", "")
    assert found[1 - rank][0] in ("WorldError", "ended")
    steps = check_published(tmp_path / "cut")
    assert (max(steps) if steps else 0) == newest
    told = go_on(config, tmp_path / "whole")
    assert (f"resumed at step {newest}/4" in told) == (newest > 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_ten_kills_of_any_process_at_any_time_change_nothing(
    spread: Callable[[str], RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr("avlm.training.world.LAST_WORDS_S", 0.2)
    monkeypatch.setattr("avlm.training.shares.GIVE_UP_S", 0.2)
    rng = random.Random(seed)
    assert [kind for kind, _ in train_in(2, spread("whole"))] == ["done"] * 2
    killed = 0
    for number in itertools.count():
        config = spread(f"cut-{number}")
        while killed < 10:
            rank = rng.randint(0, 1)
            found = train_in(2, config, on_step=kills(rank, rng.uniform(0.05, 0.6)))
            check_published(tmp_path / f"cut-{number}")
            if [kind for kind, _ in found] == ["done"] * 2:
                break
            assert found[rank] == ("ended", "")
            killed += 1
        go_on(config, tmp_path / "whole")
        if killed == 10:
            return


def kills(rank: int, after_s: float) -> Callable[[Any], None]:
    """Kill a process so long after its first step; a step and its checkpoint take about 0.1 s."""
    killers: list[threading.Timer] = []

    def on_step(metrics: Any) -> None:
        if this_is(rank) and not killers:
            killers.append(threading.Timer(after_s, die))
            killers[0].daemon = True
            killers[0].start()

    return on_step
