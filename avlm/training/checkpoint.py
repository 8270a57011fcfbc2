"""Checkpoints on disk: whole or absent.

    step-00000120/
      weights.safetensors     what the stage has changed
      optimizer.safetensors   the optimizer's moments
      state.json              where the run was, whose it is, a hash of each file and of itself

One is written aside and published by rename. What is published is looked at before it is
used; what is damaged is named and passed over. Only safetensors and JSON.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from avlm.convert.weights import aside
from avlm.training.snapshot import Tensors


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
    seen: int = 0
    """Samples looked at so far in this stage, good and bad."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A whole checkpoint as it lies on disk."""

    folder: Path
    position: Position
    score: float | None = None
    """How good it was found to be; higher is better."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose a checkpoint is: what a run's weights follow from."""

    facts: Mapping[str, Any]
    """Written into each checkpoint; plain JSON."""
    differs: Callable[[Any], str | None]
    """Says of the facts of a checkpoint what is not the run's own, if anything."""


NOBODY = Owner({}, lambda facts: None)
"""Any checkpoint will do."""
WEIGHTS, MOMENTS, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"
FILES = (MOMENTS, WEIGHTS)
_NAME = re.compile(r"step-(\d{8,})")


class Damaged(ValueError):  # noqa: N818 - an adjective, as it is told
    """A checkpoint is not what was written; the message says in what."""


# ---------------------------------------------------------------- writing


def save(
    folder: Path,
    tensors: Tensors,
    position: Position,
    *,
    keep: int,
    keep_best: int = 0,
    score: float | None = None,
    owner: Owner = NOBODY,
    passed_over: Collection[str] = (),
    wanted: Callable[[], bool] = lambda: True,
) -> None:
    """Write a checkpoint; of those that are there, keep the last ``keep``, and the best ``keep_best`` of this stage.

    Args:
        tensors: On any device; in files they are the processor's.
        score: How good it is; higher is better. One without, or whose score is no number, is never among the best.
        passed_over: Names of checkpoints that are of no use, and go away once this one is there.
        wanted: Asked now and then; once it says no, nothing is published.

    Args:
        writes: Whether this process is the one that writes. Where weights are spread over several, all take part.

    Raises:
        OSError: The disk is full or read-only; what was there before is untouched.
    """
    out = folder / _name(position)
    with aside(out) as writing:
        for name, values in ((WEIGHTS, tensors.weights), (MOMENTS, tensors.moments)):
            save_tensors(values, writing / name)
            if not wanted():
                raise InterruptedError(f"{out.name} is no longer wanted")
        state = {
            "position": asdict(position),
            "score": None if score is None or math.isnan(score) else score,
            "owner": owner.facts,
            "sha256": {name: file_sha256(writing / name) for name in FILES},
        }
        (writing / STATE).write_text(json.dumps({**state, "self": _digest(state)}, indent=1))
        if not wanted():
            raise InterruptedError(f"{out.name} is no longer wanted")
    _clear(folder, position, keep, keep_best, passed_over)


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors as safetensors.

    Raises:
        OSError: The disk is full or read-only. (safetensors has an error of its own for that.)
    """
    try:
        save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise OSError(str(error)) from error
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def _clear(folder: Path, position: Position, keep: int, keep_best: int, passed_over: Collection[str]) -> None:
    """Remove what need not be kept beside the checkpoint that was just written."""
    just = _name(position)
    found = _folders(folder)
    # What is newer is of no use either, or this run would have gone on from there.
    older = [path for path in found if _number(path) <= position.step and path.name not in {*passed_over} - {just}]
    scored = {path: score for path in older if (score := _score(path, position.stage)) is not None}
    best = sorted(scored, key=lambda path: (scored[path], _number(path)), reverse=True)[:keep_best]
    kept = {just, *(path.name for path in [*older[:keep], *best])}
    for path in found:
        if path.name not in kept:
            _remove(path)
    for path in folder.glob(".step-*"):  # half of one, left by a run that was killed
        shutil.rmtree(path, ignore_errors=True)


def _remove(path: Path) -> None:
    """Remove a checkpoint so that no half of it is ever seen."""
    gone = path.with_name(f".{path.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    try:
        path.rename(gone)
    except OSError:
        return  # it stays whole, and is tried again at the next
    shutil.rmtree(gone, ignore_errors=True)


def _score(path: Path, stage: str) -> float | None:
    """What a checkpoint of a stage was worth; None where that cannot be known."""
    try:
        state = json.loads((path / STATE).read_bytes())
        of, score = state["position"]["stage"], state.get("score")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return float(score) if of == stage and isinstance(score, (int, float)) else None


# ---------------------------------------------------------------- reading


def newer_than(folder: Path, found: Checkpoint | None) -> frozenset[str]:
    """Names of the checkpoints that lie before one that was found, all of them if none was."""
    return frozenset(p.name for p in _folders(folder) if found is None or _number(p) > found.position.step)


def newest(folder: Path, stage: str, owner: Owner = NOBODY) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint of a stage.

    Returns:
        It, or None; and for each newer one that was passed over, a sentence that says why.
    """
    passed: list[str] = []
    for path in _folders(folder):
        try:
            found = examine(path, owner)
        except Damaged as error:
            passed.append(f"checkpoint {path.name} {error} and was passed over")
            continue
        if found.position.stage == stage:
            return found, passed
    return None, passed


def best(folder: Path, stage: str, owner: Owner = NOBODY) -> Checkpoint | None:
    """The whole checkpoint of a stage with the best score, of several the newest; None where none has a score."""
    scored = {path: score for path in _folders(folder) if (score := _score(path, stage)) is not None}
    for path in sorted(scored, key=lambda path: (scored[path], _number(path)), reverse=True):
        try:
            return examine(path, owner)
        except Damaged:
            continue
    return None


def examine(path: Path, owner: Owner = NOBODY) -> Checkpoint:
    """Read where a checkpoint stands, after a look at every byte of it.

    Raises:
        Damaged: It is not what was written, or not the run's own.
    """
    try:
        state = json.loads((path / STATE).read_bytes())
        own = state.pop("self")
        position, hashes, facts = Position(**state["position"]), state["sha256"], state.get("owner", {})
        found = {name: file_sha256(path / name) if (path / name).is_file() else None for name in FILES}
        damaged = [name for name, digest in found.items() if digest is not None and digest != hashes[name]]
    except FileNotFoundError as error:
        raise Damaged(f"lacks {Path(error.filename).name}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"is not readable ({type(error).__name__})") from error
    if own != _digest(state):
        damaged.append(STATE)
    lost = [name for name, digest in found.items() if digest is None]
    if lost:
        raise Damaged(f"lacks {', '.join(lost)}")
    if damaged:
        raise Damaged(f"is damaged ({', '.join(damaged)} changed since it was written)")
    if path.name != _name(position):
        raise Damaged(f"is {_name(position)} under another name")
    other = owner.differs(facts)
    if other is not None:
        raise Damaged(f"is another run's ({other})")
    return Checkpoint(path, position, state.get("score"))


def load(checkpoint: Checkpoint) -> Tensors:
    """What a checkpoint holds, in the processor's memory."""
    return Tensors(load_file(checkpoint.folder / WEIGHTS), load_file(checkpoint.folder / MOMENTS))


# ---------------------------------------------------------------- names and hashes


def _name(position: Position) -> str:
    return f"step-{position.step:08d}"


def _number(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None, "only folders that are named so are listed"
    return int(match[1])


def _folders(folder: Path) -> list[Path]:
    """Published checkpoints, newest first. Folders with other names are somebody else's, and left alone."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=_number, reverse=True)


def _digest(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """The hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
