"""Checkpoints: whole or absent, bit for bit, and never in the way."""

from __future__ import annotations

import io
import json
import math
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn

from avlm.errors import WeightsError
from avlm.training import checkpoint
from avlm.training.chain import Run
from avlm.training.checkpoint import Checkpoint, Owner, Position, best, load, newer_than, newest, save
from avlm.training.snapshot import Tensors, held, put_back

FILES = ("optimizer.safetensors", "state.json", "weights.safetensors")


class Net(nn.Module):
    """Something of every kind: trained, frozen, a tied weight, a buffer that is saved and one that is not."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv1d(3, 4, 2)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 5)
        self.tied = nn.Linear(4, 5, bias=False)
        self.tied.weight = self.head.weight
        self.frozen = nn.Linear(5, 5)
        self.frozen.requires_grad_(False)
        self.register_buffer("passing", torch.rand(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.conv(x)).mean(-1)
        out: Tensor = self.frozen(self.head(h) + self.tied(h))
        return out


def pair(seed: int = 0) -> tuple[Net, torch.optim.Optimizer]:
    net = Net(seed)
    return net, torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.1, fused=True)


def step(net: Net, optimizer: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    net(torch.randn(2, 3, 6)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def everything(net: Net) -> dict[str, Tensor]:
    return {**dict(net.named_parameters()), **dict(net.named_buffers())}


def position(number: int, stage: str = "s") -> Position:
    return Position(stage, number, 100 + number, number)


def write(folder: Path, *numbers: int, keep: int = 10, stage: str = "s", **how: Any) -> None:
    net, optimizer = pair()
    for number in numbers:
        step(net, optimizer, number)
        save(folder, held(net, optimizer), position(number, stage), keep=keep, **how)


def restore(found: Checkpoint, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    put_back(load(found), net, optimizer, str(found.folder))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_goes_on_bit_for_bit(tmp_path: Path) -> None:
    net, optimizer = pair()
    for seed in range(3):
        step(net, optimizer, seed)
    save(tmp_path, held(net, optimizer), position(3), keep=2)

    other, other_optimizer = pair(seed=0)
    found, passed = newest(tmp_path, "s")
    assert found is not None and not passed
    assert found.position == position(3)
    restore(found, other, other_optimizer)
    for name, value in everything(net).items():
        assert name == "passing" or torch.equal(everything(other)[name], value)
    for seed in range(3, 6):
        step(net, optimizer, seed)
        step(other, other_optimizer, seed)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))
    assert torch.equal(net.norm.running_var, other.norm.running_var)


def test_moments_lie_in_memory_as_their_parameters_do(tmp_path: Path) -> None:
    """Fused AdamW walks memory in a straight line; moments in another order would go to other weights."""
    net = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    net(torch.randn(1, 3, 5, 5)).sum().backward()
    optimizer.step()
    save(tmp_path, held(net, optimizer), position(1), keep=1)
    found, _ = newest(tmp_path, "s")
    assert found is not None
    again = torch.optim.AdamW(net.parameters(), fused=True)
    restore(found, net, again)
    moment = again.state[net.weight]["exp_avg"]
    assert moment.stride() == net.weight.stride() != torch.empty(net.weight.shape).stride()
    assert torch.equal(moment, optimizer.state[net.weight]["exp_avg"])


def test_holds_what_the_stage_changes_and_no_more(tmp_path: Path) -> None:
    from safetensors import safe_open

    write(tmp_path, 1)
    with safe_open(tmp_path / "step-00000101" / "weights.safetensors", "pt") as file:
        found = set(file.keys())
    assert not any(name.startswith(("frozen", "passing", "tied")) for name in found)
    assert {"conv.weight", "head.weight", "norm.running_mean"} <= found
    assert names(tmp_path / "step-00000101") == list(FILES)


def test_only_the_last_ones_are_kept(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 3, 4, keep=2)
    assert names(tmp_path) == ["step-00000103", "step-00000104"]


def test_another_stages_checkpoint_is_not_taken(tmp_path: Path) -> None:
    write(tmp_path, 5, stage="earlier")
    assert newest(tmp_path, "s") == (None, [])
    assert newest(tmp_path / "nowhere", "s") == (None, [])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("at", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_one_flipped_bit_anywhere_is_noticed(tmp_path: Path, name: str, at: float) -> None:
    write(tmp_path, 1, 2)
    path = tmp_path / "step-00000102" / name
    data = bytearray(path.read_bytes())
    data[round(at * (len(data) - 1))] ^= 1
    path.write_bytes(data)
    found, passed = newest(tmp_path, "s")
    assert found is not None and found.position == position(1)
    assert len(passed) == 1 and "step-00000102" in passed[0] and "was passed over" in passed[0]
    if name != "state.json":
        assert passed == [
            f"checkpoint step-00000102 is damaged ({name} changed since it was written) and was passed over"
        ]


def test_another_number_in_the_state_is_noticed(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    path = tmp_path / "step-00000102" / "state.json"
    text = path.read_text()
    assert text.count('"stage_step": 2') == 1
    path.write_text(text.replace('"stage_step": 2', '"stage_step": 9'))
    found, passed = newest(tmp_path, "s")
    assert found is not None and found.position == position(1)
    assert passed == [
        "checkpoint step-00000102 is damaged (state.json changed since it was written) and was passed over"
    ]


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_passed_over(tmp_path: Path, name: str) -> None:
    write(tmp_path, 1, 2)
    (tmp_path / "step-00000102" / name).unlink()
    found, passed = newest(tmp_path, "s")
    assert found is not None and found.position == position(1)
    assert passed == [f"checkpoint step-00000102 lacks {name} and was passed over"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"position": 3}', '{"position": {}, "sha256": []}', "\udcff", "0" * 9]
)
def test_unreadable_json_is_passed_over(tmp_path: Path, text: str) -> None:
    write(tmp_path, 1, 2)
    (tmp_path / "step-00000102" / "state.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    found, passed = newest(tmp_path, "s")
    assert found is not None and found.position == position(1)
    assert len(passed) == 1 and passed[0].startswith("checkpoint step-00000102 is not readable (")


def test_a_list_in_place_of_the_hashes_is_passed_over(tmp_path: Path) -> None:
    write(tmp_path, 1)
    path = tmp_path / "step-00000101" / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sha256": []}))
    found, passed = newest(tmp_path, "s")
    assert found is None and len(passed) == 1


def test_half_written_ones_are_not_seen_and_go_away(tmp_path: Path) -> None:
    write(tmp_path, 1)
    half = tmp_path / ".step-00000102.writing"
    half.mkdir()
    (half / "weights.safetensors").write_bytes(b"half")
    found, passed = newest(tmp_path, "s")
    assert found is not None and found.position == position(1) and not passed
    write(tmp_path, 3)
    assert names(tmp_path) == ["step-00000101", "step-00000103"]


def test_a_damaged_newer_one_does_not_push_out_the_one_just_written(tmp_path: Path) -> None:
    write(tmp_path, 1, 9)
    (tmp_path / "step-00000109" / "state.json").write_text("{")
    write(tmp_path, 2, keep=1)  # the run went on from step 1
    assert names(tmp_path) == ["step-00000102"]
    assert newest(tmp_path, "s")[0] is not None


def test_other_weights_are_refused(tmp_path: Path) -> None:
    write(tmp_path, 1)
    found, _ = newest(tmp_path, "s")
    assert found is not None
    net, optimizer = pair()
    net.frozen.requires_grad_(True)
    with pytest.raises(WeightsError, match=r"holds other weights than the stage trains \(frozen\.bias among them\)"):
        restore(found, net, optimizer)


# ---------------------------------------------------------------- trouble with the disk


def full(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param((checkpoint, "save_file"), id="writing the tensors"),
        pytest.param((Path, "write_text"), id="writing the state"),
        pytest.param((Path, "mkdir"), id="making the folder"),
        pytest.param((Path, "rename"), id="publishing"),
    ],
)
def test_trouble_with_the_disk_leaves_the_older_one_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: tuple[Any, str]
) -> None:
    write(tmp_path, 1)
    net, optimizer = pair()
    with monkeypatch.context() as patch:
        patch.setattr(*broken, full)
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path, held(net, optimizer), position(2), keep=1)
    found, passed = newest(tmp_path, "s")
    assert found is not None and found.position == position(1) and not passed
    save(tmp_path, held(net, optimizer), position(3), keep=1)
    assert names(tmp_path) == ["step-00000103"]


@pytest.mark.slow
def test_a_disk_that_is_really_full_is_an_os_error(tmp_path: Path) -> None:
    """safetensors has an error of its own for it. A limit on the size of files stands in for a full disk."""
    limited = f"""
