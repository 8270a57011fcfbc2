"""Parts that are built side by side are those that are built one after the other, whatever happens meanwhile."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_resume import assert_equal, facts

from avlm.config.io import override, to_yaml
from avlm.config.run import RunConfig
from avlm.data.selection import video_senses
from avlm.errors import AvlmError, ConfigError, DataError
from avlm.training import building, chain
from avlm.training.apart import apart as stages_apart
from avlm.training.chain import Run
from avlm.training.checkpoint import newest
from avlm.training.observe import Bar, StepMetrics, read_lines

Apart = Callable[..., RunConfig]
THREE = "side_by_side=3"


def train(config: RunConfig, only: str | None = None) -> str:
    """Train; what was said is returned."""
    console = Console(record=True, file=io.StringIO(), width=200)
    Run(config, console=console).train(only)
    return console.export_text()


def spoil(data: Path, pictures: int = 1) -> None:
    """Add a row that is none, and pictures that are none."""
    lines = ["{broken"]
    for i in range(pictures):
        content = [{"type": "image", "path": "rows.jsonl"}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "no"}]
        lines.append(json.dumps({"id": f"b{i}", "messages": messages}))
    data.write_text(data.read_text() + "\n".join(lines) + "\n")


@dataclass
class Standing:
    """Somebody who trains a stage, as far as it matters who goes first."""

    left: float | None
    ended: int | None = None
    gave_way: bool = False

    @property
    def process(self) -> Standing:
        return self

    def poll(self) -> int | None:
        return self.ended

    def left_s(self) -> float | None:
        return self.left

    def give_way(self) -> None:
        self.gave_way = True


@pytest.mark.parametrize(
    ("left", "settled", "giving"),
    [
        ((100.0, 80.0, 95.0), True, [False, True, False]),  # 95 of 100 is as long
        ((10.0, 20.0, 90.0), True, [True, True, False]),
        ((None, 20.0, 90.0), False, [False] * 3),  # not known yet
    ],
)
def test_what_takes_longest_goes_first(left: tuple[float | None, ...], settled: bool, giving: list[bool]) -> None:
    workers = [Standing(seconds) for seconds in left]
    assert building._longest_goes_first(workers) is settled  # type: ignore[arg-type]
    assert [worker.gave_way for worker in workers] == giving


def test_nobody_gives_way_where_one_has_ended_already() -> None:
    workers = [Standing(10.0), Standing(90.0), Standing(None, ended=0)]
    assert building._longest_goes_first(workers)  # type: ignore[arg-type]
    assert not any(worker.gave_way for worker in workers)


def test_three_on_one_core_are_those_of_one_after_the_other(
    apart: Apart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever gives way, which each is asked to here, does it with all of its processes and makes the same."""
    asked: list[int] = []
    sessions: list[str] = []

    def ask(workers: Any) -> bool:
        for worker in workers:
            with suppress(ProcessLookupError, FileNotFoundError):  # it has no session yet, or has ended
                worker.give_way()
                asked.append(os.getpriority(os.PRIO_PGRP, worker.process.pid))
                sessions.append(Path(f"/proc/{worker.process.pid}/autogroup").read_text())
        return len(asked) >= 3

    monkeypatch.setattr(building, "num_cores", lambda: 1)
    monkeypatch.setattr(building, "_longest_goes_first", ask)
    one, three = apart("one"), apart("three", [THREE])
    train(one)
    train(three)
    assert_equal(facts(tmp_path / "three"), facts(tmp_path / "one"))
    assert asked and set(asked) == {min(19, os.getpriority(os.PRIO_PROCESS, 0) + 5)}
    if os.access("/proc/self/autogroup", os.W_OK):
        assert any(told.endswith("nice 5\n") for told in sessions)


