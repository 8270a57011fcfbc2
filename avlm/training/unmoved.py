"""Looking at a model in the middle of training without leaving a trace in what it learns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def unmoved(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients while the block runs; afterwards every mode and generator is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module, training in modes:
            module.training = training
