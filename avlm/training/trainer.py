"""The loop of one stage, start to end in one place."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from avlm.config.run import RunConfig, Stage
from avlm.data.loader import Bad, StepData, StepLoader
from avlm.data.planning.plan import PlanState, key
from avlm.data.processor import AvlmProcessor
from avlm.errors import ConfigError
from avlm.models.modeling import AvlmForConditionalGeneration
from avlm.samples import Row, Sample
from avlm.training import checkpoint
from avlm.training.budget import BadBudget
from avlm.training.checkpoint import Position
from avlm.training.console import tell
from avlm.training.lora import merge_adapters, save_adapters
from avlm.training.loss import RowLosses, stage_losses
from avlm.training.observe import Journal, StepMetrics, answer_prompts, bar
from avlm.training.quicken import quicken
from avlm.training.stages import check_ahead, make_optimizer, prepare, rate, set_modes
from avlm.training.states import state_weight, train_state_head
from avlm.training.stopping import StopWish
from avlm.training.trade import make_head, words_loss


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
        stop: Tells whether the run has been asked to stop.
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
        stop: StopWish | None = None,
    ) -> None:
        self.run, self.stage = run, stage
        self.model, self.processor = model, processor
        self.loader, self.prompts = loader, prompts
        self.folder = out / "checkpoints"
        self.first_step = first_step
        self.console, self.on_step = console, on_step
        self.stop = stop or StopWish()
        self.journal = Journal(out)
        self.steps = run.stage_steps(stage)
        fresh = _draw(run.seed, stage, -1)
        check_ahead(model, run.stages)
        self.trained = prepare(model, stage, seed=fresh)
        self.fresh_head = stage.state_head is not None and model.state_head is None
        more = [] if stage.state_head is None else train_state_head(model, stage, fresh)
        self.optimizer = make_optimizer(self.trained, stage, more)
        self.learner: nn.Module = model
        """Everything that is trained, for checkpoints."""
        self.head = None
        if stage.supervise == "words":
            self.head = make_head(model, stage, fresh)
            self.learner = nn.ModuleDict({"model": model, "head": self.head})
            peak = max(how.lr for how in stage.train.values())
            self.optimizer.add_param_group({"params": list(self.head.parameters()), "lr": peak, "peak": peak})
        self.done = 0
        self.budget = BadBudget(run.data)

    def train(self) -> None:
        """Train to the end of the stage and leave the model in eval mode, adapters merged.

        Raises:
            DataError: Too many samples of the stage were bad.
            ConfigError: The loss is no longer a number.
            Stopped: The run was asked to stop; what was done is saved.
        """
        self._resume()
        self._list_unreadable()
        self.stop.grant()
        if self.done == 0:
            self._answer("before")
        set_modes(self.model, self.trained)
        quicken(self.model, self.run.speed, self.trained)
        saved = time.monotonic()
        asked = self._times_to_ask()
        with (
            bar(self.stage.name, self.steps, self.done, self.console) as shown,
            closing(self.loader.steps(self.done, self.steps)) as prepared,  # its workers end however this does
        ):
            waited = time.perf_counter()
            for data in prepared:
                metrics = self._step(data, waited)
                self.journal.step(metrics)
                shown.step(metrics)
                if self.done in asked:
                    self._answer("during")
                stopping = self.stop.number is not None
                if (stopping or time.monotonic() - saved > self.run.save.every_s) and self.done < self.steps:
                    self._save()
                    saved = time.monotonic()
                if stopping and self.done < self.steps:
                    self.stop.grant()
                if self.on_step is not None:
                    self.on_step(metrics)
                waited = time.perf_counter()
        self.model.eval()
        self._keep_adapters()
        self._answer("after")
        self.journal.sync()

    def _step(self, data: StepData, waited: float) -> StepMetrics:
        """One optimizer step: every row's share of the mean over all target tokens, then one update."""
        began = time.perf_counter()
        # Whatever is drawn in a step (dropout, say) follows from its number, so a resumed run draws the same.
        torch.manual_seed(_draw(self.run.seed, self.stage, data.step))
        self._count_bad(data)
        share = rate(self.stage.schedule, data.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * share
        targets = max(1, data.num_targets())
        head = self.stage.state_head
        weight = 1.0 if head is None else state_weight(data.rows, head) or 1.0
        loss, balance, states = 0.0, 0.0, 0.0
        for row in data.rows:
            costs = self._losses(row)
            objective = costs.tokens / targets
            if costs.balance is not None:
                uneven = costs.balance * (sum(row.lengths) / data.num_tokens())
                objective = objective + self.stage.balance * uneven
                balance += float(uneven.detach())
            if costs.states is not None:
                objective = objective + costs.states / weight
                states += float(costs.states.detach())
            if objective.requires_grad:  # a row without media has nothing to tell a connector
                torch.autograd.backward(objective)
            loss += float(costs.tokens.detach())
        norm = self._clip()
        self._check_finite(loss + states, norm, data.step)
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
            balance=balance if self.stage.balance else None,
            cut_tokens=sum(bad.cut for bad in data.cut) if self.run.data.too_long == "cut" else None,
            state_loss=None if head is None else states / weight,
        )

    def _losses(self, row: Row) -> RowLosses:
        if self.head is None:
            return stage_losses(self.model, row, self.stage)
        return RowLosses(words_loss(self.model, self.head, row, self.stage.label_smoothing))

    def _clip(self) -> float:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        limit = self.stage.optimizer.clip
        return float(torch.nn.utils.clip_grad_norm_(parameters, math.inf if limit is None else limit))

    def _check_finite(self, loss: float, norm: float, step: int) -> None:
        """Stop before an update that would leave no number in the weights."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise ConfigError(
                f"stage {self.stage.name}, step {step + 1}: the loss is {loss:g} and the gradient's norm {norm:g}, "
                "which no update survives; training has diverged. "
                f"Lower the rates, stages.{self.stage.name}.train.*.lr, in a new directory (out=DIR)"
            )

    def _list_unreadable(self) -> None:
        """Rows that are no rows at all are listed when the first stage that reads their file begins."""
        errors = self.loader.source.errors
        bad = [Bad(e.sample_id, e.where, e.reason, e.file) for e in errors]
        if self.journal.bad(self.stage.name, self.first_step, bad):
            name = self.loader.source.name
            tell(self.console, f"{len(bad)} rows of {name} cannot be read and are left out; see quarantine.jsonl")

    def _count_bad(self, data: StepData) -> None:
        self.journal.bad(self.stage.name, self.first_step + data.step + 1, data.cut)
        self.budget.count(data)
        self.journal.bad(self.stage.name, self.first_step + data.step + 1, data.bad)
        self.budget.check()

    def _resume(self) -> None:
        found, passed = checkpoint.newest(self.folder, self.stage.name)
        for sentence in passed:
            tell(self.console, sentence)
        if found is not None:
            checkpoint.restore(found, self.learner, self.optimizer)
            self.done = found.position.stage_step
            self.budget.bad, self.budget.run = found.position.bad, found.position.bad_run
            if found.position.plan:
                self.loader.plan.resume(PlanState.from_json(found.position.plan))
            tell(self.console, f"{self.stage.name}: resumed at step {self.done}/{self.steps}")
        self.journal.cut_back(self.first_step + self.done, self.stage.name, self.done)

    def _save(self) -> None:
        bad, plan = self.budget, self.loader.plan.state(self.done).to_json()
        position = Position(self.stage.name, self.done, self.first_step + self.done, bad.bad, bad.run, plan)
        try:
            self.journal.sync()
            checkpoint.save(self.folder, self.learner, self.optimizer, position, keep=self.run.save.keep)
        except OSError as error:
            tell(
                self.console,
                f"the checkpoint at step {self.done} could not be written ({error.strerror or error}); training goes "
                "on, and the one before it is untouched. Make room on the disk",
            )

    def _keep_adapters(self) -> None:
        """Write adapters down in PEFT's format, then merge them into the weights."""
        whole = [module for part, module in self.trained.items() if self.stage.train[part].lora is None]
        if len(whole) == len(self.trained):
            return
        if self.model.language_model in whole:
            tell(
                self.console,
                f"{self.stage.name}: its adapters stand merged in the stage's model only, because PEFT keeps no "
                "language model that was trained whole beside them",
            )
        else:
            if self.stage.state_head is not None and self.model.state_head is not None:
                whole.append(self.model.state_head)
            save_adapters(self.model, whole, self.folder.parent / "adapters" / self.stage.name)
            if self.fresh_head:
                tell(
                    self.console,
                    f"{self.stage.name}: its adapters hold a state head, and the model that the stage began with has "
                    "none. Call add_state_head(3) on that model before PEFT loads them",
                )
        merge_adapters(self.model)

    def _times_to_ask(self) -> set[int]:
        times = self.run.samples.times
        return {self.steps * (i + 1) // (times + 1) for i in range(times)} - {0, self.steps}

    def _answer(self, when: str) -> None:
        if self.prompts:
            answers = answer_prompts(self.model, self.processor, self.prompts, self.run.samples.max_tokens)
            facts: dict[str, Any] = {"step": self.first_step + self.done, "stage": self.stage.name, "when": when}
            self.journal.answers([{**facts, **answer} for answer in answers])


def _draw(seed: int, stage: Stage, step: int) -> int:
    """A seed for what is drawn in one step; step -1 is what is drawn before the first."""
    return hash((seed, key(stage.name), step)) & 0x7FFFFFFF
