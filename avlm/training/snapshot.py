"""What a checkpoint holds of a model and its optimizer: read out, copied aside while training goes on, put back.

Only what a stage changes: trained weights, buffers that are saved, and the optimizer's moments. Everything else follows
from the settings and the stage before.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from avlm.errors import WeightsError
from avlm.training.masters import Masters, begin_state, tensors_of
from avlm.training.shares import Kind, Places, Stored, own_pieces

MASTER = "master"
"""What a weight's float32 copy is called among its moments."""
PRECISIONS = {torch.float32, torch.bfloat16, torch.float16}


@dataclass(frozen=True, slots=True)
class Tensors:
    """The contents of a checkpoint, by name."""

    weights: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    """What the optimizer knows of each weight: ``name|exp_avg``, ``name|step``, ``name|master``; of moments that have a
    type of their own what they consist of, ``name|exp_avg.codes``."""
    places: Places | None = None
    """Where each begins in what it is a piece of, if this is what one of several processes holds."""


def held(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
    """What a stage has changed so far, and this process holds; nothing is copied."""
    return Tensors(_weights(model), _moments(model, optimizer))


def held_share(model: nn.Module, optimizer: torch.optim.Optimizer, *, first: bool) -> Tensors:
    """The same of a model that is spread over several processes, each of which writes its own pieces.

    Args:
        first: Whether this is the process that writes what is the same in all of them.
    """
    weights, places = own_pieces(_weights(model), first=first)
    moments, more = own_pieces(_moments(model, optimizer), first=first)
    return Tensors(weights, moments, {**places, **more})


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
        return Tensors(weights, moments, tensors.places)

    def clear(self) -> None:
        self._kept = {}

    def _copy(self, name: str, value: Tensor, kept: Mapping[str, Tensor]) -> Tensor:
        room = kept.get(name)
        if room is None or room.shape != value.shape or room.dtype != value.dtype:
            room = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
        self._kept[name] = room.copy_(value.detach(), non_blocking=True)
        return room


def put_back(stored: Stored, model: nn.Module, optimizer: torch.optim.Optimizer, where: str) -> None:
    """Put weights and moments back, bit for bit. A process that holds a share of them reads no more than that.

    Args:
        where: Where they are read, for errors.

    Raises:
        WeightsError: They are of other weights than the stage trains; nothing is changed.
    """
    trained, targets = _trained(model), _weights(model)
    weights = {name for name in stored.kinds if "|" not in name}
    moments = stored.kinds.keys() - weights
    strange = weights ^ targets.keys()
    strange |= {name for name in weights & targets.keys() if not _takes(targets[name], stored.kinds[name])}
    strange |= {name for name in moments if name.rpartition("|")[0] not in trained}
    _refuse(strange, where)
    copies = {name: kept for name, p in trained.items() if (kept := _kept(optimizer, p)) is not p}
    into = {name: value for name, value in targets.items() if f"{name}|{MASTER}" not in moments or name in copies}
    rounded = [name for name in copies if f"{name}|{MASTER}" not in moments]  # they were spread in float32
    into |= {name: copies[name].detach() for name in rounded}
    into |= _rooms({name: stored.kinds[name] for name in moments}, trained, optimizer)
    _refuse({name for name, value in into.items() if value.shape != stored.kinds[name].shape}, where)
    stored.read(into)
    with torch.no_grad():
        for name in rounded:
            trained[name].copy_(copies[name])


def _refuse(strange: Set[str], where: str) -> None:
    if strange:
        raise WeightsError(
            f"{where}: holds other weights than the stage trains ({min(strange)} among them), so it was "
            "written by another version of avlm. Remove it, and the stage begins again"
        )


def _rooms(
    kinds: Mapping[str, Kind], trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Where moments are put back: their optimizer's own, where those have a type of their own, and fresh ones else."""
    known = {owner for owner, _, key in (name.rpartition("|") for name in kinds) if key != MASTER}
    if any("." in name.rpartition("|")[2] for name in kinds):
        begin_state(optimizer)
        for name in trained.keys() - known:  # it had got no gradient
            optimizer.state.pop(_kept(optimizer, trained[name]), None)
    rooms: dict[str, Tensor] = {}
    for name, kind in kinds.items():
        owner, _, key = name.rpartition("|")
        parameter = _kept(optimizer, trained[owner])
        moment, _, part = key.partition(".")
        if key == MASTER:
            rooms[name] = parameter.detach()
        elif part:
            rooms[name] = getattr(optimizer.state[parameter][moment], part)
        else:
            rooms[name] = optimizer.state[parameter][key] = _room(parameter, kind)
    return rooms


def _room(parameter: Tensor, kind: Kind) -> Tensor:
    """Room for a moment, which lies in memory, and is spread over processes, as its parameter is."""
    if kind.shape == parameter.shape:
        return torch.empty_like(parameter.detach(), dtype=kind.dtype, requires_grad=False)
    return torch.empty(kind.shape, dtype=kind.dtype, device=parameter.device)


def _takes(target: Tensor, kind: Kind) -> bool:
    """Whether a value can be put back. What is spread over processes is kept in float32; elsewhere a copy is."""
    return kind.shape == target.shape and (kind.dtype == target.dtype or {kind.dtype, target.dtype} <= PRECISIONS)


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
        for key, value in state.items():
            if isinstance(value, Tensor):
                found |= {f"{name}|{part}": tensor for part, tensor in tensors_of(key, value).items()}
    return found


def _kept(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> nn.Parameter:
    """What learns in a parameter's place."""
    return optimizer.kept(parameter) if isinstance(optimizer, Masters) else parameter
