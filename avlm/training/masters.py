"""AdamW for weights of half precision: each has a copy in float32 that learns, and is rounded from it.

A step changes a weight by less than bfloat16 can tell apart, so without copies most of what is learned is lost. The
gradients of several rows are added up in float32 too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class MasterAdamW(torch.optim.AdamW):
    """AdamW (arXiv:1711.05101) over float32 copies where parameters are of another precision.

    Its groups hold the copies. A parameter's gradient goes to its copy as soon as it is made, and is no longer the
    parameter's; `step` rounds the copies back.

    Source:
        Mixed-precision training, arXiv:1710.03740, section 3.1.
    """

    def __init__(self, groups: list[dict[str, Any]], **settings: Any) -> None:
        self.copies: dict[nn.Parameter, nn.Parameter] = {}
        super().__init__(groups, **settings)

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


def _moves_to(copy: nn.Parameter) -> Callable[[Tensor], None]:
    def move(parameter: Tensor) -> None:
        assert parameter.grad is not None
        if copy.grad is None:
            copy.grad = parameter.grad.float()
        else:
            copy.grad += parameter.grad
        parameter.grad = None

    return move
