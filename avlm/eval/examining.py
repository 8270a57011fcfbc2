"""The look-and-listen check as a run makes it in the middle of training.

Training stands below and cannot see this; whoever starts a run hands it over.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from avlm.config.run import RunConfig
from avlm.data.processor import AvlmProcessor
from avlm.errors import DataError
from avlm.eval.benchmarks import TaskReport, evaluate
from avlm.models.modeling import AvlmForConditionalGeneration
from avlm.samples import Sample
from avlm.training import chain

SENSES = {"looks": "image", "listens": "audio"}


def look_and_listen(
    model: AvlmForConditionalGeneration,
    processor: AvlmProcessor,
    samples: Sequence[Sample],
    *,
    max_tokens: int,
    seed: int,
) -> dict[str, Any]:
    """Score answers, and what is lost of the score with the pictures, or the sounds, of other rows.

    Returns:
        `accuracy` and `guess` over all rows; `looks` and `listens` over the tasks that have something to see, or hear;
        the same by task, as `tasks`. Nothing where no row can be asked.
    """
    try:
        report = evaluate(model, processor, samples, max_tokens=max_tokens, seed=seed)
    except DataError:
        return {}
    tasks = {name or "(none)": task for name, task in report.tasks.items()}
    line: dict[str, Any] = {
        name: _mean([(getattr(task, name), task.samples) for task in tasks.values()]) for name in ("accuracy", "guess")
    }
    for name, sense in SENSES.items():
        lost = [(_lost(task, sense), task.samples) for task in tasks.values() if sense in task.swapped]
        line |= {name: _mean(lost)} if lost else {}
    return {**line, "tasks": {name: _facts(task) for name, task in tasks.items()}}


def train(run: RunConfig, *, only: str | None = None) -> Path:
    """Train a run, or go on with it where it stopped; see `avlm.training.chain.train`.

    Args:
        run: Resolved settings.
        only: Train up to and with this stage.

    Returns:
        The published model directory.
    """
    return chain.train(run, only=only, examine=look_and_listen)


def _facts(task: TaskReport) -> dict[str, float]:
    lost = {name: _lost(task, sense) for name, sense in SENSES.items() if sense in task.swapped}
    return {"samples": task.samples, "accuracy": task.accuracy, "guess": task.guess, **lost}


def _lost(task: TaskReport, sense: str) -> float:
    return task.accuracy - task.swapped[sense]


def _mean(weighted: Sequence[tuple[float, int]]) -> float:
    return sum(value * weight for value, weight in weighted) / sum(weight for _, weight in weighted)
