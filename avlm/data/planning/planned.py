"""The plan of a stage: which rows it reads of its sources, and when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from avlm.config.data import DataConfig
from avlm.config.stage import Stage
from avlm.data.planning.led import Led, StagePlan
from avlm.data.planning.plan import Column, Measures, Plan
from avlm.data.planning.shuffle import Ints
from avlm.data.readers.joined import JoinedSource
from avlm.data.rows import RowSource


def plan_of(
    source: RowSource,
    rows: Sequence[int] | Ints,
    stage: Stage,
    data: DataConfig,
    seed: int,
    measures: Measures | None = None,
) -> StagePlan:
    """The plan of a stage.

    Args:
        source: What the stage reads, a `JoinedSource` or any other.
        rows: Which of its rows the stage reads, ascending.
        data: Settings of the run's data.
        seed: Of the run.
        measures: Of all rows of the source, as its index has them.

    Raises:
        ConfigError: The order or the packs need measures, and there are none.
    """
    taken = np.asarray(rows, np.int64)
    leading = _leading(source, taken, stage)
    if stage.first is None or not len(leading):
        return _plan(source, taken, stage, data, seed, measures)
    ahead = stage.model_copy(update={"steps": stage.first.steps, "epochs": None})
    opening = _plan(source, taken[leading], ahead, data, seed, measures, draws=" first")
    few = None if measures is None else _of_rows(measures, taken[leading])
    had = stage.first.steps * _in_a_step(stage, len(leading), few)
    then = _plan(source, taken, _behind(stage, had, len(taken)), data, seed, measures)
    return Led(opening, leading, stage.first.steps, then, (f"stages.{stage.name}.first", str(stage.first)))


def _behind(stage: Stage, had: int, count: int) -> Stage:
    """What is left of a stage behind what it begins with.

    Args:
        had: Samples that it begins with, nearly.
        count: All of its rows.
    """
    assert stage.first is not None
    if stage.steps is not None:
        return stage.model_copy(update={"steps": max(1, stage.steps - stage.first.steps)})
    assert stage.epochs is not None
    return stage.model_copy(update={"epochs": max(1, stage.epochs * count - had) / count})


def _plan(
    source: RowSource,
    taken: Ints,
    stage: Stage,
    data: DataConfig,
    seed: int,
    measures: Measures | None,
    draws: str = "",
) -> Plan:
    """The plan of some rows of a source."""
    sizes, weights = [len(taken)], None
    sources: Mapping[str, str] = {source.name: source.fingerprint()}
    if isinstance(source, JoinedSource):
        sizes = np.diff(taken.searchsorted(source.starts)).tolist()
        weights, sources = source.weights, source.fingerprints()
    if measures is not None and measures.known_by:
        sources = {**sources, f"the index of {source.name}": measures.known_by}
    mine = None if measures is None else _of_rows(measures, taken)
    span = None if mine is None or data.order != "curriculum" else _climb(stage, len(taken), mine)
    return Plan(
        sizes, mine, seed=seed, stage=stage, order=data.order, weights=weights, span=span, sources=sources, draws=draws
    )


def _leading(source: RowSource, rows: Ints, stage: Stage) -> Ints:
    """Which of a stage's rows it begins with, by their numbers among them; none where it begins with all."""
    if stage.first is None:
        return np.empty(0, np.int64)
    table, names = source.facts, stage.first.of
    of_task = np.isin(table.task, [i for i, name in enumerate(table.tasks) if name in names])
    of_set = np.isin(table.set, [i for i, name in enumerate(table.sets) if name in names])
    return np.flatnonzero((of_task | of_set)[rows])


class _Taken:
    """Some rows of a column, numbered anew."""

    def __init__(self, column: Column, rows: Ints) -> None:
        self.column, self.rows = column, rows

    def __getitem__(self, rows: Ints) -> np.ndarray:
        return np.asarray(self.column[self.rows[rows]])


def _of_rows(measures: Measures, rows: Ints) -> Measures:
    columns = (measures.tokens, measures.cost, measures.tiles, measures.frames)
    tokens, cost, tiles, frames = (None if column is None else _Taken(column, rows) for column in columns)
    assert tokens is not None
    return Measures(tokens, cost, tiles, frames)


def _climb(stage: Stage, count: int, measures: Measures) -> int:
    """Places over which a curriculum climbs: as many as the stage reads; whole epochs if it stops right behind them."""
    if stage.epochs is not None:
        return max(1, round(stage.epochs * count))
    assert stage.steps is not None
    batch = _in_a_step(stage, count, measures)
    # Rows are not quite full, and those looked at are some only.
    slack = batch - 1 if stage.batch_rows is None else max(batch, count // 32)
    epochs = max(1, round(stage.steps * batch / count))
    return epochs * count if abs(stage.steps * batch - epochs * count) <= slack else stage.steps * batch


def _in_a_step(stage: Stage, count: int, measures: Measures | None) -> int:
    """Samples of a step; of packed rows as many as full ones would hold."""
    if stage.batch_rows is None or measures is None:
        return stage.batch_samples
    some = np.asarray(measures.tokens[np.linspace(0, count - 1, min(count, 65_536)).astype(np.int64)])
    return max(1, stage.batch_rows * stage.row_tokens * len(some) // max(1, int(some.sum())))
