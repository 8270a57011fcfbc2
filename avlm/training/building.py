"""Stages that need nothing of each other are trained side by side: parts that learn their trade, and senses that are
aligned.

Each is a run of its own in ``building/STAGE``, in a process of its own, and resumes by
itself; when all are done their results and journals become the whole run's. Small parts on
a processor gain nothing from more threads, so two at a time are done in half the time.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import torch
from rich.console import Console
from transformers.utils import logging

from avlm import errors
from avlm.config.io import build, read_mapping, to_yaml
from avlm.config.run import RunConfig
from avlm.config.stage import Stage
from avlm.data.workers.spread import num_cores
from avlm.training.apart import lay_together
from avlm.training.nursery import start
from avlm.training.observe import Bar, Journal, StepMetrics, read_lines, steps_progress
from avlm.training.stopping import SIGNALS, Stopped, StopWish, stop_wishes

LOOK_S = 0.2
MEASURED_STEPS = 20
"""After so many steps it is known how long a stage will take."""
SOONER = 0.9
"""What takes less than this share of the longest gives way to it."""
GIVES_WAY = 5
"""By so much more niceness: a third of the time that others get where they want the same core."""
STOPPED = {*(128 + number for number in SIGNALS), *(-number for number in SIGNALS)}
"""Exit statuses of a process that was stopped and lost nothing: by its own choice, or before it could choose."""


def by_itself(stage: Stage) -> bool:
    """Whether a stage builds a part without any other part of the run."""
    return stage.builds == "language" or (stage.builds is not None and stage.supervise == "words")


def build_side_by_side(run: RunConfig, stages: Sequence[Stage], console: Console, stop: StopWish) -> None:
    """Train these stages, each by itself, and leave what they make in the directory of each.

    Args:
        run: With the model that each of them begins with.

    Raises:
        AvlmError: What ended one of them; the others are stopped, with everything saved.
        Stopped: The run was asked to stop.
    """
    console.rule(", ".join(stage.name for stage in stages))
    threads = max(1, (run.threads or torch.get_num_threads()) // len(stages))
    with ExitStack() as stack:
        bars = stack.enter_context(steps_progress(console))
        workers: list[_Worker] = []
        for stage in stages:
            bar = Bar(stage.name, run.stage_steps(stage), 0, console, bars)
            workers.append(_Worker(run, stage, threads, bar))
            stack.callback(workers[-1].end)
        settled = len(workers) * threads <= num_cores()  # who goes first
        while sum(worker.goes_on() for worker in workers):
            if stop.number is not None or any(worker.failed() for worker in workers):
                break
            settled = settled or _longest_goes_first(workers)
            time.sleep(LOOK_S)
        for worker in workers:
            worker.end()
    stop.grant(saved=all(worker.saved() for worker in workers))
    for worker in sorted(
        workers, key=lambda worker: not worker.error.is_file()
    ):  # one that failed before those stopped
        worker.raise_failure()


def _longest_goes_first(workers: Sequence[_Worker]) -> bool:
    """Where there are more processes than cores: let those that would be done sooner give way to the longest one.

    With equal shares it would be at work alone in the end, and other cores idle. Once is enough.

    Returns:
        Whether that is done, or none of them is at work any more that it could be done for.
    """
    working = [worker for worker in workers if worker.process.poll() is None]
    left = [worker.left_s() for worker in working]
    known = [seconds for seconds in left if seconds is not None]
    if len(known) < len(workers):
        return len(working) < len(workers)
    for worker, seconds in zip(working, known, strict=True):
        if seconds < SOONER * max(known):
            worker.give_way()
    return True


class _Worker:
    """The process that trains one stage, and its bar."""

    def __init__(self, run: RunConfig, stage: Stage, threads: int, bar: Bar) -> None:
        self.stage = stage
        self.bar = bar
        self.steps = run.stage_steps(stage)
        self.done = 0
        self.seen, self.seconds = 0, 0.0
        """Steps whose lines were read, some of them twice where it went back to a checkpoint; and what they took."""
        self.folder = _folder(run, stage)
        self.inode = self.offset = 0
        self.part = b""
        self.folder.parent.mkdir(exist_ok=True)
        config = run.model_copy(
            update={"stages": (stage,), "out": str(self.folder), "threads": threads, "side_by_side": 1}
            | {"log": (), "profile": None}  # which are the whole run's, and go by its steps
            | {"parallel": run.parallel.model_copy(update={"processes": 1})}
        )
        settings = self.folder.parent / f"{stage.name}.yaml"
        settings.write_text(to_yaml(config), encoding="utf-8")
        self.error = self.folder.parent / f"{stage.name}.error"
        self.error.unlink(missing_ok=True)
        self.process = start(__name__, str(settings))

    def goes_on(self) -> bool:
        """Whether it is still at work; its bar is brought up to date."""
        running = self.process.poll() is None
        for metrics in self._news():
            self.bar.step(metrics)
            self.seen += 1
            self.seconds += metrics.seconds
            self.done = metrics.stage_step
        return running

    def left_s(self) -> float | None:
        """Seconds that the stage will take at the pace so far; None where that is not known yet."""
        if self.seen < MEASURED_STEPS:
            return None
        return self.seconds / self.seen * (self.steps - self.done)

    def give_way(self) -> None:
        """Ask the system to let others go first, where it can be asked.

        Source:
            sched(7): where Linux groups tasks by session, niceness counts within one, and each of these has its own.
        """
        pid = self.process.pid
        with suppress(OSError, AttributeError):  # it has ended, or the system knows no such thing
            os.setpriority(os.PRIO_PGRP, pid, os.getpriority(os.PRIO_PROCESS, 0) + GIVES_WAY)
        with suppress(OSError):
            for _ in range(3):
                try:
                    Path(f"/proc/{pid}/autogroup").write_text(str(GIVES_WAY))
                    break
                except BlockingIOError:  # it may be told once in a tenth of a second
                    time.sleep(0.1)

    def _news(self) -> list[StepMetrics]:
        """Steps since the last look."""
        try:
            with (self.folder / "metrics.jsonl").open("rb") as file:
                facts = os.fstat(file.fileno())
                if facts.st_ino != self.inode or facts.st_size < self.offset:  # cut back to a checkpoint
                    self.inode, self.offset, self.part = facts.st_ino, 0, b""
                file.seek(self.offset)
                data = file.read()
        except OSError:
            return []
        self.offset += len(data)
        *lines, self.part = (self.part + data).split(b"\n")
        return [StepMetrics.read(json.loads(line)) for line in lines]

    def failed(self) -> bool:
        return self.process.poll() not in (None, 0)

    def saved(self) -> bool:
        """Whether all that it did is on the disk."""
        return self.process.returncode == 0 or self.process.returncode in STOPPED

    def raise_failure(self) -> None:
        """Raise here what ended the process there."""
        if self.process.returncode == 0:
            return
        if not self.error.is_file():
            raise OSError(
                f"the process that built {self.stage.name} ended with status {self.process.returncode}. "
                "Start the same command again: it goes on where this ended"
            )
        kind, message, where, sample = json.loads(self.error.read_bytes())
        if kind in ("DataError", "MediaError"):
            raise errors.DataError(message, where=where, sample_id=sample)
        raise errors.ConfigError(message)

    def end(self) -> None:
        """Ask it to save and stop, if it has not ended by itself, and wait."""
        self.process.terminate()
        self.process.wait()


def _folder(run: RunConfig, stage: Stage) -> Path:
    return Path(run.out) / "building" / stage.name


def collect(run: RunConfig, stages: Sequence[Stage], steps_before: Callable[[Stage], int]) -> None:
    """Take over what was built: each part, and before it the lines that tell how it was made.

    Killed anywhere, it is done again from the first stage whose part is not there yet.
    """
    for stage in stages:
        assert stage.builds is not None
        folder = _take_journal(run, stage, steps_before(stage))
        parts = Path(run.out) / "parts"
        parts.mkdir(exist_ok=True)
        (folder / "parts" / stage.builds).replace(parts / stage.builds)
    clear(run)


def collect_models(run: RunConfig, group: Sequence[Stage], steps_before: Callable[[Stage], int]) -> None:
    """Take over the models of stages that were trained side by side, as if one had begun with the one before it.

    Killed anywhere, it is done again from the first stage whose model is not there yet.
    """
    models = Path(run.out) / "stages"
    for number, stage in enumerate(group):
        if (models / stage.name).is_dir():
            continue
        own = _take_journal(run, stage, steps_before(stage)) / "stages" / stage.name
        models.mkdir(exist_ok=True)
        if number == 0:
            own.replace(models / stage.name)
        else:
            lay_together(models / group[number - 1].name, group[:number], own, models / stage.name)
    clear(run)


def under_way(run: RunConfig, stages: Sequence[Stage]) -> bool:
    """Whether any of these stages has been begun by itself and is not taken over yet."""
    return any(_folder(run, stage).is_dir() for stage in stages)


def _take_journal(run: RunConfig, stage: Stage, before: int) -> Path:
    """Put the lines of a stage that was trained by itself behind the run's own; its directory is returned."""
    folder, journal = _folder(run, stage), Journal(Path(run.out))
    journal.cut_back(before, stage.name, 0)
    for rows, path in (
        (journal.take_metrics, "metrics.jsonl"),
        (journal.answers, "samples.jsonl"),
        (journal.take_bad, "quarantine.jsonl"),
        (journal.take_evals, "evals.jsonl"),
        (journal.trouble, "watch.jsonl"),
    ):
        if path != "samples.jsonl" or stage.builds is None:  # a part by itself answers nothing worth reading
            rows([{**row, "step": row["step"] + before} for row in read_lines(folder / path)])
    journal.sync()
    return folder


