"""A timeline: what is heard, seen and typed when, and what is true of it. A file of JSON lines.

    {"at_s": 0, "image": "img/eval-3.png"}                                        the camera shows this from now on
    {"at_s": 1.25, "sound": "wav/t0-4.wav", "state": "question", "kind": "overlap", "says": "is it red"}
    {"at_s": 6, "text": "Describe the picture."}                                  somebody types

Sounds are added where they overlap. A sound whose `state` is left out is not judged (the
noise of the room). Paths are relative to the file. A WAV file is a timeline too: one sound.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

import numpy as np

from avlm.data.voice.drawing import KINDS, Draft, Drawer
from avlm.data.world.sounds import SAMPLE_RATE_HZ
from avlm.errors import DataError
from avlm.samples import State

LONGEST_S = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Moment:
    """One thing that happens. Exactly one of `sound`, `text` and `image` says what."""

    at_s: float
    sound: str = ""
    text: str = ""
    image: str = ""
    state: State = ""
    """Of a sound: whether it is meant for the model; empty: not judged."""
    kind: str = ""
    says: str = ""


def draw_timeline(drawer: Drawer, sounds: int) -> list[tuple[float, Draft | str]]:
    """What happens on a held-out timeline: pauses in seconds, each with what follows it, a sound or a typed text.

    An interruption begins right behind a typed question with a long answer, so that it ends within that.
    """
    found: list[tuple[float, Draft | str]] = []
    weights = (0.35, 0.3, 0.1, 0.25)
    for _ in range(sounds):
        kind = KINDS[int(drawer.rng.choice(len(KINDS), p=weights))]
        draft = drawer.draw(kind)
        pause_s = float(drawer.rng.uniform(1.2, 2.5))
        if kind == "interruption":
            found.append((pause_s, "Describe the picture."))
            pause_s = float(drawer.rng.uniform(0.1, 0.3))
        found.append((pause_s, draft))
    return found


def write_timeline(path: Path, moments: Sequence[Moment]) -> None:
    """Write a timeline, without what is left at its default."""
    defaults = Moment(0.0)
    lines = []
    for moment in moments:
        told = {k: v for k, v in asdict(moment).items() if k == "at_s" or v != getattr(defaults, k)}
        lines.append(json.dumps(told, ensure_ascii=False) + "\n")
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def read_timeline(path: Path) -> list[Moment]:
    """The moments of a timeline, in their order in time; a WAV file is one sound from its beginning.

    Raises:
        DataError: The file is missing, or a line is no moment.
    """
    if not path.is_file():
        raise DataError(f"{path}: there is no such file. Check the path")
    if path.suffix.lower() not in (".jsonl", ".json"):
        return [Moment(0.0, sound=path.name)]
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise DataError(f"{path} is not text in UTF-8, so it is no timeline. Give JSON lines, or a WAV file") from None
    moments = [_moment(line, f"{path} line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not moments:
        raise DataError(f"{path} has no moment in it, so nothing would happen. Write one JSON object a line")
    return sorted(moments, key=lambda moment: moment.at_s)


def _moment(line: str, where: str) -> Moment:
    try:
        given = json.loads(line)
    except ValueError as error:
        raise DataError(f"is not JSON ({error}). Write one object a line", where=where) from None
    if not isinstance(given, dict):
        raise DataError("is not an object. Write one object a line, with at_s", where=where)
    known = {field.name for field in fields(Moment)}
    for key, value in given.items():
        if key not in known:
            raise DataError(f"has {key}, which no moment has. There are {', '.join(sorted(known))}", where=where)
        if key != "at_s" and not isinstance(value, str):
            raise DataError(f"has {key}={json.dumps(value)}, which is not a text. Write it as one", where=where)
    _check(given, where)
    return Moment(**{**given, "at_s": float(given["at_s"])})


def _check(given: dict[str, Any], where: str) -> None:
    at_s = given.get("at_s")
    if isinstance(at_s, bool) or not isinstance(at_s, int | float) or not 0 <= at_s <= LONGEST_S:
        raise DataError(
            f"has at_s={json.dumps(at_s)}, which is no time on a timeline. Give seconds, from 0 to {LONGEST_S:g}",
            where=where,
        )
    things = [key for key in ("sound", "text", "image") if given.get(key)]
    if len(things) != 1:
        raise DataError(
            f"has {' and '.join(things) or 'nothing'} that happens, and one thing does. Give one of sound, text, image",
            where=where,
        )
    if given.get("state", "") not in get_args(State):
        raise DataError(f'has the state {json.dumps(given["state"])}. Use "question" or "noise"', where=where)


@dataclass(frozen=True, slots=True)
class Rendered:
    """A timeline as it is heard."""

    wave: np.ndarray
    """float32 [samples], 16 kHz."""
    spans: tuple[tuple[int, int], ...]
    """First sample and end of each moment; a moment that is no sound takes none."""


def render(moments: Sequence[Moment], sounds: Sequence[np.ndarray | None], tail_s: float = 2.0) -> Rendered:
    """All sounds of a timeline in one wave.

    Args:
        sounds: The waveform of each moment at 16 kHz; None where it is no sound.
        tail_s: Silence behind the last one, for what is still to be answered.
    """
    spans = []
    for moment, sound in zip(moments, sounds, strict=True):
        start = round(moment.at_s * SAMPLE_RATE_HZ)
        spans.append((start, start + (0 if sound is None else len(sound))))
    wave = np.zeros(max((end for _, end in spans), default=0) + math.ceil(tail_s * SAMPLE_RATE_HZ), np.float32)
    for (start, end), sound in zip(spans, sounds, strict=True):
        if sound is not None:
            wave[start:end] += sound
    return Rendered(wave.clip(-1, 1), tuple(spans))
