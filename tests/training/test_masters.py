"""What is kept in bfloat16 learns in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from avlm.config.io import override
from avlm.convert.weights import load_model
from avlm.training.chain import train
from avlm.training.checkpoint import Position, load, newest, save
from avlm.training.masters import MasterAdamW
from avlm.training.snapshot import held, put_back

RATES: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.1}


def layer(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(16, 8).bfloat16()


def gradients(steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(4, 16).bfloat16(), torch.randn(4, 8).bfloat16()) for _ in range(steps)]


def test_copies_learn_as_float32_weights_would() -> None:
    """The same gradients to torch's own AdamW over float32 weights give the same weights, rounded."""
    half = layer()
    exact = [nn.Parameter(p.detach().float()) for p in half.parameters()]
    ours = MasterAdamW([{"params": list(half.parameters())}], **RATES)
    theirs = torch.optim.AdamW(exact, **RATES)
    naive = layer()
    lossy = torch.optim.AdamW(naive.parameters(), **RATES)
    for x, slope in gradients(50):
        (half(x) * slope).sum().backward()
        assert half.weight.grad is None
        (naive(x) * slope).sum().backward()
        for copy, ours_copy in zip(exact, ours.param_groups[0]["params"], strict=True):
            copy.grad = ours_copy.grad.clone()
        for optimizer in (ours, theirs, lossy):
            optimizer.step()
            optimizer.zero_grad()
    for parameter, copy in zip(half.parameters(), exact, strict=True):
        assert torch.equal(ours.kept(parameter), copy) and torch.equal(parameter, copy.bfloat16())
    moved = (half.weight.float() - layer().weight.float()).abs().mean()
    assert (naive.weight.float() - layer().weight.float()).abs().mean() < moved / 2  # most steps are lost in rounding


def test_gradients_of_several_rows_are_added_in_float32() -> None:
    half = layer()
    ours = MasterAdamW([{"params": list(half.parameters())}], **RATES)
    total = torch.zeros(8, 16)
    for x, slope in gradients(20):
        (half(x) * slope).sum().backward()
        total += (slope.T @ x).float()
    copy = ours.kept(half.weight)
    assert copy.grad is not None and copy.dtype == torch.float32
    torch.testing.assert_close(copy.grad, total)


def test_float32_weights_are_their_own() -> None:
    plain = nn.Linear(3, 2)
    optimizer = MasterAdamW([{"params": list(plain.parameters())}], **RATES)
    assert not optimizer.copies and optimizer.kept(plain.weight) is plain.weight


def test_a_checkpoint_holds_the_copies(tmp_path: Path) -> None:
    first = layer()
    optimizer = MasterAdamW([{"params": list(first.parameters())}], **RATES)

    def step(net: nn.Linear, with_optimizer: MasterAdamW, x: torch.Tensor, slope: torch.Tensor) -> None:
        (net(x) * slope).sum().backward()
        with_optimizer.step()
        with_optimizer.zero_grad()

    drawn = gradients(6)
    for x, slope in drawn[:3]:
        step(first, optimizer, x, slope)
    save(tmp_path, held(first, optimizer), Position("s", 3, 3, 0), keep=1)
    second = layer(seed=7)
    again = MasterAdamW([{"params": list(second.parameters())}], **RATES)
    found, _ = newest(tmp_path, "s")
    assert found is not None
    put_back(load(found), second, again, "there")
    for x, slope in drawn[3:]:
        step(first, optimizer, x, slope)
        step(second, again, x, slope)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b) and torch.equal(optimizer.kept(a), again.kept(b))


@pytest.mark.parametrize("precision", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_a_run_keeps_its_model_in_the_numbers_asked_for(
    precision: str, small_run: Callable[..., Any], tmp_path: Path
) -> None:
    run = override(small_run("run"), [f"precision={precision}", "max_steps=2"])
    model = load_model(train(run)).model
    wanted = getattr(torch, precision)
    assert {p.dtype for p in model.parameters()} == {wanted}
    rotary = model.language_model.model.rotary_emb.inv_freq
    assert rotary.dtype == torch.float32  # a table that is computed keeps its precision
