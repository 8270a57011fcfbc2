"""Training waits for one copy; everything else happens beside it, and trouble is told."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from avlm.config.save import SaveConfig
from avlm.training import checkpoint
from avlm.training.checkpoint import Position, newest
from avlm.training.observe import Journal
from avlm.training.saver import Saver
from avlm.training.snapshot import Tensors
from avlm.training.stopping import Stopped


class Gate:
    """Stands in for the writing of a file, which it holds up until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self.open = threading.Event(), threading.Event()
        monkeypatch.setattr(checkpoint, "save_file", self)

    def __call__(self, tensors: Any, path: Path) -> None:
        self.entered.set()
        assert self.open.wait(20)
        save_file(tensors, path)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., tuple[Saver, io.StringIO]]:
    def make(**how: Any) -> tuple[Saver, io.StringIO]:
        said = io.StringIO()
        (tmp_path / "run").mkdir(exist_ok=True)
        journal, settings = Journal(tmp_path / "run"), SaveConfig(**how)
        return Saver(tmp_path / "run" / "checkpoints", settings, journal, Console(file=said, width=500)), said

    return make


Make = Callable[..., tuple[Saver, io.StringIO]]


def tensors(value: float) -> Tensors:
    return Tensors({"w": torch.full((3,), value)}, {"w|step": torch.tensor(value)})


def at(step: int) -> Position:
    return Position("s", step, step, 0)


def stands_at(saver: Saver) -> int:
    found, _ = newest(saver.folder, "s")
    return 0 if found is None else found.position.step


def test_training_goes_on_while_the_file_is_written_and_what_it_changes_is_not_in_it(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, (saver, _) = Gate(monkeypatch), make()
    weights = tensors(1.0)
    saver.save(weights, at(1))
    assert gate.entered.wait(20)
    weights.weights["w"].fill_(2.0)  # the next step
    assert stands_at(saver) == 0
    gate.open.set()
    assert saver.finish() and stands_at(saver) == 1
    held = load_file(saver.folder / "step-00000001" / "weights.safetensors")
    assert held["w"].tolist() == [1.0, 1.0, 1.0]


def test_the_clock_puts_off_and_says_so_once_and_counted_steps_wait(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, (saver, said) = Gate(monkeypatch), make(every_s=1e-9, every_steps=5)
    saver.save(tensors(1.0), at(1))
    assert [saver.due(step) for step in (2, 3, 4)] == [False, False, False]
    assert said.getvalue().splitlines() == [
        "the checkpoint at step 1 is still being written after save.every_s=1e-09, so the next one waits for it"
    ]
    assert saver.due(5)
    threading.Timer(0.2, gate.open.set).start()
    saver.save(tensors(5.0), at(5))
    assert gate.open.is_set() and stands_at(saver) >= 1
    assert saver.finish() and stands_at(saver) == 5
    assert saver.due(6)  # nothing is being written now


def test_due_by_the_clock_by_steps_and_by_a_score(make: Make) -> None:
    saver, _ = make(every_s=3600.0)
    assert not any(saver.due(step) for step in range(1, 10))
    saver.score(7, 0.5)
    assert [step for step in range(1, 10) if saver.due(step)] == [7]
    saver.save(tensors(7.0), at(7))
    assert saver.finish()
    found, _ = newest(saver.folder, "s")
    assert found is not None and found.score == 0.5
    saver.save(tensors(8.0), at(8))
    assert saver.finish()
    found, _ = newest(saver.folder, "s")
    assert found is not None and found.score is None
    saver, _ = make(every_s=0.05)
    with saver:
        assert not saver.due(1)
        time.sleep(0.06)
        assert saver.due(1)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (28, "No space left on device); training goes on, and the one before it is untouched. Make room on the disk"),
        (30, "Read-only file system); training goes on, and the one before it is untouched. Make {} writable again"),
        (5, "Input/output error); training goes on, and the one before it is untouched. Look after the disk"),
    ],
)
def test_trouble_is_told_at_the_next_look_and_the_older_one_is_untouched(
    make: Make, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    saver, said = make(every_s=3600.0)
    saver.save(tensors(1.0), at(1))
    assert saver.finish()

    def broken(*_: Any) -> None:
        raise OSError(number, words.partition(")")[0])

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", broken)
        saver.save(tensors(2.0), at(2))
        assert not saver.finish()
    expected = f"the checkpoint at step 2 could not be written ({words.format(saver.folder)}"
    assert said.getvalue().splitlines() == [expected]
    assert stands_at(saver) == 1 and [p.name for p in saver.folder.iterdir()] == ["step-00000001"]
    saver.save(tensors(3.0), at(3))
    assert saver.finish() and stands_at(saver) == 3
    assert said.getvalue().splitlines() == [expected]


def test_a_mistake_of_ours_is_not_told_as_trouble_with_the_disk(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    saver, _ = make()
    monkeypatch.setattr(checkpoint, "save_file", lambda *_: 1 // 0)
    saver.save(tensors(1.0), at(1))
    with pytest.raises(ZeroDivisionError):
        saver.finish()


def test_lines_that_cannot_be_written_hold_the_checkpoint_back(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    saver, said = make()

    def full() -> list[Path]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saver.journal, "flush", full)
    saver.save(tensors(1.0), at(1))
    assert not saver.finish() and stands_at(saver) == 0
    assert "the checkpoint at step 1 could not be written" in said.getvalue()


@pytest.mark.parametrize("end", [ValueError(), Stopped(15)], ids=["an error", "a wish to stop"])
def test_the_end_waits(make: Make, monkeypatch: pytest.MonkeyPatch, end: BaseException) -> None:
    gate, (saver, _) = Gate(monkeypatch), make()
    with pytest.raises(type(end)), saver:  # noqa: PT012
        saver.save(tensors(1.0), at(1))
        threading.Timer(0.2, gate.open.set).start()
        raise end
    assert stands_at(saver) == 1


def test_the_end_at_once_leaves_no_half(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, (saver, _) = Gate(monkeypatch), make()
    with pytest.raises(KeyboardInterrupt), saver:  # noqa: PT012
        saver.save(tensors(1.0), at(1))
        assert gate.entered.wait(20)
        threading.Timer(0.2, gate.open.set).start()
        raise KeyboardInterrupt
    assert stands_at(saver) == 0 and list(saver.folder.iterdir()) == []


@pytest.mark.slow
def test_blocked_for_little_more_than_one_copy(make: Make) -> None:
    """From the second on: the first takes the memory. The whole of it takes several times as long."""
    saver, _ = make()
    held = Tensors({f"w{i}": torch.rand(8 << 20) for i in range(8)}, {})  # 256 MiB
    room = [torch.empty_like(value) for value in held.weights.values()]
    copy, blocked, whole = [], [], []
    for step in range(1, 5):
        began = time.perf_counter()
        for value, place in zip(held.weights.values(), room, strict=True):
            place.copy_(value)
        copied = time.perf_counter()
        saver.save(held, at(step))
        saved = time.perf_counter()
        assert saver.finish()
        copy.append(copied - began)
        blocked.append(saved - copied)
        whole.append(time.perf_counter() - copied)
    print(f"copy {min(copy[1:]):.3f} s, blocked {min(blocked[1:]):.3f} s, whole {min(whole[1:]):.3f} s")
    assert min(blocked[1:]) < 2 * min(copy[1:]) + 0.05
    assert min(blocked[1:]) < 0.5 * min(whole[1:])
