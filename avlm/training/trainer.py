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
from avlm.training.parallel import DataParallel
from avlm.training.sharded import Sharded, shards
from avlm.training.stages import check_ahead, make_optimizer, part_modules, prepare, rate, set_modes
from avlm.training.states import train_state_head
from avlm.training.stopping import StopWish
from avlm.training.totals import totals
from avlm.training.trade import make_head, words_loss
from avlm.training.world import World, one_process


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
        world: The processes that train together; default: this one alone.
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
        world: World | None = None,
    ) -> None:
        self.run, self.stage = run, stage
        self.model, self.processor = model, processor
        self.loader, self.prompts = loader, prompts
        self.folder = out / "checkpoints"
        self.first_step = first_step
        self.console, self.on_step = console, on_step
        self.stop = stop or StopWish()
        self.world = world or one_process(run.device)
        self.journal = Journal(out, writes=self.world.first)
        self.steps = run.stage_steps(stage)
        fresh = _draw(run.seed, stage, -1)
        check_ahead(model, run.stages)
        self.trained = prepare(model, stage, seed=fresh)
        self.fresh_head = stage.state_head is not None and model.state_head is None
        more = [] if stage.state_head is None else train_state_head(model, stage, fresh)
        self.parallel: DataParallel | Sharded
        if shards(run, stage, self.world):
            self.parallel = Sharded(self.world, model, stage, self._losses, self._learning, run.parallel)
            more = [] if stage.state_head is None else train_state_head(model, stage, fresh)
        else:
            self.parallel = DataParallel(self.world, self._losses, self._learning)
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
        if self._stops()[0]:
            self.stop.grant()
        if self.done == 0:
            self._answer("before")
        set_modes(self.model, self.trained)
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
                stopping, due = self._stops(due=time.monotonic() - saved > self.run.save.every_s)
                if (stopping or due) and self.done < self.steps:
                    self._save()
                    saved = time.monotonic()
                if stopping and self.done < self.steps:
                    self.stop.grant()
                if self.on_step is not None:
                    self.on_step(metrics)
                waited = time.perf_counter()
        self.model = self.parallel.whole(self.model)
        self.model.eval()
        self._keep_adapters()
        self._answer("after")
        self.journal.sync()

    def _step(self, data: StepData, waited: float) -> StepMetrics:
        """One optimizer step: every row's share of the mean over all target tokens, then one update."""
        began = time.perf_counter()
        # Whatever is drawn in a step (dropout, say) follows from its number, so a resumed run draws the same.
        torch.manual_seed(_draw(self.run.seed, self.stage, data.step) + self.world.rank)
        head = self.stage.state_head
        whole = totals(self.world, data, head)
        self._count_bad(whole.bad)
        share = rate(self.stage.schedule, data.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * share
        targets, weight = max(1, whole.targets), whole.states or 1.0
        loss, balance, states = 0.0, 0.0, 0.0
        for row, counts in self.parallel.turns(data.rows, whole.most_rows):
            costs = self.parallel.losses(row)
            objective = costs.tokens / targets
            if costs.balance is not None:
                uneven = costs.balance * (counts * sum(row.lengths) / max(1, whole.tokens))
                objective = objective + self.stage.balance * uneven
                balance += float(uneven.detach())
            if costs.states is not None:
                objective = objective + costs.states / weight
                states += float(costs.states.detach())
            if objective.requires_grad:  # text alone reaches no connector, say
                torch.autograd.backward(objective)
            loss += float(costs.tokens.detach())
        loss, balance, states = self.parallel.finish([loss, balance, states])
        norm = self.parallel.clip(self.stage.optimizer.clip)
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
            tokens=whole.tokens,
            target_tokens=whole.targets,
            samples=whole.samples,
            rows=whole.rows,
            seconds=now - waited,
            data_seconds=began - waited,
            tokens_per_s=whole.tokens / max(1e-9, now - waited),
            balance=balance if self.stage.balance else None,
            cut_tokens=sum(bad.cut for bad in whole.bad.cut) if self.run.data.too_long == "cut" else None,
            state_loss=None if head is None else states / weight,
        )

    def _losses(self, row: Row) -> RowLosses:
        if self.head is None:
            return stage_losses(self.model, row, self.stage)
        return RowLosses(words_loss(self.model, self.head, row, self.stage.label_smoothing))

    def _learning(self) -> list[nn.Parameter]:
        """What the optimizer holds."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _stops(self, due: bool = False) -> tuple[bool, bool]:
        """Whether any of the processes was asked to stop, and whether one finds that it is time to save."""
        number, late = self.world.most(self.stop.number or 0, int(due))
        if number:
            self.stop.number = number
        return number > 0, late > 0

    def _check_finite(self, loss: float, norm: float, step: int) -> None:
        """Stop before an update that would leave no number in the weights."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise ConfigError(
                f"stage {self.stage.name}, step {step + 1}: the loss is {loss:g} and the gradient's norm {norm:g}, "
                "which no update survives; training has diverged. "
                f"Lower the rates, stages.{self.stage.name}.train.*.lr, in a new directory (out=DIR)"
            )

    def _list_unreadable(self) -> None:
        """Rows that are no rows at all are listed when the first stage that reads their file begins.

        Rows that the stage's plan leaves out are listed when it begins, and stop the run if they are too many.
        """
        left_out = self.loader.left_out
        if self.journal.bad(self.stage.name, self.first_step, left_out):
            told = f"{len(left_out)} rows cannot be used and are left out; see quarantine.jsonl"
            tell(self.console, f"{self.stage.name}: {told}")
        self.budget.begin(left_out, len(self.loader.rows))
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
        self.world.agree("checkpoints", self.done)
        self.journal.cut_back(self.first_step + self.done, self.stage.name, self.done)

    def _save(self) -> None:
        if self.world.first or self.parallel.collective:
            self._write_checkpoint()
        self.world.wait()

    def _write_checkpoint(self) -> None:
        bad, plan = self.budget, self.loader.plan.state(self.done).to_json()
        position = Position(self.stage.name, self.done, self.first_step + self.done, bad.bad, bad.run, plan)
        try:
            self.journal.sync()
            checkpoint.save(
                self.folder, self.learner, self.optimizer, position, keep=self.run.save.keep, writes=self.world.first
            )
        except OSError as error:
            tell(
                self.console,
                f"the checkpoint at step {self.done} could not be written ({error.strerror or error}); training goes "
                "on, and the one before it is untouched. Make room on the disk",
            )

    def _keep_adapters(self) -> None:
        """Write adapters down in PEFT's format, then merge them into the weights."""
        modules = part_modules(self.model)
        whole = [modules[part] for part in self.trained if self.stage.train[part].lora is None]
        if len(whole) == len(self.trained) or not self.world.first:
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
        if not self.prompts:
            return
        model = self.model if when == "after" else self.parallel.whole(self.model)
        if self.world.first:
            answers = answer_prompts(model, self.processor, self.prompts, self.run.samples.max_tokens)
            facts: dict[str, Any] = {"step": self.first_step + self.done, "stage": self.stage.name, "when": when}
            self.journal.answers([{**facts, **answer} for answer in answers])
        self.world.wait()


def _draw(seed: int, stage: Stage, step: int) -> int:
    """A seed for what is drawn in one step; step -1 is what is drawn before the first."""
    return hash((seed, key(stage.name), step)) & 0x7FFFFFFF
