"""What a stage does about trouble: it is found, told with its samples, written down, and then survived or not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from avlm.config.stage import Stage
from avlm.config.watch import WatchConfig
from avlm.data.encode import pack
from avlm.data.loader import Bad, StepData, StepLoader
from avlm.errors import AvlmError, ConfigError, DataError
from avlm.samples import Row
from avlm.training.console import tell
from avlm.training.masters import Masters
from avlm.training.observe import Journal, read_lines
from avlm.training.watching.blame import Blamed, listed, step_samples
from avlm.training.watching.nonfinite import Finding, Locator
from avlm.training.watching.spikes import Spike, Spikes
from avlm.training.watching.stall import Stall
from avlm.training.watching.statistics import MovingStatistics, evaluating

LOOKED_AT = 256
"""Samples of a step that are looked at one by one after a spike; the rest of a larger step is not."""
NAMED = 3


class Watch:
    """Watches one stage.

    Args:
        config: What to look for.
        stage: The stage.
        roots: What it computes with, by the prefix of its modules' names.
        optimizer: Of the stage.
        loader: Its data, for the names of samples.
        losses: Sum of the tokens' losses of a row.
        journal, console: Where trouble is told.
        out: The run's directory.
        first_step: Steps that earlier stages took.
    """

    def __init__(
        self,
        config: WatchConfig,
        stage: Stage,
        roots: Mapping[str, nn.Module],
        optimizer: Masters,
        loader: StepLoader,
        losses: Callable[[Row], Tensor],
        journal: Journal,
        console: Console,
        out: Path,
        first_step: int,
    ) -> None:
        self.config, self.stage, self.roots, self.optimizer = config, stage, roots, optimizer
        self.loader, self.losses = loader, losses
        self.journal, self.console, self.first_step = journal, console, first_step
        self.skipped = 0
        """Updates that were left out, one after the other until now."""
        self._spikes: Spikes | None = None
        self._locator: Locator | None = None
        self._at: tuple[str, int, Row | None] = ("data", 0, None)
        """What is under way: waiting for a step's data, or computing it, and which of its rows."""
        self._stall = self._make_stall(out)
        self._statistics = MovingStatistics(roots.values()) if config.nonfinite == "skip" else None

    # ------------------------------------------------------------ as the stage goes

    @contextmanager
    def running(self, done: int) -> Iterator[None]:
        """Look at the clock while the stage trains.

        Args:
            done: Steps of the stage that are done; spikes are compared with the last of them.
        """
        if self.config.spike is not None:
            lines = read_lines(self.journal.metrics)[-self.config.spike_window :] if done else []
            begun = self.loader.plan.opening_steps
            before = [
                row["loss"]
                for row in lines
                if row.get("stage") == self.stage.name
                and row.get("loss") is not None
                and (row["stage_step"] > begun or done < begun)
            ]
            self._spikes = Spikes(self.config.spike, self.config.spike_window, before, rise=self.config.spike_rise)
        with nullcontext() if self._stall is None else self._stall.watching():
            yield

    def steps(self, prepared: Iterable[StepData], first: int) -> Iterator[StepData]:
        """Hand the steps on, and know which one is under way."""
        steps, number = iter(prepared), first
        while True:
            self._now("data", number)
            data = next(steps, None)
            if data is None:
                return
            self._now("step", data.step)
            if self._statistics is not None:
                self._statistics.remember()
            yield data
            number = data.step + 1

    def rows(self, data: StepData) -> Iterator[Row]:
        """Hand the rows of a step on, and know which one is under way."""
        for number, row in enumerate(data.rows):
            self._at = ("step", data.step, row)
            if self._locator is not None:
                self._locator.begin_row(row, number)
            yield row

    def sound(self, data: StepData, losses: Sequence[float], norm: float, repeat: Callable[[], Any]) -> bool:
        """Whether the step's update may be made; trouble is told. On several ranks all must give the same numbers.

        Args:
            losses: The tokens' mean, which is compared with those of other steps, and others that are only checked.
            norm: Of the gradient.
            repeat: Computes the step's gradients once more.

        Raises:
            ConfigError: The loss or the gradient is no number, and the run is to stop then, or too many steps in a row
                were left out.
            DataError: The same, and one sample is to blame.
        """
        if self._spikes is not None and 0 < data.step == self.loader.plan.opening_steps:
            self._spikes.losses.clear()  # other rows come now, and their losses are others
        if not all(map(math.isfinite, (*losses, norm))):
            self._lost_numbers(data, losses, norm, repeat)
            return False
        self.skipped = 0
        spike = None if self._spikes is None else self._spikes.look(losses[0])
        if spike is not None:
            self._tell_spike(data, spike)
        return True

    # ------------------------------------------------------------ numbers that are none

    def _lost_numbers(self, data: StepData, losses: Sequence[float], norm: float, repeat: Callable[[], Any]) -> None:
        loss = next((x for x in losses if not math.isfinite(x)), losses[0])
        found, sentence = self._examine(repeat)
        blamed = step_samples(self.loader, data.step, () if found is None else found.samples)
        skip = self.config.nonfinite == "skip" and self.skipped < self.config.max_skipped
        said = sentence + self._about(found, blamed)
        facts: dict[str, Any] = {"kind": "nonfinite", "then": "skip" if skip else "stop", "loss": f"{loss:g}"}
        facts |= {"grad_norm": f"{norm:g}", "found": sentence}
        if found is not None:
            facts |= {"cause": found.cause, "name": found.name, "row": found.row, "item": found.item}
        self._write(data.step, facts, blamed)
        if not skip:
            raise self._refusal(data.step, loss, norm, found, said, blamed)
        self.skipped += 1
        if self._statistics is not None:
            self._statistics.restore()
        tell(
            self.console,
            f"{self.stage.name}: the update of step {data.step + 1} is left out: the loss is {loss:g} and the "
            f"gradient's norm {norm:g}; {said}",
        )

    def _examine(self, repeat: Callable[[], Any]) -> tuple[Finding | None, str]:
        """Find where it began, by computing the step once more; weights and statistics are as before it."""
        if self._statistics is not None:
            self._statistics.restore()
        self.optimizer.zero_grad(set_to_none=True)
        locator = Locator(self.roots, self.optimizer.kept)
        found = locator.weights()
        if found is None or self.loader.ranks > 1:  # what other ranks take part in has to be done by all
            self._locator = locator
            try:
                with locator.looking():
                    repeat()
            finally:
                self._locator = None
            found = found or locator.found or locator.gradients()
        return found, self._without_module() if found is None else found.sentence()

    def _without_module(self) -> str:
        """What to say where every value of the repeated step is a number."""
        grads = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not math.isfinite(float(torch.nn.utils.get_total_norm(grads))):
            return "every gradient is a number, but their squares add up to none"
        elsewhere = " on this rank" if self.loader.ranks > 1 else ""
        return f"computed once more, the same step is all numbers{elsewhere}"

    def _about(self, found: Finding | None, blamed: Sequence[Blamed]) -> str:
        if found is not None and found.item is not None and len(blamed) == 1 and found.item < len(blamed[0].files):
            return f': {blamed[0].files[found.item]}, of sample "{blamed[0].id}" ({blamed[0].where})'
        whose = "of sample" if len(blamed) == 1 else "of the samples" if found and found.samples else "in a step of"
        return f", {whose} {listed(blamed)}" if blamed else ""

    def _refusal(
        self, step: int, loss: float, norm: float, found: Finding | None, said: str, blamed: Sequence[Blamed]
    ) -> AvlmError:
        name = self.stage.name
        head = (
            f"stage {name}, step {step + 1}: the loss is {loss:g} and the gradient's norm {norm:g}, "
            "which no update survives"
        )
        if self.skipped:
            head += f", and the {self.skipped} updates before it were left out (watch.max_skipped)"
        if found is not None and found.cause == "input" and len(blamed) == 1:
            message = f"{head}; {said}. Replace the file, or remove the sample"
            file = blamed[0].files[found.item] if found.item is not None else ""
            return DataError(message, where=blamed[0].where, sample_id=blamed[0].id, file=file)
        if found is not None and found.cause == "weight" and step == 0:  # later ones have been trained until they broke
            return ConfigError(f"{head}; {said}. Begin with whole weights, in a new directory (out=DIR)")
        return ConfigError(
            f"{head}; training has diverged: {said}. Lower the rates, stages.{name}.train.*.lr, in a new directory "
            "(out=DIR), or leave such updates out with watch.nonfinite=skip"
        )

    # ------------------------------------------------------------ spikes

    def _tell_spike(self, data: StepData, spike: Spike) -> None:
        worst = self._worst(data)
        blamed = step_samples(self.loader, data.step, tuple(worst))
        if worst:
            blamed.sort(key=lambda sample: -worst[sample.id])
            samples = [sample.facts() | {"loss": worst[sample.id]} for sample in blamed]
            named = [f"{sample} with {worst[sample.id]:.3g}" for sample in blamed[:NAMED]]
            told = f"its worst samples are {', '.join(named)}"
        else:
            samples, told = [sample.facts() for sample in blamed], f"its samples are {listed(blamed)}"
        self._write(data.step, {"kind": "spike", **spike._asdict()}, (), samples=samples)
        tell(
            self.console,
            f"{self.stage.name}: the loss of step {data.step + 1} is {spike.loss:.4g}, {spike.deviations:.0f} "
            f"deviations above the median of {spike.median:.4g}; {told}",
        )

    def _worst(self, data: StepData) -> dict[str, float]:
        """Loss per target token of each sample, each by itself; empty where other ranks would have to take part."""
        if self.loader.ranks > 1:
            return {}
        found: dict[str, float] = {}
        with evaluating(self.roots.values()):
            for wanted in self.loader.assigned(data.step)[0][:LOOKED_AT]:
                sample = self.loader.prepare(wanted)
                if not isinstance(sample, Bad):
                    row = pack([sample])
                    found[sample.id] = float(self.losses(row)) / max(1, row.num_targets())
        return found

    # ------------------------------------------------------------ stalls

    def _make_stall(self, out: Path) -> Stall | None:
        if self.config.stall_s is None:
            return None
        say = lambda sentence: tell(self.console, sentence)  # noqa: E731
        return Stall(self.config.stall_s, self.config.stall, say, self._waits_for, out / "stalls.txt")

    def _now(self, what: str, step: int) -> None:
        self._at = (what, step, None)
        if self._stall is not None:
            self._stall.alive()

    def _waits_for(self) -> str:
        what, step, row = self._at
        rank = f"rank {self.loader.rank} of {self.loader.ranks}"
        place = f"stage {self.stage.name}, step {step + 1}, {rank}"
        if what == "data":
            rows = dict.fromkeys(row for row, _ in self.loader.assigned(step)[0])
            named = ", ".join(self.loader.source.where(row) for row in list(rows)[:8])
            more = f" and {len(rows) - 8} more" if len(rows) > 8 else ""
            return f"{place} waits for its data, {named}{more}"
        if row is not None:
            named = ", ".join(f'"{i}"' for i in row.ids[:8])
            more = f" and {len(row.ids) - 8} more" if len(row.ids) > 8 else ""
            return f"{place} is being computed, last the row of {named}{more}"
        return f"{place} is being computed"

    def _write(self, step: int, facts: dict[str, Any], blamed: Sequence[Blamed], **more: Any) -> None:
        head = {"step": self.first_step + step + 1, "stage": self.stage.name}
        self.journal.trouble([{**head, **facts, "samples": [sample.facts() for sample in blamed], **more}])
