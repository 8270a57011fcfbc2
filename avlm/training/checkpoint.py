"""Checkpoints on disk: whole or absent.

    step-00000120/
      weights.safetensors     what the stage has changed
      optimizer.safetensors   the optimizer's moments
      state.json              where the run was, whose it is, a hash of each file and of itself

Where weights are spread over processes, each of them writes files of its own: weights-00002-of-00004.safetensors. One
checkpoint is written aside and published by rename, by the first process when it has the hashes of all files. What is
published is looked at before it is used; what is damaged is named and passed over. Only safetensors and JSON.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from avlm.convert.weights import aside, sync
from avlm.training.shares import Shares, Stored, header
from avlm.training.snapshot import Tensors
from avlm.training.world import World, one_process


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
    files: tuple[str, ...]
    """Names of those that hold tensors."""
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
ALONE = one_process("cpu")
WEIGHTS, MOMENTS, STATE, TENSORS = "weights", "optimizer", "state.json", ".safetensors"
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
    shares: Shares | None = None,
    wanted: Callable[[], bool] = lambda: True,
) -> None:
    """Write a checkpoint; of those that are there, keep the last ``keep``, and the best ``keep_best`` of this stage.

    Args:
        tensors: On any device; in files they are the processor's.
        score: How good it is; higher is better. One without, or whose score is no number, is never among the best.
        passed_over: Names of checkpoints that are of no use, and go away once this one is there.
        shares: Where the tensors are this process's share of them: who writes the others, by `save_share`.
        wanted: Asked now and then; once it says no, nothing is published.

    Raises:
        OSError: The disk is full or read-only; what was there before is untouched.
    """
    out = folder / _name(position)
    with aside(out, shares.mark if shares else "") as writing:
        hashes = _write(tensors, writing, shares.suffix if shares else "", wanted)
        if shares is not None:
            hashes |= shares.collect(wanted)
        state = {
            "position": asdict(position),
            "score": None if score is None or math.isnan(score) else score,
            "owner": owner.facts,
            "sha256": hashes,
        }
        (writing / STATE).write_text(json.dumps({**state, "self": _digest(state)}, indent=1))
        _check(wanted, writing)
    _clear(folder, position, keep, keep_best, passed_over)


def save_share(
    folder: Path, tensors: Tensors, position: Position, shares: Shares, wanted: Callable[[], bool] = lambda: True
) -> None:
    """Write this process's share of a checkpoint that the first one publishes by `save`, and tell it so.

    Raises:
        OSError: The disk is full or read-only. The first process is told.
    """
    try:
        writing = aside(folder / _name(position), shares.mark).made()
        hashes = _write(tensors, writing, shares.suffix, wanted)
        for name in hashes:  # here, as no other machine can see to it
            sync(writing / name)
    except BaseException as error:
        shares.tell_failure(error)
        raise
    shares.tell(hashes)


def _write(tensors: Tensors, folder: Path, suffix: str, wanted: Callable[[], bool]) -> dict[str, str]:
    """Write a process's files; their hashes are returned, by name."""
    hashes: dict[str, str] = {}
    for kind, values in ((WEIGHTS, tensors.weights), (MOMENTS, tensors.moments)):
        path = folder / f"{kind}{suffix}{TENSORS}"
        save_tensors(values, path, None if tensors.places is None else header(values, tensors.places))
        _check(wanted, folder)
        hashes[path.name] = file_sha256(path)
    return hashes


def _check(wanted: Callable[[], bool], folder: Path) -> None:
    if not wanted():
        raise InterruptedError(f"{folder.name} is no longer wanted")


