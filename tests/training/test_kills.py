"""Ended at random moments in every way there is, a run ends with the bits of one that was let alone."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lives import Life, Lives
from test_resume import assert_equal, facts

from avlm.config.io import to_yaml
from avlm.config.run import RunConfig
from avlm.training import checkpoint
from avlm.training.observe import read_lines

SAVED = "stopped; all that was done is saved, and the same command goes on from there\n"
STEPS = [f"stages.{name}.steps={steps}" for name, steps in (("language", 7), ("vision", 7), ("align", 5), ("joint", 8))]


@pytest.fixture
def lives(small_run: Callable[..., RunConfig], tmp_path: Path) -> Iterator[Lives]:
    """Four stages and 27 steps, a checkpoint each step; the data has a row that is none and a picture that is none."""
    settings = small_run(overrides=[*STEPS, "samples.times=0"])
    data = tmp_path / "rows.jsonl"
    broken = {"id": "b", "messages": [{"role": "user", "content": [{"type": "image", "path": "rows.jsonl"}]}]}
    broken["messages"].append({"role": "assistant", "content": "no"})
    data.write_text(data.read_text() + "{broken\n" + json.dumps(broken) + "\n")
    path = tmp_path / "small.yaml"
    path.write_text(to_yaml(settings))
    with Lives(path, tmp_path) as lives:
        yield lives


def published(out: Path) -> list[Path]:
    """All checkpoints of a run that can be seen; each is looked at."""
    found = sorted((out / "checkpoints").glob("step-*"))
    for path in found:
        checkpoint.examine(path)
    return found


def end_again_and_again(lives: Lives, tmp_path: Path, times: int, seed: int, number: signal.Signals) -> int:
    """End runs so many times at random moments, and let them go on; compare each that got to its end.

    Returns:
        How often a checkpoint was being written when a run ended.
    """
    rng = random.Random(seed)
    whole = lives.live(tmp_path / "whole")
    assert whole.status == 0, whole.told
    expected = facts(tmp_path / "whole")
    ended, halves = 0, 0
    for name in itertools.count():
        out = tmp_path / f"cut-{name}"
        while True:
            end: dict[str, Any] = {}
            if ended < times:
                by_touch = {"at": rng.randint(1, whole.touched() // 4)}
                end = {**rng.choice([by_touch, {"after_s": rng.uniform(0, whole.seconds / 2)}]), "number": int(number)}
            life = lives.live(out, **end)
            assert "Traceback" not in life.told, life.told
            published(out)
            halves += any((out / "checkpoints").glob(".step-*"))
            if is_end(life, number, out):
                ended += 1
                continue
            assert life.status == 0, life.told
            break
        assert_equal(facts(out), expected)
        assert {path.name for path in out.rglob(".*")} - {".peak.json"} == {".lock"}, "what was left behind goes away"
        shutil.rmtree(out)
        if ended == times:
            return halves
    raise AssertionError


def is_end(life: Life, number: signal.Signals, out: Path) -> bool:
    """Whether a life ended by the signal, as it should."""
    if number == signal.SIGKILL:
        return life.status == -number
    if life.status == -number:  # before it could choose: nothing had begun
        return "resumed" not in life.told
    assert life.status == 0, life.told
    if SAVED not in life.told:
        return False
    found = published(out)
    if found:  # every step is in it
        assert checkpoint.examine(found[-1]).position.step == len(read_lines(out / "metrics.jsonl"))
    return True


def test_three_kills_at_random_moments_change_nothing(lives: Lives, tmp_path: Path) -> None:
    end_again_and_again(lives, tmp_path, 3, seed=5, number=signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_ten_of_forty_kills_change_nothing(lives: Lives, tmp_path: Path, seed: int) -> None:
    halves = end_again_and_again(lives, tmp_path, 10, seed=seed, number=signal.SIGKILL)
    print(f"{halves} of 10 in the middle of a checkpoint")
    assert halves


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_ten_wishes_to_stop_change_nothing(lives: Lives, tmp_path: Path, number: signal.Signals) -> None:
    end_again_and_again(lives, tmp_path, 10, seed=11, number=number)


def flip_a_byte(checkpoint_folder: Path, rng: random.Random) -> None:
    path = rng.choice(sorted(checkpoint_folder.iterdir()))
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


@pytest.mark.slow
def test_a_flipped_byte_after_each_of_ten_kills_changes_nothing(lives: Lives, tmp_path: Path) -> None:
    """Anywhere in the newest checkpoint; it is named when the run goes on."""
    rng = random.Random(21)
    whole = lives.live(tmp_path / "whole")
    assert whole.status == 0, whole.told
    out, flipped = tmp_path / "cut", 0
    while flipped < 10:
        life = lives.live(out, at=rng.randint(whole.touched() // 40, whole.touched() // 8), number=int(signal.SIGKILL))
        if life.status == 0:
            assert_equal(facts(out), facts(tmp_path / "whole"))
            shutil.rmtree(out)
            continue
        assert life.status == -signal.SIGKILL, life.told
        found = sorted((out / "checkpoints").glob("step-*"))
        if found and whole_one(found[-1]):
            flip_a_byte(found[-1], rng)
            assert not whole_one(found[-1])
            flipped += 1
    last = lives.live(out)
    assert last.status == 0 and f"checkpoint {found[-1].name} " in last.told and "was passed over" in last.told
    assert_equal(facts(out), facts(tmp_path / "whole"))


def whole_one(path: Path) -> bool:
    try:
        checkpoint.examine(path)
    except checkpoint.Damaged:
        return False
    return True


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_while_changes_nothing(lives: Lives, tmp_path: Path) -> None:
    rng = random.Random(31)
    alone = "data.workers=0"  # what is handed over between processes are files too
    whole = lives.live(tmp_path / "whole", alone)
    assert whole.status == 0, whole.told
    told = 0
    for name in range(6):
        out, first = tmp_path / f"full-{name}", rng.randint(whole.touched() // 10, whole.touched())
        life = lives.live(out, alone, full=[first, first + rng.randint(20, whole.touched() // 3)])
        told += life.told.count("could not be written (File too large)")
        published(out)
        assert "Traceback" not in life.told, life.told
        if life.status != 0:  # the disk was full where a stage's result was to be written: an error, and one message
            assert (life.status in (1, 2) and "OSError" in life.told) or "cannot be written" in life.told, life.told
            assert lives.live(out, alone).status == 0
        assert_equal(facts(out), facts(tmp_path / "whole"))
    assert told > 6


FULL_DISK = """
mount -t tmpfs -o size=24m tmpfs "$DISK" || exit 42
head -c 25m /dev/zero > "$DISK/filler"
truncate -s -300k "$DISK/filler"
"$@" out="$DISK/run"; echo "status $?"
rm "$DISK/filler"
"$@" out="$DISK/run" || exit 43
cp -r "$DISK/run" "$TO"
"""


@pytest.mark.slow
def test_a_file_system_that_is_really_full(lives: Lives, tmp_path: Path) -> None:
    """One of 24 MB with 300 KB free, in a name space of our own."""
    whole = lives.live(tmp_path / "whole")
    assert whole.status == 0, whole.told
    disk, to = tmp_path / "disk", tmp_path / "copied"
    disk.mkdir()
    command = ["unshare", "-Urm", "sh", "-c", FULL_DISK, "sh", sys.executable, "-m", "avlm", "train", str(lives.config)]
    environment = {**os.environ, "DISK": str(disk), "TO": str(to)}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    except FileNotFoundError:
        pytest.skip("no unshare")
    if done.returncode == 42 or "unshare" in done.stderr:
        pytest.skip("no name space of our own here")
    assert done.returncode == 0, done.stderr
    assert "could not be written (No space left on device)" in done.stderr
    assert "Traceback" not in done.stderr
    assert_equal(facts(to), facts(tmp_path / "whole"))