def test_parts_and_journals_are_those_of_one_after_the_other(apart: Apart, tmp_path: Path) -> None:
    one, three = apart("one"), apart("three", [THREE])
    spoil(tmp_path / "rows.jsonl")
    alone, together = train(one), train(three)
    expected = facts(tmp_path / "one")
    assert len(expected["quarantine.jsonl"]) == 2
    assert sum(name.startswith("parts/") for name in expected) == 3
    assert_equal(facts(tmp_path / "three"), expected)
    assert {path.name for path in (tmp_path / "three").iterdir()} == {
        path.name for path in (tmp_path / "one").iterdir()
    }
    assert "language, vision, audio" in together and "language, vision, audio" not in alone


@pytest.mark.slow
def test_two_at_a_time_and_only_what_was_asked_for(apart: Apart, tmp_path: Path) -> None:
    """Up to the second stage first; then the third alone, in this very process; then the rest."""
    train(apart("one"))
    assert "language, vision" in train(apart("two", ["side_by_side=2"]), "vision")
    assert {path.name for path in (tmp_path / "two" / "parts").iterdir()} == {"language", "vision"}
    assert not (tmp_path / "two" / "building").exists()
    train(apart("two", ["side_by_side=2"]))
    assert_equal(facts(tmp_path / "two"), facts(tmp_path / "one"))


@pytest.mark.slow
def test_a_part_that_needs_another_waits_for_it(apart: Apart, tmp_path: Path) -> None:
    """The vision encoder is built with the run's own language model, between two parts that need nothing."""
    answers = ["stages.vision.supervise=answers"]
    train(apart("one", answers))
    train(apart("three", [*answers, THREE]))
    assert_equal(facts(tmp_path / "three"), facts(tmp_path / "one"))


@pytest.mark.slow
def test_stages_with_data_of_their_own_share_one_vocabulary(apart: Apart, tmp_path: Path) -> None:
    apart()
    own = tmp_path / "own.jsonl"
    own.write_text((tmp_path / "rows.jsonl").read_text().replace("green, then blue", "violin and trumpet"))
    train(apart("one", [f"stages.audio.data={own}"]))
    train(apart("three", [f"stages.audio.data={own}", THREE]))
    assert_equal(facts(tmp_path / "three"), facts(tmp_path / "one"))


# ---------------------------------------------------------------- senses aligned side by side


@pytest.fixture
def aligned(apart: Apart) -> Apart:
    """Settings of a run that aligns eyes and ears in two stages, and then trains both connectors."""

    def make(name: str = "run", overrides: list[str] | None = None) -> RunConfig:
        config = apart(name)
        language, *_, joint = config.stages
        both = [
            joint.model_copy(
                update={"name": f"{sense}-alignment", "rows": sense, "train": {f"{sense}_connector": how}, "steps": 5}
            )
            for sense, how in zip(("vision", "audio"), joint.train.values(), strict=True)
        ]
        return override(config.model_copy(update={"stages": (language, *both, joint)}), overrides or [])

    return make


@pytest.mark.slow
def test_senses_aligned_side_by_side_come_to_the_bits_of_one_after_the_other(aligned: Apart, tmp_path: Path) -> None:
    spoiled = aligned("one")
    spoil(tmp_path / "rows.jsonl")
    alone, together = train(spoiled), train(aligned("two", ["side_by_side=2"]))
    expected = facts(tmp_path / "one")
    assert {f"stages/{stage.name}/model.safetensors" for stage in spoiled.stages[1:]} <= expected.keys()
    assert_equal(facts(tmp_path / "two"), expected)
    assert "vision-alignment, audio-alignment" in together and "vision-alignment, audio-alignment" not in alone
    assert not (tmp_path / "two" / "building").exists()


