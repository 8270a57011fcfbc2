"""Where a process computes, and what it refuses before it begins."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from avlm.config.io import to_yaml
from avlm.config.parallel import ParallelConfig
from avlm.config.run import RunConfig
from avlm.errors import ConfigError
from avlm.samples import Row
from avlm.training.device import move_model, move_row
from avlm.training.world import join, place
from tests.training.worlds import changed, train_in

HAS_GPU = torch.cuda.is_available()


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused_and_the_advice_holds() -> None:
    with pytest.raises(
        ConfigError, match=r"^device=cuda, and torch finds no GPU here\. Set device=auto or device=cpu$"
    ):
        place("cuda")
    assert place("auto") == place("cpu") == torch.device("cpu")


def test_without_torchrun_a_process_is_alone_and_hears_itself() -> None:
    world = join("cpu", ParallelConfig())
    assert (world.rank, world.size, world.first, world.alone) == (0, 1, True, True)
    assert world.gather({"a": 1}) == [{"a": 1}]
    assert world.most(3, 0) == [3, 0]
    assert world.sums([0.1]) == [0.1]
    with world.member(), world.first_alone():
        world.wait()


def test_a_row_moves_with_all_its_tensors_and_its_teacher() -> None:
    def row(teacher: Row | None = None) -> Row:
        ids = torch.zeros(1, 2, dtype=torch.long)
        tensors = {field.name: torch.zeros(1) for field in fields(Row) if "Tensor" in str(field.type)}
        return Row(**{**tensors, "input_ids": ids, "lengths": [2], "ids": ["a"], "places": [], "teacher": teacher})  # type: ignore[arg-type]

    both = row(row())
    assert move_row(both, torch.device("cpu")) is both
    moved = move_row(both, torch.device("meta"))
    assert moved.teacher is not None
    for one in (moved, moved.teacher):
        found = {field.name: getattr(one, field.name) for field in fields(Row)}
        devices = {name: value.device.type for name, value in found.items() if isinstance(value, torch.Tensor)}
        assert len(devices) == 10
        assert set(devices.values()) == {"meta"}
    assert (moved.lengths, moved.ids) == ([2], ["a"])


def test_a_model_moves_with_its_buffers_and_leaves_parts_without_memory() -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.BatchNorm1d(2), "b": torch.nn.Linear(2, 2, device="meta")})
    weight = model["a"].weight
    move_model(model, torch.device("cpu"))
    assert model["a"].weight is weight
    assert model["b"].weight.is_meta


def test_memory_of_the_processor_is_no_other_where_there_is_no_gpu(
    small_run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = changed(small_run(), tmp_path / "out", device="cpu", parallel={"mode": "fsdp", "offload": True})
    for kind, message in train_in(2, config):
        assert kind == "ConfigError"
        assert message == (
            "parallel.offload=true puts weights into the processor's memory, and this run has no other. "
            "Set parallel.offload=false, or device=cuda"
        )


def test_parts_under_way_side_by_side_are_left_to_one_process(
    small_run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = changed(small_run(), tmp_path / "out", device="cpu")
    (tmp_path / "out" / "building" / config.stages[0].name).mkdir(parents=True)
    (tmp_path / "out" / "config.yaml").write_text(to_yaml(config))
    for kind, message in train_in(2, config):
        assert kind == "ConfigError"
        assert re.search(r"holds stages that one process was training side by side", message)


def torchrun(config: Path, out: Path, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with log.open("wb") as file:
        return subprocess.Popen([*command, "-m", "avlm", "train", str(config), f"out={out}"], stderr=file, stdout=file)


@pytest.mark.slow
def test_torchrun_starts_a_world_and_its_signal_saves_and_stops_it(
    small_run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = tmp_path / "small.yaml"
    config.write_text(to_yaml(changed(small_run(), tmp_path / "x", device="cpu", max_steps=None)))
    out, log = tmp_path / "out", tmp_path / "log"
    run = torchrun(config, out, log)
    while not (out / "metrics.jsonl").is_file() or not (out / "metrics.jsonl").stat().st_size:
        assert run.poll() is None, log.read_text()
        time.sleep(0.05)
    os.kill(run.pid, signal.SIGTERM)
    run.wait(120)
    assert "the same command goes on from there" in log.read_text()
    again = torchrun(config, out, log)
    assert again.wait(240) == 0, log.read_text()
    assert (out / "model" / "model.safetensors").is_file()
    assert (out / "report.html").is_file()
