"""The order of the data, as a pure function of (seed, epoch, position).

Nothing is remembered and nothing is drawn while training: step k of a stage reads the
same samples whoever asks, so the state of the data is the number of steps done.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from avlm.config.media import VideoOrder
from avlm.config.run import Rows, Stage
from avlm.data.sources import RowFacts
from avlm.errors import ConfigError
from avlm.samples import MediaKind

SENSES: dict[Rows, MediaKind] = {"vision": "image", "audio": "audio"}
"""The sense of a stage that is for one sense alone."""

BOTH: frozenset[MediaKind] = frozenset({"image", "audio"})


def video_senses(hears: bool, order: VideoOrder) -> frozenset[MediaKind]:
    """What a model takes from a video: what it shows, what is heard in it, or both.

    Args:
        hears: Whether the model has an audio part.
        order: Its `video.order`.
    """
    if order == "audio":
        return frozenset({"audio"})
    return frozenset({"image"}) if order == "video" or not hears else BOTH


def own_kinds(stage: Stage, video: frozenset[MediaKind]) -> frozenset[MediaKind]:
    """Kinds of media that a stage for one sense takes as they are; none for a stage that is for all.

    Args:
        video: What the model takes from a video. An encoder that learns words by itself takes none.
    """
    sense = SENSES.get(stage.rows)
    if sense is None:
        return frozenset()
    return frozenset({sense, "video"}) if video == {sense} and stage.supervise != "words" else frozenset({sense})


def usable(facts: Sequence[RowFacts], stage: Stage, video: frozenset[MediaKind] = BOTH) -> list[int]:
    """Rows that a stage can learn from.

    Args:
        facts: Of all rows.
        stage: Its `rows` says which: ``vision`` takes rows with pictures and no sound, ``audio`` rows with sound and no
            pictures, ``text`` and ``any`` take all. Media that can be given in words count as words. If it names
            `tasks`, only rows of those.
        video: What the model takes from a video, which counts as just that.
    """
    own = own_kinds(stage, video)
    return [i for i, row in enumerate(facts) if _of_tasks(row, stage) and _of_senses(row, own)]


def _of_tasks(row: RowFacts, stage: Stage) -> bool:
    return not stage.tasks or row.task in stage.tasks


def _of_senses(row: RowFacts, own: frozenset[MediaKind]) -> bool:
    return not own or (bool(row.kinds & own) and row.kinds - row.told <= own)


def left_out(facts: Sequence[RowFacts], stage: Stage, video: frozenset[MediaKind] = BOTH) -> str | None:
    """How many rows a stage reads and how many it leaves out for what they hold; None if it leaves out none of them."""
    own = own_kinds(stage, video)
    out = [row for row in facts if _of_tasks(row, stage) and not _of_senses(row, own)]
    if not out:
        return None
    other, lacking = ("sound", "no picture") if stage.rows == "vision" else ("pictures", "no sound")
    strange = sum(bool(row.kinds - row.told - own) for row in out)
    reasons = [(strange, other), (len(out) - strange, lacking)]
    why = ", ".join(f"{count:,} {'holds' if count == 1 else 'hold'} {what}" for count, what in reasons if count)
    return f"{stage.name}: {len(stage_rows(facts, stage, video)):,} of {len(facts):,} rows; {why}"


def stage_rows(facts: Sequence[RowFacts], stage: Stage, video: frozenset[MediaKind] = BOTH) -> list[int]:
    """Rows of a stage.

    Args:
        video: What the model takes from a video.

    Raises:
        ConfigError: There is none.
    """
    found = [i for i in usable(facts, stage, video) if _taken(i, facts[i], stage)]
    if stage.loss == "distill":
        found = [i for i in found if facts[i].kinds]  # read in words, a row of words alone is already what it shall be
    if not found:
        film = " or a video" if "video" in own_kinds(stage, video) else ""
        wanted = {"vision": f" with a picture{film} and no sound", "audio": f" with a sound{film} and no picture"}.get(
            stage.rows, ""
        )
        if stage.loss == "distill" and not wanted:
            wanted = " with a picture, a sound or a video"
        if stage.tasks:
            tasks = sorted({row.task or "(none)" for row in facts})
            wanted += f" of the tasks {', '.join(stage.tasks)} (the data has {', '.join(tasks[:20])})"
        raise ConfigError(
            f"stage {stage.name} learns from rows{wanted}, and the data has none. "
            f"Add such rows, or give the stage its own with stages.{stage.name}.data"
        )
    return found


def untaken(facts: Sequence[RowFacts], stage: Stage) -> list[str]:
    """Tasks and sets of which a stage takes a share and the data has no row."""
    return sorted(set(stage.take) - {row.task for row in facts} - {row.set for row in facts})


def _taken(row: int, facts: RowFacts, stage: Stage) -> bool:
    """Whether a row is among the share of its task, or of its set, that the stage reads.

    Larger shares hold the smaller ones.
    """
    name = facts.task if facts.task in stage.take else facts.set
    return key(f"{name} {row}") < 2**32 * stage.take.get(name, 1.0)


def key(text: str) -> int:
    """A number for a name, the same on every machine."""
    return zlib.crc32(text.encode())


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, stage: str, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, key(stage), epoch]).permutation(count)


def positions(step: int, batch: int, count: int, *, seed: int, stage: str) -> list[tuple[int, int]]:
    """Which rows a step reads.

    Args:
        step: Number of the step in its stage, from 0.
        batch: Samples in a step.
        count: Rows of the stage.

    Returns:
        For each sample the row's number among the stage's rows, and the epoch. Each epoch reads every row once.
    """
    found = []
    for position in range(step * batch, (step + 1) * batch):
        epoch, at = divmod(position, count)
        found.append((int(_permutation(count, seed, stage, epoch)[at]), epoch))
    return found


def pack_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Distribute samples over rows of at most `capacity` tokens: best fit, longest first.

    Returns:
        Members of each row, each row in the order given. Every length must fit.

    Source:
        Best-fit-decreasing bin packing (Johnson, 1973).
    """
    assert all(length <= capacity for length in lengths), "a sample longer than a row was not left out"
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fits = [r for r in range(len(rows)) if room[r] >= lengths[i]]
        if fits:
            best = min(fits, key=lambda r: (room[r], r))
        else:
            best = len(rows)
            rows.append([])
            room.append(capacity)
        rows[best].append(i)
        room[best] -= lengths[i]
    return [sorted(row) for row in rows]
