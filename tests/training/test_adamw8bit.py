"""AdamW with moments in 8 bits: much the same weights for a quarter of the memory, and a checkpoint has every bit."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from avlm.config.io import build
from avlm.config.run import RunConfig
from avlm.config.stage import Optimizer
from avlm.errors import ConfigError, MissingExtraError
from avlm.training import masters
from avlm.training.chain import train
from avlm.training.checkpoint import Position, load, newest, save
from avlm.training.counting.parts import memory_mb
from avlm.training.masters import Masters, begin_state, make_adamw, set_rate
from avlm.training.sharded import check_sharded
from avlm.training.snapshot import held, put_back
from avlm.training.world import World
from tests.training.worlds import lines, weights

needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao (the extra quant) is not installed")
SETTINGS = Optimizer(kind="adamw8bit", betas=(0.9, 0.98), weight_decay=0.1)


def net(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Moments of 64 x 128 values stand in 8 bits, those of the bias in 32, and one weight gets no gradient."""
    torch.manual_seed(seed)
    return nn.ModuleDict({"a": nn.Linear(128, 64), "b": nn.Linear(64, 64), "idle": nn.Linear(64, 64)}).to(dtype)


def optimizer_of(model: nn.Module, settings: Optimizer = SETTINGS) -> Masters:
    return make_adamw([{"params": list(model.parameters()), "lr": 1e-3, "weight_decay": 0.1}], settings)


def step(model: Any, optimizer: Masters, seed: int) -> float:
    """Towards the outputs of a fixed layer."""
    torch.manual_seed(seed)
    x = torch.randn(32, 128)
    target = x @ torch.linspace(-1, 1, 128 * 64).view(128, 64).sin()
    loss = (model["b"](model["a"](x.to(model["a"].weight.dtype)).tanh()).float() - target).square().mean()
    loss.backward()
    set_rate(optimizer.param_groups[0], 1e-3 * (1 + seed % 3))
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@needs_torchao
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_learns_as_torchs_own_does(dtype: torch.dtype) -> None:
    """50 steps of both from the same weights: apart by a small share of the way that torch's AdamW has gone."""
    ours, theirs = net(dtype=dtype), net()
    theirs.load_state_dict({name: value.float() for name, value in ours.state_dict().items()})
    start = values(theirs)
    eight = optimizer_of(ours)
    plain = torch.optim.AdamW(theirs.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.1)
    losses = [(step(ours, eight, seed), step(theirs, plain, seed)) for seed in range(50)]  # type: ignore[arg-type]
    assert losses[-1][1] < losses[0][1]
    for a, b in losses:
        assert abs(a - b) < 0.02 * b
    for a, b, c in zip(ours.parameters(), theirs.parameters(), start, strict=True):
        way = (b - c).norm()
        assert (eight.kept(a) - b).norm() <= 0.1 * way


@needs_torchao
def test_moments_take_a_quarter_of_the_memory() -> None:
    sizes = {}
    for kind in ("adamw", "adamw8bit"):
        model = net()
        optimizer = optimizer_of(model, SETTINGS.model_copy(update={"kind": kind}))
        step(model, optimizer, 0)
        sizes[kind] = memory_mb(optimizer, model)["optimizer"]
    # 2 moments of 12,416 values; 8 bits, a scale for every 256 and two tables of 256 for each of two weights
    assert sizes["adamw"] == pytest.approx(2 * 4 * 12_416 / 1e6, abs=0.001)
    assert sizes["adamw8bit"] == pytest.approx(2 * (12_288 * (1 + 4 / 256) + 128 * 4 + 2 * 1024) / 1e6, abs=0.001)


@needs_torchao
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_has_every_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    model, again = net(dtype=dtype), net(seed=7, dtype=dtype)
    optimizer, other = optimizer_of(model), optimizer_of(again)
    for seed in range(3):
        step(model, optimizer, seed)
    save(tmp_path, held(model, optimizer), Position("s", 3, 3, 0), keep=1)
    found, _ = newest(tmp_path, "s")
    assert found is not None
    put_back(load(found), again, other, "there")
    assert other.kept(again["idle"].weight) not in other.state  # type: ignore[index]
    for seed in range(3, 8):
        assert step(model, optimizer, seed) == step(again, other, seed)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b) and torch.equal(optimizer.kept(a), other.kept(b))


@needs_torchao
def test_moments_begin_without_a_trace_in_the_weights() -> None:
    model = net(dtype=torch.bfloat16)
    optimizer = optimizer_of(model)
    before = values(model)
    begin_state(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(1e-3)
    assert all(optimizer.kept(p) in optimizer.state for p in model.parameters())


STAGE = {"name": "only", "train": {"language": {"lr": 1e-3}, "vision_connector": {"lr": 1e-3}}, "steps": 4}
STAGE |= {"batch_samples": 6, "row_tokens": 64, "optimizer": {"kind": "adamw8bit"}}


@pytest.fixture
def run(small_run: Callable[..., RunConfig]) -> Callable[..., RunConfig]:
    def make(name: str, **update: Any) -> RunConfig:
        config = small_run(name).model_dump(mode="json")
        config |= {"stages": [STAGE], "device": "cpu", "save": {"every_s": 3600.0, "every_steps": 1}, **update}
        return build(RunConfig, config)

    return make


class Enough(Exception):  # noqa: N818
    """The test has seen what it wanted."""


@needs_torchao
def test_a_run_that_is_resumed_ends_with_the_same_bits(run: Callable[..., RunConfig], tmp_path: Path) -> None:
    from avlm.training.chain import Run

    def stop(metrics: Any) -> None:
        if metrics.step == 2:
            raise Enough

    train(run("whole"))
    with pytest.raises(Enough):
        Run(run("cut"), on_step=stop).train()
    train(run("cut"))
    assert lines(tmp_path / "whole") == lines(tmp_path / "cut")
    ours, theirs = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_without_the_library_a_run_says_how_to_get_it_before_it_begins(
    run: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masters, "find_spec", lambda name: None)
    first = {**STAGE, "name": "first", "optimizer": {}}
    with pytest.raises(MissingExtraError) as error:
        train(run("run", stages=[first, STAGE]))
    assert str(error.value) == (
        "optimizer.kind=adamw8bit needs the library torchao, which is not installed. "
        "Install it with: pip install 'avlm[quant]'"
    )
    assert not (tmp_path / "run" / "stages").exists()


def test_shares_of_processes_are_refused(run: Callable[..., RunConfig]) -> None:
    config = run("run", parallel={"mode": "fsdp"})
    check_sharded(config, World(0, 1, torch.device("cpu")))
    with pytest.raises(ConfigError) as error:
        check_sharded(config, World(0, 2, torch.device("cpu")))
    assert str(error.value) == (
        "stage only has optimizer.kind=adamw8bit, whose moments stand in blocks of 256 values, and with "
        "parallel.mode=fsdp another number of processes parts them elsewhere. Set parallel.mode=data, or "
        "stages.only.optimizer.kind=adamw"
    )
    check_sharded(run("run", parallel={"mode": "data"}), World(0, 2, torch.device("cpu")))
