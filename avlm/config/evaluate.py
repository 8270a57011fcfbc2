"""How a run is measured on held-out rows as it goes, and when a stage has learned what it can."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from avlm.config.base import Settings

LESS_IS_BETTER = ("loss", "text_loss", "forgotten")
MORE_IS_BETTER = ("accuracy", "looks", "listens", "margin", "preferred")
OF_TASKS = re.compile(r"tasks\..+\.(accuracy|looks|listens)")


class Evaluate(Settings):
    """Held-out rows are measured before, during and after each stage; a line each time in `evals.jsonl`.

    What is measured: `loss`, the mean over the target tokens of rows that the stage could learn from; `text_loss`, the
    same over rows of text alone, and `forgotten`, by how much that has grown since the run began; `accuracy` of the
    model's answers, and `looks` and `listens`, what of it is lost with the pictures, or the sounds, of other rows. For
    one task `tasks.NAME.accuracy` and so on. In a stage with loss=dpo also `preferred` and `margin`.
    """

    every: int | None = Field(None, ge=1)
    """Steps between two measurements during a stage; null: before and after it only."""
    rows: int = Field(64, ge=1)
    """Of the held-out rows at most so many, evenly spread, the same ones every time; of those of text as many again."""
    answers: int = Field(64, ge=0)
    """So many of them are answered, with their own media and with those of others; 0 asks for none."""
    max_tokens: int = Field(64, ge=1)
    """Longest answer."""
    text: str | None = None
    """Rows of text for `text_loss`; default: those of `data.eval` that have no media."""
    metric: str = "loss"
    """What tells how good the model is."""
    goal: Literal["max", "min"] | None = None
    """Whether more or less of it is better; default: less of a loss, more of a score."""
    patience: int | None = Field(None, ge=1)
    """A stage ends early when so many measurements in a row, after the first, brought nothing better; null: never."""
    leave: Literal["last", "best"] = "last"
    """Which weights a stage leaves: its last, or the best of those that were measured; they are kept for that."""

    @field_validator("metric")
    @classmethod
    def _is_known(cls, metric: str) -> str:
        known = (*LESS_IS_BETTER, *MORE_IS_BETTER)
        if metric not in known and not OF_TASKS.fullmatch(metric):
            raise ValueError(
                f"{metric!r} is nothing that is measured. Choose {', '.join(known)}, or of one task "
                "tasks.NAME.accuracy, tasks.NAME.looks or tasks.NAME.listens"
            )
        return metric

    @model_validator(mode="after")
    def _is_measured(self) -> Evaluate:
        if self.answers == 0 and self.of_answers():
            raise ValueError(
                f"metric={self.metric} is a score of answers, and with answers=0 none are asked for. "
                "Set answers to how many, or metric=loss"
            )
        if self.patience is not None and self.every is None:
            raise ValueError(
                f"patience={self.patience} counts measurements during a stage, and with every=null there are none. "
                "Set every to the steps between two, or patience=null"
            )
        if self.leave == "best" and self.every is None:
            raise ValueError(
                "leave=best chooses among the measurements during a stage, and with every=null there are none. "
                "Set every to the steps between two, or leave=last"
            )
        return self

    def of_answers(self) -> bool:
        """Whether the metric is a score of answers."""
        return self.metric not in (*LESS_IS_BETTER, "margin", "preferred")

    def better(self, new: float, old: float) -> bool:
        """Whether a value of the metric is better than another."""
        return new > old if self.direction() == "max" else new < old

    def direction(self) -> Literal["max", "min"]:
        """The goal, given or that of the metric."""
        return self.goal or ("min" if self.metric in LESS_IS_BETTER else "max")
