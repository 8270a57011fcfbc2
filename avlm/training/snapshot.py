"""What a checkpoint holds of a model and its optimizer: read out, copied aside while training goes on, put back.

Only what a stage changes: trained weights, buffers that are saved, and the optimizer's moments. Everything else follows
from the settings and the stage before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from avlm.errors import WeightsError
from avlm.training.masters import MasterAdamW
from avlm.training.sharded import put_whole, whole_tensor

MASTER = "master"
"""What a weight's float32 copy is called among its moments."""
PRECISIONS = {torch.float32, torch.bfloat16, torch.float16}


@dataclass(frozen=True, slots=True)
class Tensors:
    """The contents of a checkpoint, by name."""

    weights: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    """What the optimizer knows of each weight: ``name|exp_avg``, ``name|step``, ``name|master``."""


def gather(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
    """What a stage has changed so far; nothing is copied that is whole.

    Of a model that is spread over processes, all of them take part, and the first one gets it.
    """
    weights = {name: whole_tensor(value) for name, value in _weights(model).items()}
    return Tensors(weights, {name: whole_tensor(value) for name, value in _moments(model, optimizer).items()})


class Room:
    """Room in the processor's memory for a copy of a checkpoint's tensors, used again by the next one.

    Taking memory costs more than filling it, and more so where it is pinned for a GPU.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def copy(self, tensors: Tensors) -> Tensors:
        """Copy all tensors, and return the copies. Those of the call before are overwritten."""
        kept, self._kept = self._kept, {}
        weights = {name: self._copy(f"w|{name}", value, kept) for name, value in tensors.weights.items()}
        moments = {name: self._copy(f"m|{name}", value, kept) for name, value in tensors.moments.items()}
        if any(value.device.type != "cpu" for value in (*tensors.weights.values(), *tensors.moments.values())):
            torch.accelerator.synchronize()
        return Tensors(weights, moments)

    def clear(self) -> None:
        self._kept = {}

    def _copy(self, name: str, value: Tensor, kept: Mapping[str, Tensor]) -> Tensor:
        room = kept.get(name)
        if room is None or room.shape != value.shape or room.dtype != value.dtype:
            room = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
        self._kept[name] = room.copy_(value.detach(), non_blocking=True)
        return room


def put_back(tensors: Tensors, model: nn.Module, optimizer: torch.optim.Optimizer, where: str) -> None:
    """Put weights and moments back, bit for bit.

    Args:
        where: Where they were read, for errors.

    Raises:
        WeightsError: They are of other weights than the stage trains; nothing is changed.
    """
    trained, targets = _trained(model), _weights(model)
    strange = tensors.weights.keys() ^ targets.keys()
    strange |= {name for name, value in tensors.weights.items() if name in targets and not _takes(targets[name], value)}
    strange |= {name for name in tensors.moments if name.rpartition("|")[0] not in trained}
    if strange:
        raise WeightsError(
            f"{where}: holds other weights than the stage trains ({min(strange)} among them), so it was "
            "written by another version of avlm. Remove it, and the stage begins again"
        )
    targets = {**dict(model.named_buffers()), **trained}
    with torch.no_grad():
        for name, value in tensors.weights.items():
            put_whole(targets[name], value)
            if name in trained and _kept(optimizer, trained[name]) is not trained[name]:
                _kept(optimizer, trained[name]).copy_(value)  # its own copy follows, unless it was spread in float32
        for name, value in tensors.moments.items():
            owner, _, key = name.rpartition("|")
            parameter = _kept(optimizer, trained[owner])
            if key == MASTER:
                put_whole(parameter, value)
                continue
            # Moments lie in memory as their parameter does.
            like = parameter if value.shape == parameter.shape else value
            kept = torch.empty_like(like, dtype=value.dtype, device=parameter.device)
            put_whole(kept, value)
            optimizer.state[parameter][key] = kept


def _takes(target: Tensor, value: Tensor) -> bool:
    """Whether a value can be put back. What is spread over processes is kept in float32; elsewhere a copy is."""
    return value.shape == target.shape and (value.dtype == target.dtype or {value.dtype, target.dtype} <= PRECISIONS)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """What a stage changes: trained weights, and buffers that are saved."""
    saved = model.state_dict().keys()
    buffers = {name: b for name, b in model.named_buffers() if name in saved and not b.is_meta}
    return {name: t.detach() for name, t in {**_trained(model), **buffers}.items()}


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, parameter in _trained(model).items():
        kept = _kept(optimizer, parameter)
        state: dict[str, Any] = optimizer.state.get(kept, {})
        if kept is not parameter:
            found[f"{name}|{MASTER}"] = kept.detach()
        found |= {f"{name}|{key}": value.detach() for key, value in state.items() if isinstance(value, Tensor)}
    return found


def _kept(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> nn.Parameter:
    """What learns in a parameter's place."""
    return optimizer.kept(parameter) if isinstance(optimizer, MasterAdamW) else parameter