import resource, signal
from pathlib import Path
import torch
from avlm.training.checkpoint import save_tensors
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, {resource.RLIM_INFINITY}))
try:
    save_tensors({{"a": torch.zeros(100_000)}}, Path({str(tmp_path / "a.safetensors")!r}))
except OSError as error:
    print("an OSError:", error)
"""
    done = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("an OSError:") and "File too large" in done.stdout


def test_a_run_goes_on_when_checkpoints_cannot_be_written(
    small_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def writes(tensors: Any, path: Path) -> None:
        """There is no room for steps 3 and 4."""
        if path.parent.name in (".step-00000003.writing", ".step-00000004.writing"):
            full()
        save_file(tensors, path)

    out = io.StringIO()
    settings = ["stages.language.steps=6", "samples.prompts=0"]
    Run(small_run("whole", settings), console=Console(file=io.StringIO())).train("language")
    monkeypatch.setattr(checkpoint, "save_file", writes)
    Run(small_run("full", settings), console=Console(file=out)).train("language")
    said = [line for line in out.getvalue().splitlines() if "checkpoint" in line]
    assert said == [
        f"the checkpoint at step {step} could not be written (No space left on device); training goes on, and the one "
        "before it is untouched. Make room on the disk"
        for step in (3, 4)
    ]
    a, b = (tmp_path / name / "parts" / "language" / "model.safetensors" for name in ("whole", "full"))
    assert a.read_bytes() == b.read_bytes()


# ---------------------------------------------------------------- which are kept, and whose they are


def test_the_best_are_kept_besides_the_last(tmp_path: Path) -> None:
    for number, score in [(1, 0.3), (2, 0.9), (3, None), (4, 0.5), (5, math.nan), (6, 0.1)]:
        write(tmp_path, number, keep=2, keep_best=2, score=score)
    assert names(tmp_path) == [f"step-0000010{number}" for number in (2, 4, 5, 6)]
    found = best(tmp_path, "s")
    assert found is not None and (found.position.step, found.score) == (102, 0.9)
    (tmp_path / "step-00000102" / "weights.safetensors").write_bytes(b"")
    found = best(tmp_path, "s")
    assert found is not None and found.position.step == 104
    assert best(tmp_path, "other") is None


def test_the_best_of_an_earlier_stage_is_not_kept(tmp_path: Path) -> None:
    write(tmp_path, 1, stage="earlier", score=9.0)
    write(tmp_path, 2, 3, keep=1, keep_best=1, score=1.0)
    assert names(tmp_path) == ["step-00000103"]  # of two with the same score the newer one


def test_folders_with_other_names_are_left_alone(tmp_path: Path) -> None:
    write(tmp_path, 1)
    for name in ("step-00000101 (copy)", "step-99999999.bak", "step-x", "mine"):
        shutil.copytree(tmp_path / "step-00000101", tmp_path / name)
    (tmp_path / "step-00000999").write_text("a file")
    write(tmp_path, 2, 3, keep=1)
    assert newest(tmp_path, "s")[0] is not None and newest(tmp_path, "s")[1] == []
    assert set(names(tmp_path)) == {
        "step-00000103", "step-00000101 (copy)", "step-99999999.bak", "step-x", "mine", "step-00000999"
    }  # fmt: skip


def test_one_under_another_name_is_passed_over(tmp_path: Path) -> None:
    write(tmp_path, 1)
    shutil.copytree(tmp_path / "step-00000101", tmp_path / "step-00000500")
    found, passed = newest(tmp_path, "s")
    assert found is not None and found.position == position(1)
    assert passed == ["checkpoint step-00000500 is step-00000101 under another name and was passed over"]


def test_another_owners_is_passed_over_with_what_differs(tmp_path: Path) -> None:
    def differs(facts: Any) -> str | None:
        return None if facts == {"seed": 3} else f"seed={facts.get('seed')} there, and 3 here"

    owner = Owner({"seed": 3}, differs)
    write(tmp_path, 1, owner=owner)
    write(tmp_path, 2, owner=Owner({"seed": 4}, differs))
    found, passed = newest(tmp_path, "s", owner)
    assert found is not None and found.position == position(1)
    assert passed == ["checkpoint step-00000102 is another run's (seed=4 there, and 3 here) and was passed over"]


def test_what_was_passed_over_takes_no_whole_ones_place(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    (tmp_path / "step-00000102" / "state.json").write_text("{")
    found, _ = newest(tmp_path, "s")
    write(tmp_path, 3, keep=2, passed_over=newer_than(tmp_path, found))
    assert names(tmp_path) == ["step-00000101", "step-00000103"]
    assert newer_than(tmp_path, None) == {"step-00000101", "step-00000103"}


def test_a_checkpoint_is_taken_away_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill while one is removed leaves nothing that looks like a checkpoint and is none."""
    write(tmp_path, 1)
    seen: list[list[str]] = []
    remove = shutil.rmtree

    def watched(path: Path, **how: Any) -> None:
        seen.append(sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith(".")))
        if Path(path).is_dir():
            assert Path(path).name.startswith(".")
        remove(path, **how)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", watched)
    write(tmp_path, 2, keep=1)
    assert seen[-1] == ["step-00000102"] == names(tmp_path)


