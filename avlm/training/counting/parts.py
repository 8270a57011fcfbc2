"""What is known of each part at an update: its gradient, how far its weights move, and what memory holds."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from avlm.training.masters import tensors_of

SAMPLE = 4096
"""Numbers of each weight that its update is estimated from; smaller ones are taken whole."""
MB = 1e6


@dataclass(slots=True)
class PartFacts:
    """What one update was like, by part; ``head`` is what is trained beside the parts."""

    grad_norms: dict[str, float] = field(default_factory=dict)
    update_ratios: dict[str, float] = field(default_factory=dict)
    memory_mb: dict[str, float] = field(default_factory=dict)


@contextmanager
def measured_update(optimizer: torch.optim.Optimizer, model: nn.Module, norm: float) -> Iterator[PartFacts]:
    """Look at the parts before and after an update, which the block makes.

    Args:
        norm: Of the whole gradient before it was clipped.

    Yields:
        Facts that are there when the block ends.
    """
    facts = PartFacts(gradient_norms(optimizer, norm))
    before = {part: [_some(p).clone() for p in members] for part, members in _parts(optimizer).items()}
    yield facts
    for part, members in _parts(optimizer).items():
        moved = sum(float((_some(p) - old).square().sum()) for p, old in zip(members, before[part], strict=True))
        size = sum(float(old.square().sum()) for old in before[part])
        facts.update_ratios[part] = math.sqrt(moved / size) if size else 0.0
    facts.memory_mb = memory_mb(optimizer, model)


def gradient_norms(optimizer: torch.optim.Optimizer, norm: float) -> dict[str, float]:
    """The norm of each part's gradient as it was before clipping, which scaled them all alike.

    Args:
        norm: Of all together, before clipping.
    """
    found = {}
    for part, members in _parts(optimizer).items():
        grads = [p.grad for p in members if p.grad is not None]
        total: Any = torch.nn.utils.get_total_norm(grads) if grads else torch.zeros(())
        found[part] = float(total.full_tensor() if hasattr(total, "full_tensor") else total)
    now = math.sqrt(sum(value**2 for value in found.values()))
    return {part: value * norm / now if now else 0.0 for part, value in found.items()}


def memory_mb(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, float]:
    """What weights, gradients and the optimizer (its copies of weights with it) hold on this rank, and the most yet."""
    members = [p for group in optimizer.param_groups for p in group["params"]]
    weights = {id(p): p for p in model.parameters()}
    copies = [p for p in members if id(p) not in weights]
    kept = [(name, value) for p in members for name, value in optimizer.state.get(p, {}).items()]
    moments = [t for name, value in kept if isinstance(value, Tensor) for t in tensors_of(name, value).values()]
    grads = [p.grad for p in {**weights, **{id(p): p for p in members}}.values() if p.grad is not None]
    device = next(iter(weights.values())).device
    held = {
        "parameters": _bytes(weights.values()),
        "gradients": _bytes(grads),
        "optimizer": _bytes(moments) + _bytes(copies),
        "peak": peak_bytes(device),
    }
    return {name: round(value / MB, 3) for name, value in held.items()}


def peak_bytes(device: torch.device) -> int:
    """The most that tensors have taken on a CUDA device; elsewhere the most that the process has."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _parts(optimizer: torch.optim.Optimizer) -> dict[str, list[Tensor]]:
    found: dict[str, list[Tensor]] = {}
    for group in optimizer.param_groups:
        found.setdefault(group.get("part", "head"), []).extend(group["params"])
    return found


def _some(tensor: Tensor) -> Tensor:
    """Numbers of a weight at even distances, on this rank."""
    values = _here(tensor.detach()).reshape(-1)
    return values[:: max(1, len(values) // SAMPLE)]


def _here(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in map(_here, tensors))
