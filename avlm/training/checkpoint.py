"""Checkpoints: whole or absent.

A checkpoint holds what a stage changed since it began: the trained weights, the
optimizer's moments, and where the run was. It is written aside with a hash of each
file and published by rename. Only safetensors and JSON.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from avlm.convert.weights import aside
from avlm.errors import WeightsError
from avlm.training.masters import MasterAdamW
from avlm.training.sharded import put_whole, whole_tensor


@dataclass(frozen=True, slots=True)
class Position:
    """Where a run is."""

    stage: str
    stage_step: int
    """Steps of the stage done."""
    step: int
    """Steps of the run done."""
    bad: int
    """Samples left out so far in this stage."""
    bad_run: int = 0
    """Of which the last ones, with no good one behind them."""
    plan: str = ""
    """Of the data: what the order of the rows follows from, as `PlanState` writes it."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A whole checkpoint as it lies on disk."""

    folder: Path
    position: Position


MASTER = "master"
"""What a weight's float32 copy is called among its moments."""
FILES = ("optimizer.safetensors", "weights.safetensors")


def save(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    position: Position,
    *,
    keep: int,
    writes: bool = True,
) -> None:
    """Write a checkpoint; of those that are there, keep the last ``keep``.

    Args:
        writes: Whether this process is the one that writes. Where weights are spread over several, all take part.

    Raises:
        OSError: The disk is full or read-only; what was there before is untouched.
    """
    weights, moments = _weights(model), _moments(model, optimizer)
    if not writes:
        return
    out = folder / f"step-{position.step:08d}"
    with aside(out) as writing:
        save_tensors(weights, writing / "weights.safetensors")
        save_tensors(moments, writing / "optimizer.safetensors")
        state = {"position": asdict(position), "sha256": {name: file_sha256(writing / name) for name in FILES}}
        (writing / "state.json").write_text(json.dumps({**state, "self": _digest(state)}, indent=1))
    # What is newer than the checkpoint just written was found damaged, or this run would have gone on from there.
    newer = [path for path in _folders(folder) if path.name > out.name]
    older = [path for path in _folders(folder) if path.name <= out.name][keep:]
    for old in [*newer, *older, *folder.glob(".step-*")]:
        shutil.rmtree(old, ignore_errors=True)


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors as safetensors.

    Raises:
        OSError: The disk is full or read-only. (safetensors has an error of its own for that.)
    """
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def newest(folder: Path, stage: str) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint of a stage.

    Returns:
        It, or None; and for each newer one that was passed over, a sentence that says why.
    """
    passed: list[str] = []
    for path in _folders(folder):
        try:
            position, damaged = _read_state(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            passed.append(f"checkpoint {path.name} is not readable ({type(error).__name__}) and was passed over")
            continue
        if damaged:
            passed.append(
                f"checkpoint {path.name} is damaged ({', '.join(damaged)} changed since it was written) "
                "and was passed over"
            )
        elif position.stage == stage:
            return Checkpoint(path, position), passed
    return None, passed


def _read_state(path: Path) -> tuple[Position, list[str]]:
    """Where a checkpoint stands, and which of its files are not what was written."""
    state = json.loads((path / "state.json").read_bytes())
    position, hashes = Position(**state["position"]), state["sha256"]
    damaged = [name for name in FILES if file_sha256(path / name) != hashes[name]]
    if state["self"] != _digest({"position": state["position"], "sha256": hashes}):
        damaged.append("state.json")
    return position, damaged


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put weights and moments back, bit for bit.

    Raises:
        WeightsError: It holds other weights than the stage trains.
    """
    weights = load_file(checkpoint.folder / "weights.safetensors")
    moments = load_file(checkpoint.folder / "optimizer.safetensors")
    trained, targets = _trained(model), _weights(model)
    strange = sorted(weights.keys() ^ targets.keys())
    if strange:
        raise WeightsError(
            f"{checkpoint.folder}: holds other weights than the stage trains ({strange[0]} among them), so it was "
            "written by another version of avlm. Remove it, and the stage begins again"
        )
    targets = {**dict(model.named_buffers()), **trained}
    with torch.no_grad():
        for name, value in weights.items():
            put_whole(targets[name], value)
            if name in trained and _kept(optimizer, trained[name]) is not trained[name]:
                _kept(optimizer, trained[name]).copy_(value)  # its own copy follows, unless it was spread in float32
        for name, value in moments.items():
            owner, _, key = name.rpartition("|")
            parameter = _kept(optimizer, trained[owner])
            if key == MASTER:
                put_whole(parameter, value)
                continue
            like = (
                parameter if value.shape == parameter.shape else value
            )  # moments lie in memory as their parameter does
            kept = torch.empty_like(like, dtype=value.dtype, device=parameter.device)
            put_whole(kept, value)
            optimizer.state[parameter][key] = kept


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """What a stage changes: trained weights, and buffers that are saved."""
    saved = model.state_dict().keys()
    buffers = {name: b for name, b in model.named_buffers() if name in saved and not b.is_meta}
    return {name: whole_tensor(t.detach()).contiguous() for name, t in {**_trained(model), **buffers}.items()}


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, parameter in _trained(model).items():
        kept = _kept(optimizer, parameter)
        state: dict[str, Any] = optimizer.state.get(kept, {})
        if kept is not parameter:
            found[f"{name}|{MASTER}"] = kept.detach()
        found |= {
            f"{name}|{key}": whole_tensor(value).contiguous()
            for key, value in state.items()
            if isinstance(value, Tensor)
        }
    return found


def _kept(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> nn.Parameter:
    """What learns in a parameter's place."""
    return optimizer.kept(parameter) if isinstance(optimizer, MasterAdamW) else parameter


def _folders(folder: Path) -> list[Path]:
    """Published checkpoints, newest first."""
    return sorted(folder.glob("step-*"), reverse=True)


def _digest(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """The hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
