"""Measurements of one stage: when they are due, which was the best, and whether the stage has learned what it can.

All state is in ``evals.jsonl``, which is cut back to the checkpoint that a run resumes from, so a run that was killed
anywhere ends its stages at the same steps as one that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, Literal

from rich.console import Console

from avlm.config.evaluate import Evaluate
from avlm.config.stage import Stage
from avlm.errors import ConfigError
from avlm.models.modeling import AvlmForConditionalGeneration
from avlm.training.console import tell
from avlm.training.heldout import Costs, HeldOut
from avlm.training.observe import Journal

When = Literal["before", "during", "after"]
Line = dict[str, Any]

OF_STAGES = ("loss", "preferred", "margin")
"""What one stage may have and the next one not."""


class Evaluation:
    """Measures a stage as it goes.

    Args:
        held_out: What it is measured on.
        journal: Where the lines go.
        first_step: Steps that earlier stages took.
        steps: Of the stage.
    """

    def __init__(
        self, stage: Stage, held_out: HeldOut, journal: Journal, first_step: int, steps: int, console: Console
    ) -> None:
        self.stage, self.held_out, self.settings = stage, held_out, held_out.settings
        self.journal, self.console = journal, console
        self.first_step, self.steps = first_step, steps
        self.lines: list[Line] = []
        """All of the run so far."""

    def resume(self) -> None:
        """Take up what was measured up to the step that the run goes on from."""
        self.lines = self.journal.measured()

    def due(self, step: int) -> bool:
        """Whether the stage is to be measured at a step in its middle."""
        every = self.settings.every
        return every is not None and 0 < step < self.steps and step % every == 0

    def measure(self, when: When, step: int, model: AvlmForConditionalGeneration, costs: Costs) -> None:
        """Measure, write it down and tell it.

        Raises:
            ConfigError: The metric that the run goes by is not among what was measured.
        """
        began = time.perf_counter()
        line: Line = {"step": self.first_step + step, "stage": self.stage.name, "stage_step": step, "when": when}
        line |= self.held_out.measure(model, costs)
        if "text_loss" in line:
            known = [old["text_loss"] for old in self.lines if "text_loss" in old]
            line["forgotten"] = line["text_loss"] - (known[0] if known else line["text_loss"])
        self._check(line)
        line["seconds"] = time.perf_counter() - began
        self.lines.append(line)
        if when != "after":
            best, since = self._standing()
            line["best"] = best is not None and best is self._own()[-1]
            line["stops"] = self._stops(since)
        self.journal.measurement(line)
        tell(self.console, self._told(line))

    def is_best(self, step: int) -> bool:
        """Whether nothing better was measured during the stage than at this step of it, its last so far."""
        during = [line for line in self._own() if line["when"] == "during"]
        best, _ = standing(during, self.settings)
        return best is None or best["stage_step"] == step

    def measured(self, step: int) -> bool:
        """Whether the stage has been measured at this step of it."""
        return any(line["stage_step"] == step for line in self._own())

    def ended(self) -> bool:
        """Whether the stage is to end before its last step, because it became no better for so long."""
        return any(line.get("stops") for line in self._own())

    def score(self) -> float | None:
        """How good the model was when it was measured last, the more the better; None where nothing tells."""
        own = self._own()
        value = value_of(own[-1], self.settings.metric) if own else None
        return value if value is None or self.settings.direction() == "max" else -value

    def _own(self) -> list[Line]:
        return [line for line in self.lines if line["stage"] == self.stage.name and line["when"] != "after"]

    def _standing(self) -> tuple[Line | None, int]:
        """The best measurement of the stage, and how many came after it."""
        return standing(self._own(), self.settings)

    def _stops(self, since: int) -> bool:
        patience = self.settings.patience
        return patience is not None and since >= patience

    def _check(self, line: Line) -> None:
        """Refuse a metric that this run never has. Parts that are being built need not have it, and of the stage's own
        losses there are none where no held-out row is for the stage."""
        metric = self.settings.metric
        if self.stage.builds is not None or metric in OF_STAGES or value_of(line, metric) is not None:
            return
        there = ", ".join(metrics_of(line)) or "nothing at all"
        raise ConfigError(
            f"evaluate.metric={metric}: stage {self.stage.name} was measured on the held-out rows and has no {metric}, "
            f"so nothing would tell which of its steps is best. It has {there}. Set evaluate.metric to what there is, "
            "or add rows to data.eval that give it"
        )

    def _told(self, line: Line) -> str:
        parts = _figures(line)
        if not parts:
            return f"{self.stage.name}: no held-out row is for this stage, so nothing is measured"
        best, _ = self._standing()
        if best is not None and line["when"] == "during":
            parts.append("the best so far" if line["best"] else f"best at step {best['stage_step']}")
        ends = "; no better for so long that the stage ends here" if line.get("stops") else ""
        return f"{self.stage.name}: held out at step {line['stage_step']}/{self.steps}: {'; '.join(parts)}{ends}"


def _figures(line: Line) -> list[str]:
    """What was measured, for people."""
    parts = []
    if "loss" in line:
        parts.append(f"loss {line['loss']:.4g}")
    if "text_loss" in line:
        grown = f" ({line['forgotten']:+.2g} since the run began)" if line["forgotten"] else ""
        parts.append(f"text loss {line['text_loss']:.4g}{grown}")
    if "preferred" in line:
        parts.append(f"{line['preferred']:.1%} of pairs told apart, margin {line['margin']:.3g}")
    if "accuracy" in line:
        parts.append(f"{line['accuracy']:.1%} right, {line['guess']:.1%} by guessing")
    lost = [
        f"{line[key]:.1%} by {name}" for key, name in (("looks", "looking"), ("listens", "listening")) if key in line
    ]
    return parts + ([", ".join(lost)] if lost else [])


def standing(lines: Sequence[Line], settings: Evaluate) -> tuple[Line | None, int]:
    """The first of the best measurements, and how many came after it; None and 0 where none has the metric."""
    best, since = None, 0
    for line in lines:
        value = value_of(line, settings.metric)
        if value is None:
            continue
        if best is None or settings.better(value, value_of(best, settings.metric) or 0.0):
            best, since = line, 0
        else:
            since += 1
    return best, since


def value_of(line: Line, metric: str) -> float | None:
    """A metric of a measurement by its dotted name; None where it has none that is a number."""
    first, _, rest = metric.partition(".")
    value: object = line.get(first)
    if rest:
        task, _, score = rest.rpartition(".")
        inner = value.get(task) if isinstance(value, dict) else None
        value = inner.get(score) if isinstance(inner, dict) else None
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def metrics_of(line: Line) -> list[str]:
    """Every metric that a measurement has."""
    names = ("loss", "text_loss", "forgotten", "accuracy", "looks", "listens", "preferred", "margin")
    tasks = line.get("tasks", {})
    of_tasks = [
        f"tasks.{task}.{name}" for task in tasks for name in ("accuracy", "looks", "listens") if name in tasks[task]
    ]
    return [name for name in names if name in line] + of_tasks
