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
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from avlm.convert.weights import aside


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


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A whole checkpoint as it lies on disk."""

    folder: Path
    position: Position


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, position: Position, *, keep: int) -> None:
    """Write a checkpoint and remove those that are older than the last ``keep``.

    Raises:
        OSError: The disk is full or read-only; what was there before is untouched.
    """
    out = folder / f"step-{position.step:08d}"
    with aside(out) as writing:
        save_file(_weights(model), writing / "weights.safetensors")
        save_file(_moments(model, optimizer), writing / "optimizer.safetensors")
        hashes = {p.name: _sha256(p) for p in sorted(writing.glob("*.safetensors"))}
        state = {"position": asdict(position), "sha256": hashes}
        (writing / "state.json").write_text(json.dumps(state, indent=1))
    for old in _folders(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)


def newest(folder: Path, stage: str) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint of a stage.

    Returns:
        It, or None; and for each newer one that was passed over, a sentence that says why.
    """
    passed: list[str] = []
    for path in _folders(folder):
        try:
            state = json.loads((path / "state.json").read_text())
            position = Position(**state["position"])
            damaged = [name for name, digest in state["sha256"].items() if _sha256(path / name) != digest]
        except (OSError, ValueError, KeyError, TypeError) as error:
            passed.append(f"checkpoint {path.name} is not readable ({type(error).__name__}) and was passed over")
            continue
        if damaged:
            passed.append(
                f"checkpoint {path.name} is damaged ({', '.join(damaged)} changed since it was written) and was passed over"
            )
        elif position.stage == stage:
            return Checkpoint(path, position), passed
    return None, passed


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put weights and moments back, bit for bit."""
    weights = load_file(checkpoint.folder / "weights.safetensors")
    moments = load_file(checkpoint.folder / "optimizer.safetensors")
    targets = {**_trained(model), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, value in weights.items():
            targets[name].copy_(value)
    for name, parameter in _trained(model).items():
        found = {key.rpartition("|")[2]: value for key, value in moments.items() if key.rpartition("|")[0] == name}
        if found:
            optimizer.state[parameter] = {k: v.clone() for k, v in found.items()}


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _weights(model: nn.Module) -> dict[str, Tensor]:
    saved = model.state_dict().keys()
    buffers = {name: b for name, b in model.named_buffers() if name in saved}
    return {name: t.detach().contiguous() for name, t in {**_trained(model), **buffers}.items()}


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, parameter in _trained(model).items():
        state: dict[str, Any] = optimizer.state.get(parameter, {})
        found |= {f"{name}|{key}": value.contiguous() for key, value in state.items() if isinstance(value, Tensor)}
    return found


def _folders(folder: Path) -> list[Path]:
    """Published checkpoints, newest first."""
    return sorted(folder.glob("step-*"), reverse=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
