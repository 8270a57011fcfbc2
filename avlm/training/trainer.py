"""The loop of one stage, start to end in one place."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn

from avlm.config.preference import Dpo
from avlm.config.run import RunConfig
from avlm.config.stage import Stage
from avlm.data.loader import Bad, StepData, StepLoader
from avlm.data.planning.plan import PlanState, key
from avlm.data.processor import AvlmProcessor
from avlm.models.modeling import AvlmForConditionalGeneration
from avlm.models.products import fast_products, wide
from avlm.samples import Row, Sample
from avlm.training.budget import BadBudget
from avlm.training.checkpoint import NOBODY, Owner, Position, load
from avlm.training.compiled import CompiledLayers
from avlm.training.console import tell
from avlm.training.counting.gauges import Gauges
from avlm.training.counting.trackers import Trackers
from avlm.training.device import move_row, seed
from avlm.training.evaluation import Evaluation, When
from avlm.training.features import kept_features
from avlm.training.heldout import HeldOut, undisturbed
from avlm.training.lora import merge_adapters, save_adapters
from avlm.training.loss import RowLosses, stage_losses
from avlm.training.masters import check_kinds, set_rate
from avlm.training.observe import Journal, StepMetrics, answer_prompts, bar
from avlm.training.parallel import DataParallel
from avlm.training.preference import Preference, preferred, tally
from avlm.training.quicken import quicken
from avlm.training.saver import Saver, kept_checkpoints
from avlm.training.sharded import Sharded, check_sharded, shards
from avlm.training.snapshot import held, held_share, put_back
from avlm.training.spreading import spread_of
from avlm.training.stages import check_ahead, make_optimizer, part_modules, prepare, rate, set_modes
from avlm.training.states import train_state_head
from avlm.training.stopping import StopWish
from avlm.training.totals import Totals, totals
from avlm.training.trade import make_head, words_loss
from avlm.training.watching.watch import Watch
from avlm.training.world import World, one_process


class StepSums(NamedTuple):
    """What the rows of a step cost, added up."""

    tokens: float
    balance: float
    states: float
    pairs: float
    above: float
    margin: float


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
        held_out: What the stage is measured on as it goes, if it is.
        owner: Whose its checkpoints are.
        trackers: Who else is told of each step.
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
        held_out: HeldOut | None = None,
        owner: Owner = NOBODY,
        trackers: Trackers | None = None,
    ) -> None:
        self.run, self.stage = run, stage
        self.model, self.processor = model, processor
        self.loader, self.prompts = loader, prompts
        self.out = out
        self.first_step = first_step
        self.console, self.on_step = console, on_step
        self.stop = stop or StopWish()
        self.world = world or one_process(run.device)
        self.journal = Journal(out, writes=self.world.first)
        kept = kept_checkpoints(run)
        self.saver = Saver(out / "checkpoints", kept, self.journal, console, owner, self.world)
        self.steps = run.stage_steps(stage)
        fresh = _draw(run.seed, stage, -1)
        check_ahead(model, run.stages)
        check_kinds(run.stages)
        check_sharded(run, self.world)
        self.trained = prepare(model, stage, seed=fresh)
        self.compiled = CompiledLayers(model, wanted=run.speed.compile)
        self.preference = Preference(model, stage.dpo or Dpo()) if stage.loss == "dpo" else None
        self.fresh_head = stage.state_head is not None and model.state_head is None
        more = [] if stage.state_head is None else train_state_head(model, stage, fresh)
        spread = spread_of(run, stage, self.world, model, console, lambda: self.gauges.encoding())
        self.parallel: DataParallel | Sharded
        if shards(run, stage, self.world):
            self.parallel = Sharded(self.world, model, stage, self._losses, self._learning, run.parallel, spread)
            more = [] if stage.state_head is None else train_state_head(model, stage, fresh)
        else:
            self.parallel = DataParallel(self.world, self._losses, self._learning, spread)
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
        self.evaluation = None
        self.ended = False
        """Whether it became no better for so long that it ends before its last step."""
        if held_out is not None:
            self.evaluation = Evaluation(stage, held_out, self.journal, first_step, self.steps, console)
        roots: dict[str, nn.Module] = {"": model} if self.head is None else {"": model, "head": self.head}
        self.watch = Watch(
            run.watch, stage, roots, self.optimizer, loader, lambda row: self._losses(row).tokens,
            self.journal, console, out, first_step,
        )  # fmt: skip
        self.gauges = Gauges(run, model, self.head, self.optimizer, out, trackers)

    def train(self) -> None:
        """Train to the end of the stage and leave the model in eval mode, adapters merged.

        Raises:
            DataError: Too many samples of the stage were bad.
            ConfigError: The loss is no longer a number, and the run is to stop then.
            Stopped: The run was asked to stop; what was done is saved.
        """
        wanted = self.run.speed.onednn == "auto" and self.world.device.type == "cpu"
        with fast_products(wanted and wide(self.model)):
            self._train()

    def _train(self) -> None:
        self._resume()
        self._list_unreadable()
        if self._stops()[0]:
            self.stop.grant()
        if self.done == 0:
            self._answer("before")
            self._measure("before")
        set_modes(self.model, self.trained)
        quicken(self.model, self.run.speed, self.trained)
        asked = self._times_to_ask()
        kept = self.stage, self.run.features, self.loader, self.steps, self.out, self.console
        with (
            kept_features(self.model, *kept),
            self.saver,
            bar(self.stage.name, self.steps, self.done, self.console) as shown,
            closing(self.loader.steps(self.done, self._last())) as prepared,  # its workers end however this does
            self.watch.running(self.done),
            self.gauges.running(self.first_step + self.done + 1),
        ):
            waited = time.perf_counter()
            for data in self.watch.steps(prepared, self.done):
                metrics = self._step(data, waited)
                self.journal.step(metrics)
                shown.step(metrics)
                self.gauges.told(metrics)
                if self.done in asked:
                    self._answer("during")
                if self.evaluation is not None and self.evaluation.due(self.done):
                    self._measure("during")
                self._save_and_stop()
                if self.on_step is not None:
                    self.on_step(metrics)
                if self._last() == self.done:
                    break
                waited = time.perf_counter()
        self._leave_best()
        self.model = self.parallel.whole(self.model)
        self.model.eval()
        self._measure("after")  # before adapters go into weights that a preference's reference shares
        self._keep_adapters()
        self._answer("after")
        self.journal.sync()

    def _step(self, data: StepData, waited: float) -> StepMetrics:
        """One optimizer step: every row's share of the mean over all target tokens, then one update."""
        began = time.perf_counter()
        whole = totals(self.world, data, self.stage)
        self._count_bad(whole.bad)
        share = rate(self.stage.schedule, data.step, self.steps)
        for group in self.optimizer.param_groups:
            set_rate(group, group["peak"] * share)
        with self.compiled.running():
            sums = StepSums(*self.parallel.finish(list(self._gradients(data, whole, data.rows))))
        norm = self.parallel.clip(self.stage.optimizer.clip)
        loss = sums.tokens / max(1, whole.units)
        sound = self.watch.sound(data, (loss, sums.states), norm, lambda: self._gradients(data, whole))
        if sound:
            with self.gauges.update(data.step, norm):
                self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done = data.step + 1
        now = time.perf_counter()
        return StepMetrics(
            step=self.first_step + self.done,
            stage=self.stage.name,
            stage_step=self.done,
            loss=loss,
            lr=max(group["peak"] * share for group in self.optimizer.param_groups),
            grad_norm=norm,
            tokens=whole.tokens,
            target_tokens=whole.targets,
            samples=whole.samples,
            rows=whole.rows,
            seconds=now - waited,
            data_seconds=began - waited,
            tokens_per_s=whole.tokens / max(1e-9, now - waited),
            balance=sums.balance if self.stage.balance else None,
            cut_tokens=sum(bad.cut for bad in whole.bad.cut) if self.run.data.too_long == "cut" else None,
            state_loss=None if self.stage.state_head is None else sums.states / (whole.states or 1.0),
            skipped=None if sound else True,
            **preferred((sums.pairs, sums.above, sums.margin)),
            **self.gauges.facts(data, whole, now - waited),
        )

    def _gradients(self, data: StepData, whole: Totals, ahead: Sequence[Row] | None = None) -> StepSums:
        """This process's share of the step's gradient; computed again from the same weights it is the same.

        Args:
            ahead: Its rows, if their media may be encoded elsewhere.
        """
        # Whatever is drawn in a step (dropout, say) follows from its number, so a resumed run draws the same.
        seed(self.world.device, _draw(self.run.seed, self.stage, data.step) + self.world.rank)
        targets, weight = max(1, whole.units), whole.states or 1.0
        loss, balance, states = 0.0, 0.0, 0.0
        margins: list[Tensor] = []
        for row, counts in self.parallel.turns(self.watch.rows(data), whole.most_rows, ahead):
            with self.gauges.row(row):
                costs = self.parallel.losses(row)
            objective = costs.tokens / targets
            if costs.balance is not None:
                uneven = costs.balance * (counts * sum(row.lengths) / max(1, whole.tokens))
                objective = objective + self.stage.balance * uneven
                balance += float(uneven.detach())
            if costs.states is not None:
                objective = objective + costs.states / weight
                states += float(costs.states.detach())
            if costs.margins is not None:
                margins.append(costs.margins)
            if objective.requires_grad:  # text alone reaches no connector, say
                torch.autograd.backward(objective)
            loss += float(costs.tokens.detach())
        return StepSums(loss, balance, states, *tally(margins))

    def _losses(self, row: Row) -> RowLosses:
        if self.preference is not None:
            return self.preference.losses(self.model, row)
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
        found = self.saver.newest(self.stage.name)
        if found is not None:
            put_back(load(found), self.learner, self.optimizer, str(found.folder))
            self.done = found.position.stage_step
            self.budget.go_on(found.position.bad, found.position.bad_run, found.position.seen)
            if found.position.plan:
                self.loader.plan.resume(PlanState.from_json(found.position.plan))
            tell(self.console, f"{self.stage.name}: resumed at step {self.done}/{self.steps}")
        self.world.agree("checkpoints", self.done)
        self.journal.cut_back(self.first_step + self.done, self.stage.name, self.done)
        if self.evaluation is not None:
            self.evaluation.resume()
            self._agree_on_end()

    def _save_and_stop(self) -> None:
        """Between two steps: save if that is due, and stop if that was asked."""
        stopping, due = self._stops(due=self.world.first and self.saver.due(self.done))
        if self.done == self.steps:  # what the stage leaves is written next
            return
        if due or stopping:
            self._save()
        if stopping:
            lost = not self.saver.finish()
            self.stop.grant(saved=not self.world.most(int(lost))[0])

    def _save(self) -> None:
        """Of a model that is spread over processes each writes its share, of any other the first one writes all."""
        if self.parallel.collective:
            share = held_share(self.learner, self.optimizer, first=self.world.first)
            self.saver.save(share, self._position())
        elif self.world.first:
            self.saver.save(held(self.learner, self.optimizer), self._position())

    def _position(self) -> Position:
        bad, plan = self.budget, self.loader.plan.state(self.done).to_json()
        step = self.first_step + self.done
        return Position(self.stage.name, self.done, step, bad.bad, bad.run, plan, bad.seen)

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
            save_adapters(self.model, whole, self.out / "adapters" / self.stage.name)
            if self.fresh_head:
                tell(
                    self.console,
                    f"{self.stage.name}: its adapters hold a state head, and the model that the stage began with has "
                    "none. Call add_state_head(3) on that model before PEFT loads them",
                )
        merge_adapters(self.model)

    def _measure(self, when: When) -> None:
        """Measure the stage, in the first process, and agree whether it ends."""
        if self.evaluation is None:
            return
        model = self.model if when == "after" else self.parallel.whole(self.model)
        if self.world.first:
            self.evaluation.measure(when, self.done, model, lambda row: self._held_out_losses(model, row))
            score = self.evaluation.score()
            if when == "during" and score is not None and self.saver.how.keep_best:
                self.saver.score(self.done, score)
        self.world.wait()
        self._agree_on_end()

    def _leave_best(self) -> None:
        """Go back to the best weights that were measured, if the stage is to leave those."""
        if self.evaluation is None or self.evaluation.settings.leave != "best":
            return
        here = self.evaluation
        if self.world.most(int(self.world.first and not here.measured(self.done)))[0]:
            self._measure("during")
        if not self.world.most(int(self.world.first and not here.is_best(self.done)))[0]:
            return
        best = self.saver.best(self.stage.name)
        if best is not None:
            put_back(load(best), self.learner, self.optimizer, str(best.folder))
            tell(self.console, f"{self.stage.name}: leaves the weights of step {best.position.stage_step}, the best")

    def _agree_on_end(self) -> None:
        if self.evaluation is not None:
            self.ended = self.world.most(int(self.evaluation.ended()))[0] > 0

    def _held_out_losses(self, model: AvlmForConditionalGeneration, row: Row) -> RowLosses:
        """As `_losses`, without what is added for the sake of learning."""
        row = move_row(row, self.world.device)
        if self.preference is not None:
            return self.preference.losses(model, row)
        if self.head is None:
            return stage_losses(model, row, undisturbed(self.stage))
        return RowLosses(words_loss(model, self.head, row))

    def _last(self) -> int:
        """The step that the stage ends with: its last one, or this one where it has learned what it can."""
        return self.done if self.ended else self.steps

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
