"""A run that is killed anywhere, as often as one likes, ends with the bits of one that was not."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from avlm.config.io import to_yaml
from avlm.config.run import RunConfig
from avlm.training import checkpoint
from avlm.training.chain import Run
from avlm.training.observe import MEASURED, read_lines
from avlm.training.stopping import Stopped

CHILD = """
import os, signal, sys

out, left = sys.argv[1], int(sys.argv[2])
done = 0

def killed_before(event, arguments):
    # Every way in which Python touches the run's directory: open, mkdir, rename, link, remove, list.
    global done
    if event == "open" or event.startswith(("os.", "shutil.")):
        inside = any(isinstance(a, (str, os.PathLike)) and out in os.fspath(a) for a in arguments)
        if inside or event in ("os.remove", "os.rmdir"):
            done += 1
            if done == left:
                os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(killed_before)
sys.argv = ["avlm", *sys.argv[3:]]
from avlm.cli import main
try:
    main()
finally:
    print("touched", done, file=sys.stderr)
"""


def child(config: Path, out: Path, die_at: int = 0) -> subprocess.CompletedProcess[str]:
    """`avlm train CONFIG out=OUT` in a process that kills itself before it touches the directory for the n-th time."""
    command = [sys.executable, "-c", CHILD, str(out), str(die_at), "train", str(config), f"out={out}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def touched(done: subprocess.CompletedProcess[str]) -> int:
    return int(done.stderr.rsplit("touched", 1)[1])


def facts(out: Path) -> dict[str, Any]:
    """All that two runs must have in common: every weight, every line but its times."""
    weights = {
        str(path.relative_to(out)): path.read_bytes()
        for folder in ("parts", "stages", "model", "adapters")
        for path in sorted((out / folder).rglob("*.safetensors"))
    }
    lines = {
        name: [{k: v for k, v in json.loads(line).items() if k not in MEASURED} for line in text.splitlines()]
        for name in ("metrics.jsonl", "samples.jsonl", "quarantine.jsonl")
        for text in [(out / name).read_text()]
    }
    return {**weights, **lines}


def assert_equal(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name] == b[name], f"{name} differs"


@pytest.fixture
def config(small_run: Callable[..., RunConfig], tmp_path: Path) -> Path:
    """The small run, written down; its data has a row that is none and a picture that is none."""
    settings = small_run()
    data = tmp_path / "rows.jsonl"
    broken = {"id": "b", "messages": [{"role": "user", "content": [{"type": "image", "path": "rows.jsonl"}]}]}
    broken["messages"].append({"role": "assistant", "content": "no"})
    data.write_text(data.read_text() + "{broken\n" + json.dumps(broken) + "\n")
    path = tmp_path / "small.yaml"
    path.write_text(to_yaml(settings))
    return path


def kill_and_go_on(config: Path, tmp_path: Path, kills: int, seed: int, span: tuple[float, float]) -> int:
    """Kill a run up to so many times, let it finish, compare it with one that was let alone.

    Args:
        span: Shares of the whole run's touches between which each life ends.

    Returns:
        How often it was really killed.
    """
    reference = tmp_path / "reference"
    whole = child(config, reference)
    assert whole.returncode == 0, whole.stderr
    rng = random.Random(seed)
    out = tmp_path / "killed"
    killed = 0
    for attempt in range(kills + 1):
        die_at = 0 if attempt == kills else max(1, round(rng.uniform(*span) * touched(whole)))
        done = child(config, out, die_at)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        killed += 1
    assert done.returncode == 0
    assert_equal(facts(out), facts(reference))
    left = {path.name for path in out.rglob(".*")} - {".lock", ".peak.json"}
    assert not left, "what a kill left behind goes away"
    return killed


@pytest.mark.slow
def test_three_kills_change_nothing(config: Path, tmp_path: Path) -> None:
    assert kill_and_go_on(config, tmp_path, kills=3, seed=0, span=(0.15, 0.45)) == 3
    metrics = read_lines(tmp_path / "killed" / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(1, 14))
    assert [row["stage_step"] for row in metrics] == [1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3, 4]
    answers = [(a["step"], a["stage"], a["when"], a["id"]) for a in read_lines(tmp_path / "killed" / "samples.jsonl")]
    assert len(answers) == len(set(answers)) > 0
    bad = [row["reason"] for row in read_lines(tmp_path / "killed" / "quarantine.jsonl")]
    assert len(bad) == len(set(bad)) == 2


@pytest.mark.slow
def test_a_kill_before_each_of_the_first_touches_changes_nothing(config: Path, tmp_path: Path) -> None:
    reference = tmp_path / "reference"
    whole = child(config, reference)
    for die_at in range(1, 13):
        out = tmp_path / f"killed-{die_at}"
        assert child(config, out, die_at).returncode == -signal.SIGKILL
        done = child(config, out)
        assert done.returncode == 0, done.stderr
        assert_equal(facts(out), facts(reference))
    assert whole.returncode == 0


# ---------------------------------------------------------------- without a process of its own, for what is quick


class Dead(BaseException):
    """Stands for a kill: nothing of the run's own gets to clean up but what Python unwinds."""


def quiet() -> Console:
    return Console(file=io.StringIO())


