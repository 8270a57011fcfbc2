"""What a run looks out for, what it counts, and who else is told."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from avlm.config.base import Settings

Tracker = Literal["tensorboard", "wandb", "mlflow"]
"""Who else is told of every step."""


class WatchConfig(Settings):
    """What a run does when something goes wrong in it."""

    nonfinite: Literal["stop", "skip"] = "stop"
    """When the loss or the gradient is no number: stop, or leave that update out. Either way the step is computed once
    more to find the module and the samples where it began."""
    max_skipped: int = Field(10, ge=1)
    """With `skip`: so many updates left out one after the other stop the run."""
    spike: float | None = Field(10.0, gt=0)
    """A loss that is so many deviations above those before it is told of, with its samples; null: none is. A deviation
    is the median one from the median, times 1.4826: the standard deviation, where losses are normal."""
    spike_rise: float = Field(0.1, ge=0)
    """And that is at least so much above their median: where a loss is nearly zero, most samples that are not learned
    yet stand many deviations out and cost nothing."""
    spike_window: int = Field(64, ge=8)
    """Steps that a loss is compared with. Nothing is told before there are half as many."""
    stall_s: float | None = Field(900.0, gt=0)
    """Without a step for so many seconds, the run tells what it waits for and where each thread stands; null: never."""
    stall: Literal["wait", "stop"] = "wait"
    """What follows: going on waiting, or the end of the process with status 1."""


class CountConfig(Settings):
    """What is counted beside the loss."""

    flops: bool = True
    """Floating-point operations of each step, and the share of what the device's matrix products can do."""
    peak_tflops: float | None = Field(None, gt=0)
    """What the device can do, in 10^12 operations a second; default: measured when a run begins."""
    every: int | None = Field(10, ge=1)
    """Steps between two looks at memory, and at the gradient and the update of each part; null: never."""


class ProfileSteps(Settings):
    """Steps that torch's profiler records, as `metrics.jsonl` counts them, both included."""

    first: int = Field(ge=1)
    last: int = Field(ge=1)

    @model_validator(mode="after")
    def _in_order(self) -> ProfileSteps:
        if self.last < self.first:
            raise ValueError(
                f"first={self.first} and last={self.last}, so no step would be recorded. "
                f"Set last to {self.first} or more"
            )
        return self
