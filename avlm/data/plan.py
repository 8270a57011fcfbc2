"""The order of the data, as a pure function of (seed, epoch, position).

Nothing is remembered and nothing is drawn while training: step k of a stage reads the
same samples whoever asks, so the state of the data is the number of steps done.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from avlm.config.run import Rows, Stage
from avlm.data.sources import RowFacts
from avlm.errors import ConfigError
from avlm.samples import MediaKind

SENSES: dict[Rows, MediaKind] = {"vision": "image", "audio": "audio"}
"""The one kind of media that a stage for one sense takes as it is."""


def usable(facts: Sequence[RowFacts], rows: Rows, tasks: Sequence[str]) -> list[int]:
    """Rows that a stage can learn from.

    Args:
        facts: Of all rows.
        rows: ``vision`` takes rows with pictures and no sound, ``audio`` rows with sound and no pictures, ``text`` and
            ``any`` take all. A video counts as both; media that can be given in words count as words.
        tasks: If any, only rows of these tasks.
    """

    def fits(row: RowFacts) -> bool:
        if tasks and row.task not in tasks:
            return False
        sense = SENSES.get(rows)
        return sense is None or (sense in row.kinds and row.kinds - row.told <= {sense})

    return [i for i, row in enumerate(facts) if fits(row)]


def stage_rows(facts: Sequence[RowFacts], stage: Stage) -> list[int]:
    """Rows of a stage.

    Raises:
        ConfigError: There is none.
    """
    found = [i for i in usable(facts, stage.rows, stage.tasks) if _taken(i, facts[i], stage)]
    if stage.loss == "distill":
        found = [i for i in found if facts[i].kinds]  # read in words, a row of words alone is already what it shall be
    if not found:
        wanted = {"vision": " with a picture and no sound", "audio": " with a sound and no picture"}.get(stage.rows, "")
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