def clear(run: RunConfig) -> None:
    """Remove what was left of stages that have been taken over; others may be under way beside them."""
    out = Path(run.out)
    building = out / "building"
    if not building.is_dir():
        return
    taken = {s.name for s in run.stages if (out / "parts" / s.builds if s.builds else out / "stages" / s.name).is_dir()}
    for path in building.iterdir():
        if path.name in taken:
            shutil.rmtree(path, ignore_errors=True)
        elif path.stem in taken:
            path.unlink()
    with suppress(OSError):  # not empty
        building.rmdir()


def main(settings: str) -> int:
    """Build one part; what ends it is written down for the process that waits."""
    from avlm.training.chain import Run

    logging.disable_progress_bar()
    try:
        with stop_wishes(second="nothing") as stop:  # the parent ends this process, if it must
            Run(build(RunConfig, read_mapping(Path(settings))), console=Console(quiet=True)).train(stop=stop)
    except Stopped as stopped:
        return 128 + stopped.number if stopped.saved else 1
    except errors.AvlmError as error:
        facts = [getattr(error, name, "") for name in ("where", "sample_id")]
        message = getattr(error, "reason", str(error))
        Path(settings).with_suffix(".error").write_text(json.dumps([type(error).__name__, message, *facts]))
        return 2
    return 0