@pytest.mark.slow
@pytest.mark.parametrize("where", [pytest.param("vision-alignment", marks=pytest.mark.slow), "audio-alignment"])
def test_killed_while_aligned_senses_are_laid_together(
    aligned: Apart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """And gone on with by a run that would do them one after the other: what was done is taken over all the same."""

    class Dead(BaseException):
        pass

    def dying(take: Callable[..., Path]) -> Callable[..., Path]:
        def died(run: RunConfig, stage: Any, before: int) -> Path:
            if stage.name == where:
                raise Dead
            return take(run, stage, before)

        return died

    train(aligned("whole"))
    with monkeypatch.context() as patch:
        patch.setattr(building, "_take_journal", dying(building._take_journal))
        with pytest.raises(Dead):
            train(aligned("cut", ["side_by_side=2"]))
    train(aligned("cut"))
    assert_equal(facts(tmp_path / "cut"), facts(tmp_path / "whole"))
    assert not (tmp_path / "cut" / "building").exists()


@pytest.mark.parametrize(
    ("change", "groups"),
    [
        ([], [1, 2, 1]),
        (["stages.vision-alignment.train.language.lr=1e-3"], [1, 1, 1, 1]),
        (["stages.audio-alignment.rows=any"], [1, 1, 1, 1]),
        (["stages.audio-alignment.rows=vision", "stages.audio-alignment.train={vision: {lr: 1e-3}}"], [1, 1, 1, 1]),
    ],
)
def test_which_stages_have_nothing_to_do_with_each_other(aligned: Apart, change: list[str], groups: list[int]) -> None:
    config = aligned("run", change)
    assert [len(group) for group in stages_apart(config.stages, video_senses(True, "interleaved"))] == groups


# ---------------------------------------------------------------- killed and stopped


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:  # it has ended
        return []


def gone(pid: int) -> bool:
    """Whether a process has ended, be it a zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait(until: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="children are found in /proc")
@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGKILL, id="killed"),
        pytest.param(signal.SIGINT, id="stopped", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, id="stopped by a scheduler", marks=pytest.mark.slow),
    ],
)
def test_ended_while_parts_are_built_and_gone_on_with(apart: Apart, tmp_path: Path, number: signal.Signals) -> None:
    stages, out = ("language", "vision", "audio"), tmp_path / "cut"
    longer = [f"stages.{name}.steps=20" for name in stages]
    config = apart("cut", [*longer, THREE])
    (tmp_path / "cut.yaml").write_text(to_yaml(config))
    command = [sys.executable, "-m", "avlm", "train", str(tmp_path / "cut.yaml")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def done(name: str) -> int:
        path = out / "building" / name / "metrics.jsonl"
        return len(read_lines(path)) if path.exists() else 0

    wait(lambda: all(done(name) > 1 for name in stages))
    builders = [pid for child in children(process.pid) for pid in children(child)]
    below = [*builders, *(pid for builder in builders for pid in children(builder))]  # and those that prepare data
    assert len(below) > 1
    if number == signal.SIGTERM:  # which tells all processes
        for pid in [*builders, *children(process.pid)]:
            os.kill(pid, number)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    wait(lambda: all(gone(pid) for pid in below), seconds=30)
    assert not (out / "parts").exists()
    if number != signal.SIGKILL:
        assert process.returncode == (130 if number == signal.SIGINT else 0) and "Traceback" not in stderr
        assert stderr.endswith("stopped; all that was done is saved, and the same command goes on from there\n")
    left = {name: done(name) for name in stages}
    if number != signal.SIGKILL:  # each saved its last step
        for name in [name for name in stages if left[name] < 20]:
            found, _ = newest(out / "building" / name / "checkpoints", name)
            assert found is not None and found.position.step == left[name]
    # Where one after the other is asked for now, what is under way goes on as it began.
    train(apart("cut", longer if number == signal.SIGKILL else [*longer, THREE]))
    train(apart("whole", longer))
    assert max(left.values()) > 1
    assert_equal(facts(out), facts(tmp_path / "whole"))
    assert not (out / "building").exists()


@pytest.mark.slow
def test_killed_between_two_parts_that_are_taken_over(
    apart: Apart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dead(BaseException):
        pass

    replace = Path.replace

    def dying(self: Path, target: Path) -> Path:
        if Path(target).parts[-2:] == ("parts", where):
            raise Dead
        return replace(self, target)

    train(apart("whole"))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", dying)
        for where in ("language", "vision", "audio"):  # noqa: B007, `dying` reads it
            with pytest.raises(Dead):
                train(apart("cut", [THREE]))
            patch.setattr(chain, "build_side_by_side", lambda *_: None)  # all of them are built now
        where = ""
        patch.setattr(shutil, "rmtree", lambda path, **_: (_ for _ in ()).throw(Dead) if path.name == "audio" else 0)
        with pytest.raises(Dead):
            train(apart("cut", [THREE]))
    train(apart("cut", [THREE]))
    assert_equal(facts(tmp_path / "cut"), facts(tmp_path / "whole"))
    assert not (tmp_path / "cut" / "building").exists()


# ---------------------------------------------------------------- what goes wrong in a part


def failure(config: RunConfig) -> AvlmError:
    with pytest.raises(AvlmError) as error:
        train(config)
    return error.value


@pytest.mark.slow
def test_what_ends_a_part_ends_the_run_with_the_same_words(apart: Apart, tmp_path: Path) -> None:
    """The vision encoder fails while the language model before it is under way, and that is stopped."""
    apart()
    spoil(tmp_path / "rows.jsonl", pictures=12)
    long = ["stages.language.steps=100000", "stages.vision.steps=50", THREE]
    alone, together = failure(apart("one", ["stages.vision.steps=50"])), failure(apart("three", long))
    assert isinstance(alone, DataError) and "samples were bad, more than data.max_bad=0.05 allows" in str(alone)
    assert type(together) is type(alone) and str(together) == str(alone)
    assert vars(together) == vars(alone)
    assert not (tmp_path / "three" / "parts").exists()


@pytest.mark.slow
def test_a_wrong_setting_of_a_part_is_one_message_and_status_2(apart: Apart, tmp_path: Path) -> None:
    config = apart("three", ["stages.language.row_tokens=8", THREE])
    (tmp_path / "three.yaml").write_text(to_yaml(config))
    command = [sys.executable, "-m", "avlm", "train", str(tmp_path / "three.yaml"), "--stage", "vision"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    with pytest.raises(ConfigError) as error:
        train(apart("one", ["stages.language.row_tokens=8"]))
    assert done.returncode == 2 and done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == f"ConfigError: {error.value}"
    assert "Raise stages.language.row_tokens" in str(error.value)


def test_a_part_whose_process_is_ended_from_outside_is_named(apart: Apart, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(module: str, settings: str) -> Any:
        return subprocess.Popen(["sh", "-c", "kill -9 $$" if "vision" in settings else "exit 0"])

    monkeypatch.setattr(building, "start", start)
    with pytest.raises(OSError, match="process that built vision") as error:
        train(apart("three", [THREE]))
    assert str(error.value) == (
        "the process that built vision ended with status -9. Start the same command again: it goes on where this ended"
    )


# ---------------------------------------------------------------- the bar


def line(step: int, seconds: float) -> bytes:
    metrics = StepMetrics(step, "vision", step, 1.0, 1.0, 1.0, 4, 2, 1, 1, seconds, 0.0, 4.0)
    return json.dumps({name: getattr(metrics, name) for name in StepMetrics.__slots__}).encode() + b"\n"


def test_news_of_a_part_are_whole_lines_and_begin_again_when_it_went_back(
    apart: Apart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed part goes back to its checkpoint, and may be further than before when it is looked at next."""
    config = apart()
    bar = Bar("vision", 3, 0, Console(file=io.StringIO()))
    monkeypatch.setattr(building, "start", lambda *_: None)
    path = tmp_path / "run" / "building" / "vision" / "metrics.jsonl"
    path.parent.mkdir(parents=True)
    worker = building._Worker(config, config.stages[1], 1, bar)
    assert worker._news() == []
    path.write_bytes(line(1, 0.5) + line(2, 0.25)[:9])
    assert [metrics.step for metrics in worker._news()] == [1]
    with path.open("ab") as file:
        file.write(line(2, 0.25)[9:])
    assert [metrics.step for metrics in worker._news()] == [2]
    aside = path.with_suffix(".writing")
    aside.write_bytes(line(1, 0.123456) + line(2, 0.7) + line(3, 0.75))
    aside.replace(path)
    assert [metrics.step for metrics in worker._news()][-1] == 3
