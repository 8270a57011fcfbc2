"""The loop of one stage, start to end in one place."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from avlm.config.run import RunConfig, Stage
from avlm.data.loader import StepData, StepLoader
from avlm.data.plan import key
from avlm.data.processor import AvlmProcessor
from avlm.errors import DataError
from avlm.models.modeling import AvlmForConditionalGeneration
from avlm.samples import Sample
from avlm.training import checkpoint
from avlm.training.checkpoint import Position
from avlm.training.loss import row_loss
from avlm.training.observe import Journal, StepMetrics, answer_prompts, bar
from avlm.training.stages import lora_config, make_optimizer, merge_adapters, prepare, rate, save_adapters, set_modes


class Trainer:
    """Trains one stage of a run, from its beginning or from its newest checkpoint.

    Args:
        run: The whole run's settings.
        stage: The stage.
        model, processor: What the stage begins with; the model is changed in place.
        loader: The stage's data.
        prompts: Held-out samples whose answers are written down as training goes.
        out: The run's directory.
        first_step: Steps that earlier stages took.
        console: Where progress is shown.
        on_step: Called after each step; for tests that stop a run in the middle.
    """

    def __init__(
        self,
        run: RunConfig,
        stage: Stage,
        model: AvlmForConditionalGeneration,
        processor: AvlmProcessor,
        loader: StepLoader,
        prompts: Sequence[Sample],
        out: Path,
        first_step: int,
        console: Console,
        on_step: Callable[[StepMetrics], None] | None = None,
    ) -> None:
        self.run, self.stage = run, stage
        self.model, self.processor = model, processor
        self.loader, self.prompts = loader, prompts
        self.folder = out / "checkpoints"
        self.first_step = first_step
        self.console, self.on_step = console, on_step
        self.journal = Journal(out)
        self.steps = run.stage_steps(stage)
        self.trained = prepare(model, stage)
        self.optimizer = make_optimizer(self.trained, stage)
        self.done = 0
        self.bad = 0

    def train(self) -> None:
        """Train to the end of the stage and leave the model in eval mode, adapters merged.

        Raises:
            DataError: Too many samples of the stage were bad.
        """
        self._resume()
        if self.done == 0:
            self._answer("before")
        set_modes(self.model, self.trained)
        saved = time.monotonic()
        asked = self._times_to_ask()
        with bar(self.stage.name, self.steps, self.done, self.console) as shown:
            waited = time.perf_counter()
            for data in self.loader.steps(self.done, self.steps):
                metrics = self._step(data, waited)
                waited = time.perf_counter()
                self.journal.step(metrics)
                shown.step(metrics)
                if self.done in asked:
                    self._answer("during")
                if time.monotonic() - saved > self.run.save.every_s and self.done < self.steps:
                    self._save()
                    saved = time.monotonic()
                if self.on_step is not None:
                    self.on_step(metrics)
        self.model.eval()
        self._keep_adapters()
        self._answer("after")

    def _step(self, data: StepData, waited: float) -> StepMetrics:
        """One optimizer step: every row's share of the mean over all target tokens, then one update."""
        began = time.perf_counter()
        # Whatever is drawn in a step (dropout, say) follows from its number, so a resumed run draws the same.
        torch.manual_seed(hash((self.run.seed, key(self.stage.name), data.step)) & 0x7FFFFFFF)
        self._count_bad(data)
        share = rate(self.stage.schedule, data.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * share
        targets = max(1, data.num_targets())
        loss = 0.0
        for row in data.rows:
            row_sum = row_loss(self.model, row, self.stage.label_smoothing)
            (row_sum / targets).backward()
            loss += float(row_sum.detach())
        norm = self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done = data.step + 1
        now = time.perf_counter()
        return StepMetrics(
            step=self.first_step + self.done,
            stage=self.stage.name,
            stage_step=self.done,
            loss=loss / targets,
            lr=max(group["lr"] for group in self.optimizer.param_groups),
            grad_norm=norm,
            tokens=data.num_tokens(),
            target_tokens=data.num_targets(),
            samples=data.num_samples,
            rows=len(data.rows),
            seconds=now - waited,
            data_seconds=began - waited,
            tokens_per_s=data.num_tokens() / max(1e-9, now - waited),
        )

    def _clip(self) -> float:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        limit = self.stage.optimizer.clip
        return float(torch.nn.utils.clip_grad_norm_(parameters, math.inf if limit is None else limit))

    def _count_bad(self, data: StepData) -> None:
        if not data.bad:
            return
        self.bad += len(data.bad)
        self.journal.bad(self.stage.name, self.first_step + data.step + 1, data.bad)
        seen = (data.step + 1) * self.stage.batch_samples
        if self.bad > max(10, self.run.data.max_bad * seen):
            last = data.bad[-1]
            raise DataError(
                f"{self.bad} of {seen} samples were bad, more than data.max_bad={self.run.data.max_bad:g} allows; the last one: "
                f"{last.reason}. All are listed in quarantine.jsonl; correct them, or raise data.max_bad",
                where=last.where,
                sample_id=last.sample_id,
            )

    def _resume(self) -> None:
        found, passed = checkpoint.newest(self.folder, self.stage.name)
        for sentence in passed:
            self.console.print(sentence, highlight=False)
        if found is not None:
            checkpoint.restore(found, self.model, self.optimizer)
            self.done, self.bad = found.position.stage_step, found.position.bad
            self.console.print(f"{self.stage.name}: resumed at step {self.done}/{self.steps}", highlight=False)
        self.journal.cut_back(self.first_step + self.done, self.stage.name, self.done)

    def _save(self) -> None:
        position = Position(self.stage.name, self.done, self.first_step + self.done, self.bad)
        try:
            checkpoint.save(self.folder, self.model, self.optimizer, position, keep=self.run.save.keep)
        except OSError as error:
            self.console.print(
                f"the checkpoint at step {self.done} could not be written ({error.strerror}); training goes on, and the one "
                "before it is untouched. Make room on the disk",
                highlight=False,
            )

    def _keep_adapters(self) -> None:
        """Write adapters down in PEFT's format, then merge them into the weights."""
        for how in self.stage.train.values():
            if how.lora is not None:
                config = lora_config(self.model, how)
                save_adapters(self.model, config, self.folder.parent / "adapters" / self.stage.name)
        merge_adapters(self.model)

    def _times_to_ask(self) -> set[int]:
        times = self.run.samples.times
        return {self.steps * (i + 1) // (times + 1) for i in range(times)} - {0, self.steps}

    def _answer(self, when: str) -> None:
        if self.prompts:
            answers = answer_prompts(self.model, self.processor, self.prompts, self.run.samples.max_tokens)
            facts: dict[str, Any] = {"step": self.first_step + self.done, "stage": self.stage.name, "when": when}
            self.journal.answers([{**facts, **answer} for answer in answers])