def test_all_is_on_the_disk_before_it_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files, then the folder's list of them, then the rename, then the list that the rename changed."""
    done: list[tuple[str, str]] = []
    sync, rename = os.fsync, Path.rename

    def synced(handle: int) -> None:
        done.append(("sync", os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))))
        sync(handle)

    def renamed(self: Path, target: Path) -> Path:
        done.append(("rename", Path(target).name))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    write(tmp_path / "new", 1)
    assert set(done[:3]) == {("sync", name) for name in FILES}
    assert done[3:] == [
        ("sync", ".step-00000101.writing"), ("rename", "step-00000101"), ("sync", "new"), ("sync", tmp_path.name)
    ]  # fmt: skip


@pytest.mark.parametrize("what", ["shape", "type", "moment"])
def test_weights_of_another_shape_or_type_are_refused_and_nothing_is_changed(tmp_path: Path, what: str) -> None:
    net, optimizer = pair()
    step(net, optimizer, 0)
    tensors = held(net, optimizer)
    weights, moments = dict(tensors.weights), dict(tensors.moments)
    if what == "moment":
        moments["nobody.weight|exp_avg"] = torch.zeros(1)
    else:
        weights["conv.weight"] = torch.zeros(4, 3, 3) if what == "shape" else weights["conv.weight"].double()
    weights["norm.bias"] = torch.full((4,), 7.0)
    save(tmp_path, Tensors(weights, moments), position(1), keep=1)
    found, _ = newest(tmp_path, "s")
    assert found is not None
    with pytest.raises(WeightsError, match="holds other weights than the stage trains"):
        restore(found, net, optimizer)
    assert not (net.norm.bias == 7).any()
