"""Processes that a run starts for a stage are what torchrun's would be, and end with it however it ends."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from avlm.config.io import build, to_yaml
from avlm.config.run import RunConfig
from avlm.errors import WorldError
from avlm.training import mates, nursery
from avlm.training.chain import Run
from avlm.training.observe import StepMetrics
from tests.training.worlds import lines, train_in, weights

LAST = {
    "name": "joint",
    "train": {"vision_connector": {"lr": 1e-3}, "language": {"lr": 1e-3}},
    "steps": 4,
    "batch_samples": 5,
    "row_tokens": 96,
}


@pytest.fixture
def joint(small_run: Callable[..., RunConfig]) -> Callable[..., RunConfig]:
    """One stage, which two processes train."""

    def make(name: str, **update: Any) -> RunConfig:
        config = small_run(name).model_dump(mode="json")
        config |= {"stages": [LAST], "device": "cpu", "threads": 1, "parallel": {"processes": 2}, **update}
        return build(RunConfig, config)

    return make


def train(config: RunConfig, on_step: Callable[[StepMetrics], None] | None = None) -> None:
    Run(config, console=Console(file=io.StringIO()), on_step=on_step).train()


def assert_equal(one: Path, other: Path) -> None:
    ours, theirs = weights(one), weights(other)
    assert lines(one) == lines(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:  # it has ended
        return []


def others(first: int | None = None) -> list[int]:
    """Processes that the nursery of this one, or of another, has started and that are still there."""
    nurseries = [
        child
        for child in children(first or os.getpid())
        if nursery.__name__ in Path(f"/proc/{child}/cmdline").read_text().split("\0")
    ]
    return [pid for one in nurseries for pid in children(one)]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="children are found in /proc")
def test_they_learn_what_processes_of_torchrun_learn_also_after_one_was_killed(
    joint: Callable[..., RunConfig], tmp_path: Path
) -> None:
    found = train_in(2, joint("whole"))
    assert [kind for kind, _ in found] == ["done", "done"], found

    def kill(metrics: StepMetrics) -> None:
        if metrics.stage_step == 2:
            os.kill(others()[0], signal.SIGKILL)

    with pytest.raises(WorldError, match="process 0 of 2 waited for another one that has ended"):
        train(joint("killed"), kill)
    assert not others()
    train(joint("killed"))
    assert not others()
    assert_equal(tmp_path / "killed", tmp_path / "whole")


def test_what_ends_one_is_told_by_the_first(joint: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mates, "start", lambda *_, **__: subprocess.Popen(["false"]))
    with pytest.raises(WorldError, match=r"process 1 of 2, which this run started .* ended with status 1 before it"):
        train(joint("none"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="children are found in /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_whatever_ends_the_first_ends_the_others(
    joint: Callable[..., RunConfig], tmp_path: Path, number: signal.Signals
) -> None:
    train(joint("whole"))
    config = joint("ended")
    path = tmp_path / "ended.yaml"
    path.write_text(to_yaml(config))
    command = [sys.executable, "-m", "avlm", "train", str(path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    journal = tmp_path / "ended" / "metrics.jsonl"
    while process.poll() is None and not (journal.is_file() and journal.read_text()):
        time.sleep(0.01)
    mine = others(process.pid)
    assert mine
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == (0 if number == signal.SIGTERM else -signal.SIGKILL), told
    until = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in mine) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in mine)
    train(config)
    assert_equal(tmp_path / "ended", tmp_path / "whole")


@pytest.mark.skipif(not Path("/proc/net/tcp").is_file(), reason="sockets are found in /proc")
def test_no_network_hears_of_them() -> None:
    store = mates._store(2)
    listening = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()
    ]
    ours = [words[1] for words in listening if words[1].endswith(f":{store.port:04X}") and words[3] == "0A"]
    assert ours == [f"0100007F:{store.port:04X}"]
