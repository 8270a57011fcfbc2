"""All that is counted of a stage's steps beside their losses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from avlm.config.run import RunConfig
from avlm.data.loader import StepData
from avlm.models.modeling import AvlmForConditionalGeneration
from avlm.samples import Row
from avlm.training.counting.flops import StepFlops
from avlm.training.counting.parts import PartFacts, measured_update
from avlm.training.counting.peak import matrix_peak
from avlm.training.counting.profiling import StepProfile
from avlm.training.counting.trackers import Trackers
from avlm.training.observe import StepMetrics
from avlm.training.totals import Totals


class Gauges:
    """Counts the steps of one stage.

    Args:
        run: What to count.
        model: What is trained.
        head: A throwaway layer beside it, if the stage has one.
        optimizer: Of the stage.
        out: The run's directory.
        trackers: Who else is told of each step.
    """

    def __init__(
        self,
        run: RunConfig,
        model: AvlmForConditionalGeneration,
        head: nn.Module | None,
        optimizer: torch.optim.Optimizer,
        out: Path,
        trackers: Trackers | None = None,
    ) -> None:
        self.config, self.model, self.reads = run.count, model, head is None
        self.optimizer, self.out = optimizer, out
        self.trackers = trackers or Trackers()
        self.flops = StepFlops(model, head) if run.count.flops else None
        self.profile = StepProfile(run.profile, out / "profile")
        self._at = 0
        """The step of the run that is next."""
        self._peak: float | None = None
        self._parts: PartFacts | None = None

    @contextmanager
    def running(self, next_step: int) -> Iterator[None]:
        """Record and count while the stage trains, from this step of the run on."""
        self._at = next_step
        self.profile.before(next_step)
        try:
            yield
        finally:
            self.profile.end(self._at - 1)
            if self.flops is not None:
                self.flops.close()

    def row(self, row: Row) -> AbstractContextManager[None]:
        """Count the operations of a row while the block computes its losses."""
        return nullcontext() if self.flops is None else self.flops.row(row)

    def encoding(self) -> AbstractContextManager[None]:
        """Count the operations of encoding media apart from their rows, while the block does that."""
        return nullcontext() if self.flops is None else self.flops.encoding()

    @contextmanager
    def update(self, stage_step: int, norm: float) -> Iterator[None]:
        """Look at the parts now and then while the block makes an update.

        Args:
            stage_step: From 0.
            norm: Of the gradient before it was clipped.
        """
        if self.config.every is None or stage_step % self.config.every:
            yield
            return
        with measured_update(self.optimizer, self.model, norm) as self._parts:
            yield

    def facts(self, data: StepData, whole: Totals, seconds: float) -> dict[str, Any]:
        """What a step's line tells besides.

        Args:
            data: What this process read of the step.
            whole: What all of them did.
            seconds: That the whole step took.
        """
        parts, self._parts = self._parts, None
        seconds = max(1e-9, seconds)
        found: dict[str, Any] = {
            "samples_per_s": whole.samples / seconds,
            "target_tokens_per_s": whole.targets / seconds,
            "padding": self._padding(data) if self.reads else None,
        }
        if self.flops is not None:
            speed = self.flops.take() / seconds
            found |= {"tflops_per_s": speed / 1e12, "mfu": speed / self.peak()}
        return found if parts is None else {**found, **asdict(parts)}

    def told(self, metrics: StepMetrics) -> None:
        """Pass a step's line on, and begin or end a recording behind it."""
        self.trackers.step({name: value for name, value in asdict(metrics).items() if value is not None})
        self.profile.after(metrics.step)
        self._at = metrics.step + 1
        self.profile.before(self._at)

    def peak(self) -> float:
        """Operations a second that the device can do, from the settings or measured at the first step."""
        if self._peak is None:
            given = self.config.peak_tflops
            device, dtype = self.model.device, self.model.dtype
            self._peak = given * 1e12 if given else matrix_peak(device, dtype, self.out / ".peak.json")
        return self._peak

    def _padding(self, data: StepData) -> float:
        """Share of places without a token, where rows are laid out as padded batches."""
        if self.model.model.packs_rows:
            return 0.0
        places = sum(len(row.lengths) * max(row.lengths) for row in data.rows)
        return 1 - data.num_tokens() / places if places else 0.0