def save_tensors(tensors: Mapping[str, Tensor], path: Path, told: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors.

    Args:
        told: What the file's header tells besides.

    Raises:
        OSError: The disk is full or read-only. (safetensors has an error of its own for that.)
    """
    more: dict[str, Any] = {} if told is None else {"metadata": told}
    try:
        save_file({name: value.contiguous() for name, value in tensors.items()}, path, **more)
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


def remove_of(folder: Path, stages: Collection[str]) -> None:
    """Remove the checkpoints of some stages, and the folder if there are no others.

    Those stages are done, and a run was killed before it could.
    """
    for path in _folders(folder):
        if _told(path)[0] in stages:
            _remove(path)
    if stages and not _folders(folder):
        shutil.rmtree(folder, ignore_errors=True)


def stages_of(folder: Path) -> set[object]:
    """Stages that checkpoints are of; None among them where one does not say."""
    return {_told(path)[0] for path in _folders(folder)}


def _score(path: Path, stage: str) -> float | None:
    """What a checkpoint of a stage was worth; None where that cannot be known."""
    of, score = _told(path)
    return float(score) if of == stage and isinstance(score, (int, float)) else None


def _told(path: Path) -> tuple[object, object]:
    """A checkpoint's stage, and what it was worth; None of what cannot be known."""
    try:
        state = json.loads((path / STATE).read_bytes())
        return state["position"]["stage"], state.get("score")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None, None


# ---------------------------------------------------------------- reading


def newer_than(folder: Path, found: Checkpoint | None) -> frozenset[str]:
    """Names of the checkpoints that lie before one that was found, all of them if none was."""
    return frozenset(p.name for p in _folders(folder) if found is None or _number(p) > found.position.step)


def newest(
    folder: Path, stage: str, owner: Owner = NOBODY, world: World = ALONE
) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint of a stage. All processes of a world look together.

    Returns:
        It, or None; and for each newer one that was passed over, a sentence that says why.
    """
    passed: list[str] = []
    for name in world.gather([path.name for path in _folders(folder)])[0]:
        try:
            found = examine(folder / name, owner, world)
        except Damaged as error:
            passed.append(f"checkpoint {name} {error} and was passed over")
            continue
        if found.position.stage == stage:
            return found, passed
    return None, passed


def best(folder: Path, stage: str, owner: Owner = NOBODY, world: World = ALONE) -> Checkpoint | None:
    """The whole checkpoint of a stage with the best score, of several the newest; None where none has a score.

    All processes of a world look together.
    """
    scored = {path: score for path in _folders(folder) if (score := _score(path, stage)) is not None}
    order = sorted(scored, key=lambda path: (scored[path], _number(path)), reverse=True)
    for name in world.gather([path.name for path in order])[0]:
        try:
            return examine(folder / name, owner, world)
        except Damaged:
            continue
    return None


def examine(path: Path, owner: Owner = NOBODY, world: World = ALONE) -> Checkpoint:
    """Read where a checkpoint stands, after a look at every byte of it. Each process of a world looks at some files.

    Raises:
        Damaged: It is not what was written, or not the run's own; all of them say so.
    """
    state = world.gather(_read_state(path) if world.first else None)[0]
    if isinstance(state, str):
        raise Damaged(state)
    try:
        own = state.pop("self")
        position, hashes, facts = Position(**state["position"]), dict(state["sha256"]), state.get("owner", {})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"is not readable ({type(error).__name__})") from error
    if any(Path(name).name != name for name in hashes):
        raise Damaged("is not readable (files of other folders)")
    found = _hashes(path, sorted(hashes), world)
    lost = [name for name, digest in found.items() if digest is None]
    if lost:
        raise Damaged(f"lacks {', '.join(lost)}")
    damaged = [name for name, digest in found.items() if digest != hashes[name]]
    if own != _digest(state):
        damaged.append(STATE)
    if damaged:
        raise Damaged(f"is damaged ({', '.join(damaged)} changed since it was written)")
    if path.name != _name(position):
        raise Damaged(f"is {_name(position)} under another name")
    other = owner.differs(facts)
    if other is not None:
        raise Damaged(f"is another run's ({other})")
    return Checkpoint(path, position, tuple(found), state.get("score"))


def _read_state(path: Path) -> dict[str, Any] | str:
    """What a checkpoint says of itself, or what keeps it from that."""
    try:
        state = json.loads((path / STATE).read_bytes())
    except FileNotFoundError:
        return f"lacks {STATE}"
    except (OSError, ValueError) as error:
        return f"is not readable ({type(error).__name__})"
    return state if isinstance(state, dict) else "is not readable (it is no object)"


def _hashes(path: Path, names: Sequence[str], world: World) -> dict[str, str | None]:
    """The hash of each file, None of one that is not there. Processes share the work."""
    own = {name: _hash(path / name) for name in names[world.rank :: world.size]}
    found = {name: digest for part in world.gather(own) for name, digest in part.items()}
    return {name: found[name] for name in names}


def _hash(path: Path) -> str | None:
    try:
        return file_sha256(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        return type(error).__name__


def load(checkpoint: Checkpoint) -> Stored:
    """What a checkpoint holds, to be read by whoever needs it."""
    return Stored(checkpoint.folder, checkpoint.files)


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