@pytest.mark.parametrize(
    "every",
    [pytest.param("1", id="a checkpoint each step"), pytest.param("null", id="no checkpoint", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("at", [2, *(pytest.param(at, marks=pytest.mark.slow) for at in (8, 12))])
def test_stopped_in_any_stage(small_run: Callable[..., RunConfig], tmp_path: Path, at: int, every: str) -> None:
    def die(metrics: Any) -> None:
        if metrics.step == at:
            raise Dead

    save = [f"save.every_steps={every}", "save.every_s=1000"]
    Run(small_run("whole", save), console=quiet()).train()
    with pytest.raises(Dead):
        Run(small_run("cut", save), console=quiet(), on_step=die).train()
    Run(small_run("cut", save), console=quiet()).train()
    assert_equal(facts(tmp_path / "cut"), facts(tmp_path / "whole"))


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_costs_a_step_and_nothing_else(
    small_run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    def die(metrics: Any) -> None:
        if metrics.step == 12:
            raise ValueError  # an error waits for what is being written

    Run(small_run("whole"), console=quiet()).train()
    with pytest.raises(ValueError):  # noqa: PT011, it is the one above
        Run(small_run("cut"), console=quiet(), on_step=die).train()
    newest = max((tmp_path / "cut" / "checkpoints").glob("step-*"))
    data = bytearray((newest / "weights.safetensors").read_bytes())
    data[-1] ^= 0xFF
    (newest / "weights.safetensors").write_bytes(data)
    said = Console(record=True, file=io.StringIO(), width=200)
    Run(small_run("cut"), console=said).train()
    text = said.export_text()
    assert f"checkpoint {newest.name} is damaged (weights.safetensors changed since it was written)" in text
    assert "joint: resumed at step 2/4" in text
    assert_equal(facts(tmp_path / "cut"), facts(tmp_path / "whole"))


@pytest.mark.parametrize("whole", [True, False], ids=["all-stages", "one-of-them"])
def test_checkpoints_of_a_stage_that_is_done_do_not_stay(
    whole: bool, small_run: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed when what the stage made is there, and its checkpoints are not gone yet."""
    checkpoints, replace = tmp_path / "run" / "checkpoints", Path.replace
    last = "joint" if whole else "language"

    def die(self: Path, target: Path) -> Path:
        if self == checkpoints and (tmp_path / "run" / ("stages/joint" if whole else "parts/language")).is_dir():
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            Run(small_run("run"), console=quiet()).train(last)
    assert any(checkpoints.glob("step-*")) and not Run(small_run("run"), console=quiet())._under_way()
    (checkpoints / ".step-half").mkdir()
    Run(small_run("run"), console=quiet()).train(last)
    assert not checkpoints.exists()


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [*(pytest.param(number, marks=pytest.mark.slow) for number in SIGNALS[:-1]), SIGNALS[-1]]
)
def test_a_wish_to_stop_is_granted_after_the_step_with_everything_saved(
    small_run: Callable[..., RunConfig], tmp_path: Path, number: signal.Signals
) -> None:
    before = [signal.getsignal(s) for s in SIGNALS]

    def ask(metrics: Any) -> None:
        if metrics.step == 10:
            os.kill(os.getpid(), number)

    save = ["save.every_steps=null", "save.every_s=1000"]
    Run(small_run("whole", save), console=quiet()).train()
    with pytest.raises(Stopped) as stopped:
        Run(small_run("cut", save), console=quiet(), on_step=ask).train()
    assert stopped.value.number == number and stopped.value.saved
    done = len(read_lines(tmp_path / "cut" / "metrics.jsonl"))
    found, passed = checkpoint.newest(tmp_path / "cut" / "checkpoints", "joint")
    assert found is not None and not passed
    assert found.position.step == done == 11  # the step under way was finished, and none is lost
    Run(small_run("cut", save), console=quiet()).train()
    assert_equal(facts(tmp_path / "cut"), facts(tmp_path / "whole"))
    assert [signal.getsignal(s) for s in SIGNALS] == before


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), pytest.param(signal.SIGUSR1, 0, marks=pytest.mark.slow)]
)
def test_a_signal_on_the_command_line(config: Path, tmp_path: Path, number: signal.Signals, status: int) -> None:
    """Also where it is sent to all processes of the run, as schedulers do."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "avlm", "train", str(config), f"out={out}"]
    command += ["stages.language.steps=5000", "save.every_steps=null", "save.every_s=1000", "data.workers=2"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len(read_lines(out / "metrics.jsonl")) < 3:
        time.sleep(0.05)
    os.killpg(process.pid, number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == status, stderr
    assert "Traceback" not in stderr and stdout == ""
    assert stderr.endswith("stopped; all that was done is saved, and the same command goes on from there\n")
    found, _ = checkpoint.newest(out / "checkpoints", "language")
    assert found is not None and found.position.step == len(read_lines(out / "metrics.jsonl"))
    assert "crashed" not in (out / "quarantine.jsonl").read_text()


def test_a_stop_that_could_not_save_says_so(
    small_run: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(metrics: Any) -> None:
        if metrics.step == 1:
            monkeypatch.setattr(checkpoint, "save_file", full)
            os.kill(os.getpid(), signal.SIGTERM)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(Stopped) as stopped:
        Run(small_run(overrides=["save.every_steps=null"]), console=quiet(), on_step=ask).train()
    assert not stopped.value.saved and stopped.value.status() == 1
    assert "could not be saved" in stopped.value.told()


@pytest.mark.slow
def test_nothing_that_chance_did_between_two_steps_moves_a_bit(
    small_run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """So no state of a random generator belongs into a checkpoint. The run has dropout, and changes what it hears."""

    def scramble(metrics: Any) -> None:
        random.seed()
        np.random.seed()
        torch.seed()

    Run(small_run("whole"), console=quiet()).train()
    Run(small_run("moved"), console=quiet(), on_step=scramble).train()
    assert_equal(facts(tmp_path / "moved"), facts(tmp_path / "whole"))
