"""Parts that learn their trade need nothing of each other, so they are built side by side.

Each is a run of its own in ``building/STAGE``, in a process of its own, and resumes by
itself; when all are done their parts and journals become the whole run's. Small parts on
a processor gain nothing from more threads, so two at a time are done in half the time.

    python -m avlm.training.building CONFIG PARENT    one of those processes
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import torch
from rich.console import Console
from transformers.utils import logging

from avlm import errors
from avlm.config.io import build, read_mapping, to_yaml
from avlm.config.run import RunConfig, Stage
from avlm.data.workers.foreman import end_with
from avlm.training.observe import Bar, Journal, StepMetrics, read_lines, steps_progress
from avlm.training.stopping import Stopped, StopWish

LOOK_S = 0.2


def by_itself(stage: Stage) -> bool:
    """Whether a stage builds a part without any other part of the run."""
    return stage.builds == "language" or stage.supervise == "words"


def build_side_by_side(run: RunConfig, stages: Sequence[Stage], console: Console, stop: StopWish) -> None:
    """Build the parts of these stages, and leave them where the run's own stages would.

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
        while sum(worker.goes_on() for worker in workers):
            if stop.number is not None or any(worker.failed() for worker in workers):
                break
            time.sleep(LOOK_S)
    stop.grant()
    for worker in sorted(
        workers, key=lambda worker: not worker.error.is_file()
    ):  # one that failed before those stopped
        worker.raise_failure()


class _Worker:
    """The process that builds one part, and its bar."""

    def __init__(self, run: RunConfig, stage: Stage, threads: int, bar: Bar) -> None:
        self.stage = stage
        self.bar = bar
        self.folder = _folder(run, stage)
        self.inode = self.offset = 0
        self.part = b""
        self.folder.parent.mkdir(exist_ok=True)
        config = run.model_copy(
            update={"stages": (stage,), "out": str(self.folder), "threads": threads, "side_by_side": 1}
            | {"log": (), "profile": None}  # which are the whole run's, and go by its steps
        )
        settings = self.folder.parent / f"{stage.name}.yaml"
        settings.write_text(to_yaml(config), encoding="utf-8")
        command = [sys.executable, "-m", __spec__.name, str(settings), str(os.getpid())]
        self.error = self.folder.parent / f"{stage.name}.error"
        self.error.unlink(missing_ok=True)
        # A session of its own: Ctrl-C reaches this process alone, which passes it on.
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
        )

    def goes_on(self) -> bool:
        """Whether it is still at work; its bar is brought up to date."""
        running = self.process.poll() is None
        for metrics in self._news():
            self.bar.step(metrics)
        return running

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
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait()


def _folder(run: RunConfig, stage: Stage) -> Path:
    return Path(run.out) / "building" / stage.name


def collect(run: RunConfig, stages: Sequence[Stage], steps_before: Callable[[Stage], int]) -> None:
    """Take over what was built: each part, and before it the lines that tell how it was made.

    Killed anywhere, it is done again from the first stage whose part is not there yet.
    """
    for stage in stages:
        folder, out = _folder(run, stage), Path(run.out)
        assert stage.builds is not None
        journal, before = Journal(out), steps_before(stage)
        journal.cut_back(before, stage.name, 0)
        taken = ((journal.take_metrics, "metrics.jsonl"), (journal.take_bad, "quarantine.jsonl"))
        for rows, path in (*taken, (journal.trouble, "watch.jsonl")):
            rows([{**row, "step": row["step"] + before} for row in read_lines(folder / path)])
        journal.sync()
        (out / "parts").mkdir(exist_ok=True)
        (folder / "parts" / stage.builds).replace(out / "parts" / stage.builds)
    _clear(run)


def _clear(run: RunConfig) -> None:
    """Remove what was left of parts that have been taken over; others may be under way beside them."""
    building, parts = Path(run.out) / "building", Path(run.out) / "parts"
    taken = {stage.name for stage in run.stages if stage.builds and (parts / stage.builds).is_dir()}
    for path in building.iterdir():
        if path.name in taken:
            shutil.rmtree(path, ignore_errors=True)
        elif path.stem in taken:
            path.unlink()
    with suppress(OSError):  # not empty
        building.rmdir()


def main(settings: str, parent: int) -> int:
    """Build one part; what ends it is written down for the process that waits."""
    from avlm.training.chain import Run

    logging.disable_progress_bar()
    end_with(parent)  # whoever starts the run again starts this part again
    try:
        Run(build(RunConfig, read_mapping(Path(settings))), console=Console(quiet=True)).train()
    except Stopped as stopped:
        return 128 + stopped.number
    except errors.AvlmError as error:
        facts = [getattr(error, name, "") for name in ("where", "sample_id")]
        message = getattr(error, "reason", str(error))
        Path(settings).with_suffix(".error").write_text(json.dumps([type(error).__name__, message, *facts]))
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], int(sys.argv[2])))
