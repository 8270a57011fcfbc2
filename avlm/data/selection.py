"""Which rows of its data a stage learns from.

A stage for one sense takes rows with media of that sense alone; it may be for some tasks, and take a share of one.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from avlm.config.media import VideoOrder
from avlm.config.stage import Rows, Stage
from avlm.data.planning.plan import key
from avlm.data.rows import RowFacts, RowTable, bits
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


def usable(facts: Iterable[RowFacts], stage: Stage, video: frozenset[MediaKind] = BOTH) -> list[int]:
    """Rows that a stage can learn from.

    Args:
        facts: Of all rows.
        stage: Its `rows` says which: ``vision`` takes rows with pictures and no sound, ``audio`` rows with sound and no
            pictures, ``text`` and ``any`` take all. Media that can be given in words count as words. If it names
            `tasks`, only rows of those.
        video: What the model takes from a video, which counts as just that.
    """
    table = _table(facts)
    found: list[int] = np.flatnonzero(_of_tasks(table, stage) & _of_senses(table, own_kinds(stage, video))).tolist()
    return found


def _table(facts: Iterable[RowFacts]) -> RowTable:
    return facts if isinstance(facts, RowTable) else RowTable(facts)


def _of_tasks(table: RowTable, stage: Stage) -> np.ndarray:
    if not stage.tasks:
        return np.ones(len(table), bool)
    return np.isin(table.task, [i for i, name in enumerate(table.tasks) if name in stage.tasks])


def _of_senses(table: RowTable, own: frozenset[MediaKind]) -> np.ndarray:
    if not own:
        return np.ones(len(table), bool)
    of_one: np.ndarray = (table.kinds & bits(own) != 0) & ~_strange(table, own)
    return of_one


def _strange(table: RowTable, own: frozenset[MediaKind]) -> np.ndarray:
    """Rows with media of another sense that words cannot stand in for."""
    strange: np.ndarray = table.kinds & ~table.told & ~np.uint8(bits(own)) != 0
    return strange


def left_out(facts: Iterable[RowFacts], stage: Stage, video: frozenset[MediaKind] = BOTH) -> str | None:
    """How many rows a stage reads and how many it leaves out for what they hold; None if it leaves out none of them."""
    table, own = _table(facts), own_kinds(stage, video)
    out = _of_tasks(table, stage) & ~_of_senses(table, own)
    if not out.any():
        return None
    other, lacking = ("sound", "no picture") if stage.rows == "vision" else ("pictures", "no sound")
    strange = int((out & _strange(table, own)).sum())
    reasons = [(strange, other), (int(out.sum()) - strange, lacking)]
    why = ", ".join(f"{count:,} {'holds' if count == 1 else 'hold'} {what}" for count, what in reasons if count)
    return f"{stage.name}: {len(stage_rows(table, stage, video)):,} of {len(table):,} rows; {why}"


def stage_rows(facts: Iterable[RowFacts], stage: Stage, video: frozenset[MediaKind] = BOTH) -> list[int]:
    """Rows of a stage.

    Args:
        video: What the model takes from a video.

    Raises:
        ConfigError: There is none.
    """
    table = _table(facts)
    found = _taken(table, usable(table, stage, video), stage)
    if stage.loss == "distill":
        kinds = table.kinds
        found = [i for i in found if kinds[i]]  # read in words, a row of words alone is already what it shall be
    if stage.loss == "dpo":
        pair = table.pair
        found = [i for i in found if pair[i]]
    if not found:
        film = " or a video" if "video" in own_kinds(stage, video) else ""
        wanted = {"vision": f" with a picture{film} and no sound", "audio": f" with a sound{film} and no picture"}.get(
            stage.rows, ""
        )
        if stage.loss == "distill" and not wanted:
            wanted = " with a picture, a sound or a video"
        if stage.loss == "dpo":
            wanted += " with two answers (chosen and rejected)"
        if stage.tasks:
            tasks = sorted(task or "(none)" for task in table.tasks)
            wanted += f" of the tasks {', '.join(stage.tasks)} (the data has {', '.join(tasks[:20])})"
        raise ConfigError(
            f"stage {stage.name} learns from rows{wanted}, and the data has none. "
            f"Add such rows, or give the stage its own with stages.{stage.name}.data"
        )
    return found


def unmet(
    facts: Iterable[RowFacts], stage: Stage, video: frozenset[MediaKind] = BOTH, steps: int | None = None
) -> list[str]:
    """What is to be told of names that a stage has for rows, and that no row of its data answers to.

    Args:
        steps: Of the stage, where that is known: it may be over before it has read anything but what it begins with.

    Raises:
        ConfigError: The stage has no row.
    """
    table = _table(facts)
    told = []
    strangers = sorted(set(stage.take) - set(table.tasks) - set(table.sets))
    if strangers:
        told.append(
            f"{stage.name}: no row has the task or set {', '.join(strangers)}, of which stages.{stage.name}.take names "
            "a share. Correct the name, or leave it out"
        )
    if stage.first is None:
        return told
    rows = stage_rows(table, stage, video)
    of_rows = [(table.tasks, table.task[rows]), (table.sets, table.set[rows])]
    there = {names[number] for names, numbers in of_rows for number in np.unique(numbers).tolist() if number >= 0}
    absent = sorted(set(stage.first.of) - there)
    any_there = len(absent) < len(set(stage.first.of))
    if absent:
        instead = "the others" if any_there else "all rows"
        told.append(
            f"{stage.name}: no row that it reads has the task or set {', '.join(absent)}, which "
            f"stages.{stage.name}.first.of names, so it begins with {instead}. Correct the name, or leave it out"
        )
    if any_there and steps is not None and steps <= stage.first.steps:
        told.append(
            f"{stage.name}: all its {steps:,} steps read the rows of stages.{stage.name}.first alone, which lasts "
            f"{stage.first.steps:,}. Give the stage more steps, or what it begins with fewer"
        )
    return told


def _taken(table: RowTable, rows: list[int], stage: Stage) -> list[int]:
    """Those of some rows that are among the share of their task, or of their set, that the stage reads.

    Larger shares hold the smaller ones.
    """
    if not stage.take:
        return rows
    return [row for row in rows if _in_share(row, table[row], stage)]


def _in_share(row: int, facts: RowFacts, stage: Stage) -> bool:
    name = facts.task if facts.task in stage.take else facts.set
    return key(f"{name} {row}") < 2**32 * stage.take.get(name, 1.0)
