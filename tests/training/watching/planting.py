"""Trouble that is made on purpose, and a run that has it."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from avlm.config.io import override
from avlm.config.run import RunConfig
from avlm.config.stage import Stage
from avlm.training import chain
from avlm.training.trainer import Trainer

JOINT: dict[str, Any] = {
    "name": "only",
    "train": {"vision_connector": {"lr": 1e-3}, "audio_connector": {"lr": 1e-3}, "language": {"lr": 1e-3}},
    "steps": 3,
    "batch_samples": 4,
    "row_tokens": 128,
}


def one_stage(config: RunConfig, *overrides: str, **changes: Any) -> RunConfig:
    """The same run with one stage and no part built, and nobody asked anything."""
    stage = Stage.model_validate({**JOINT, **changes})
    return override(config.model_copy(update={"stages": (stage,)}), ["samples.prompts=0", *overrides])


class GradientLost(torch.autograd.Function):
    """Hands values through, and makes NaN of their gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * float("nan")


def spoiled(output: Any, spoil: Callable[[Tensor], Tensor]) -> Any:
    """What a module returns, its first tensor spoiled."""
    if isinstance(output, Tensor):
        return spoil(output)
    if isinstance(output, tuple):
        return (spoil(output[0]), *output[1:])
    name = next(iter(output))
    output[name] = spoil(output[name])
    return output


def plant(module: nn.Module, spoil: Callable[[Tensor], Tensor], when: Callable[[], bool] = lambda: True) -> Any:
    """Spoil what a module returns, as long as ``when`` says so; returns the handle of the hook."""
    return module.register_forward_hook(lambda m, args, output: spoiled(output, spoil) if when() else None)


def train(
    monkeypatch: pytest.MonkeyPatch,
    config: RunConfig,
    prepare: Callable[[Trainer], None] = lambda trainer: None,
    on_step: Callable[[Trainer], None] = lambda trainer: None,
) -> str:
    """Train a run whose trainer was tampered with, and return what it said."""
    trainers: list[Trainer] = []

    class Tampered(Trainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            trainers.append(self)
            prepare(self)

    monkeypatch.setattr(chain, "Trainer", Tampered)
    console = Console(record=True, file=io.StringIO(), width=2000)
    try:
        chain.Run(config, console=console, on_step=lambda metrics: on_step(trainers[-1])).train()
    finally:
        said = console.export_text()
        (Path(config.out) / ".said").write_text(said)
    return said
