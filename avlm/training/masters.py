"""AdamW as a stage asks for it, for weights of any precision: what is not float32 has a copy in float32 that learns.

A step changes a weight by less than bfloat16 can tell apart, so without copies most of what is learned is lost. The
gradients of several rows are added up in float32 too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from avlm.config.stage import Optimizer, Stage
from avlm.errors import MissingExtraError


class Masters(torch.optim.Optimizer):
    """An optimizer over float32 copies where parameters are of another precision; what updates them comes behind it.

    Its groups hold the copies. A parameter's gradient goes to its copy as soon as it is made, and is no longer the
    parameter's; `step` rounds the copies back.

    Source:
        Mixed-precision training, arXiv:1710.03740, section 3.1.
    """

    def __init__(self, groups: list[dict[str, Any]], **settings: Any) -> None:
        self.copies: dict[nn.Parameter, nn.Parameter] = {}
        super().__init__(groups, **settings)  # type: ignore[call-arg]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; those that are not float32 get a copy."""
        members: list[nn.Parameter] = list(param_group["params"])
        super().add_param_group({**param_group, "params": [self._copied(p) for p in members]})

    def _copied(self, parameter: nn.Parameter) -> nn.Parameter:
        if parameter.dtype in (torch.float32, torch.float64):
            return parameter
        copy = nn.Parameter(parameter.detach().float())
        self.copies[parameter] = copy
        parameter.register_post_accumulate_grad_hook(_moves_to(copy))  # type: ignore[no-untyped-call]
        return copy

    def kept(self, parameter: nn.Parameter) -> nn.Parameter:
        """What learns in a parameter's place: its copy, or itself."""
        return self.copies.get(parameter, parameter)

    def step(self, closure: Callable[[], float] | None = None) -> Any:  # type: ignore[override]
        """Update the copies, and round the parameters from them."""
        found = super().step(closure)
        with torch.no_grad():
            for parameter, copy in self.copies.items():
                parameter.copy_(copy)
        return found


class MasterAdamW(Masters, torch.optim.AdamW):
    """AdamW (arXiv:1711.05101), its moments in float32."""


def make_adamw(groups: list[dict[str, Any]], settings: Optimizer) -> Masters:
    """The optimizer that a stage asks for.

    Args:
        groups: Parameters with their ``lr`` and ``weight_decay``.

    Raises:
        MissingExtraError: torchao is not installed, and moments of 8 bits are asked for.
    """
    if settings.kind == "adamw":
        return MasterAdamW(groups, betas=settings.betas, eps=settings.eps, fused=True)
    check_kind(settings)
    from torchao.optim import AdamW8bit

    class MasterAdamW8bit(Masters, AdamW8bit):  # type: ignore[misc]
        """AdamW with moments in blocks of 256 values, each value 8 bits of its block's largest (arXiv:2110.02861)."""

        def step(self, closure: Callable[[], float] | None = None) -> Any:  # type: ignore[override]
            """Update as torchao does: compiled, but on a processor, where a compiler takes longer than it saves."""
            device = self.param_groups[0]["params"][0].device.type
            with torch.compiler.set_stance("force_eager") if device == "cpu" else nullcontext():
                return super().step(closure)

    return MasterAdamW8bit(groups, betas=settings.betas, eps=settings.eps)


def check_kind(settings: Optimizer) -> None:
    """Refuse an optimizer whose library is not there.

    Raises:
        MissingExtraError: It is not installed.
    """
    if settings.kind == "adamw8bit" and find_spec("torchao") is None:
        raise MissingExtraError("torchao", "quant", "optimizer.kind=adamw8bit")


def check_kinds(stages: Sequence[Stage]) -> None:
    """Refuse now what a later stage could not be trained with, before hours are spent on this one.

    Raises:
        MissingExtraError: An optimizer's library is not installed.
    """
    for stage in stages:
        check_kind(stage.optimizer)


def set_rate(group: dict[str, Any], rate: float) -> None:
    """Set a group's learning rate, which torchao keeps in a tensor."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def begin_state(optimizer: torch.optim.Optimizer) -> None:
    """Make every moment, as the first step would, and change no weight: a step of no gradient at a rate of zero."""
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    members = [p for group in optimizer.param_groups for p in group["params"]]
    for group in optimizer.param_groups:
        set_rate(group, 0.0)
    for parameter in members:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        set_rate(group, rate)


def tensors_of(name: str, value: Tensor) -> dict[str, Tensor]:
    """The plain tensors that a moment consists of: itself, or what a type of its own holds (torch's flatten protocol).

    Returns:
        Them by name, such as ``exp_avg``, or ``exp_avg.codes`` and ``exp_avg.scale``.
    """
    if isinstance(value, DTensor) or not hasattr(value, "__tensor_flatten__"):
        return {name: value.detach()}
    inner, _ = value.__tensor_flatten__()
    return {f"{name}.{part}": getattr(value, part) for part in inner}


def _moves_to(copy: nn.Parameter) -> Callable[[Tensor], None]:
    def move(parameter: Tensor) -> None:
        assert parameter.grad is not None
        if copy.grad is None:
            copy.grad = parameter.grad.float()
        else:
            copy.grad += parameter.grad
        parameter.grad = None

    return move
