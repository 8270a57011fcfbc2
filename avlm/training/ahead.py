"""Media of the next step go through frozen encoders while this step's gradients are computed, in a thread of its own.

Small parts compute in one thread, since a second one gains them nothing, and the machine's other core has little to do.
What a frozen encoder makes of a row follows from the row alone, so it may be made before; and it is made of the same
batches in which the model itself would ask for it (`models.media.made_of`), so nobody could tell.

It begins with the backward pass, which does without the interpreter. Beside a forward pass both threads would wait for
the interpreter's lock half of their time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from avlm.config.run import RunConfig
from avlm.config.stage import Stage
from avlm.data.loader import StepData
from avlm.data.workers.spread import num_cores
from avlm.models.features import EncoderPart
from avlm.models.media import ENCODERS, encoder_of, learns, made_of
from avlm.models.modeling import AvlmForConditionalGeneration
from avlm.models.products import by_onednn
from avlm.samples import Row
from avlm.training.counting.gauges import Gauges
from avlm.training.spreading import prepared
from avlm.training.world import World

Made = dict[EncoderPart, list[Tensor]]
"""What encoders made of a row."""


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """The media of a step, on their way."""

    rows: Sequence[Row]
    made: Future[tuple[list[Made], int]]
    """For each row; and the operations that it took."""


class Ahead:
    """Encodes the media of a stage's steps ahead.

    Args:
        model: Prepared for the stage.
        gauges: Count what is computed; asked for when the stage begins.
        wanted: Otherwise every row's media are encoded with the row.
    """

    def __init__(self, model: AvlmForConditionalGeneration, gauges: Callable[[], Gauges], *, wanted: bool) -> None:
        self.model, self.gauges = model.model, gauges
        self.parts = [part for part in ENCODERS if wanted and self._constant(part)]
        self._pool: ThreadPoolExecutor | None = None
        self._next: Sequence[Row] | None = None
        """Rows of the step that has come last, until they are on their way."""
        self._jobs: deque[_Job] = deque()

    def _constant(self, part: EncoderPart) -> bool:
        return encoder_of(self.model, part) is not None and not learns(self.model, part)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Have a thread while the block runs. There is none where features are kept, which looks for them on the disk
        first, or where oneDNN multiplies, as who does is a setting of the whole process."""
        if self.parts and self.model.features is None and not by_onednn():
            begin = (torch.get_num_threads(),)
            self._pool = ThreadPoolExecutor(1, "encodes-ahead", initializer=torch.set_num_threads, initargs=begin)
        try:
            yield
        finally:
            self._jobs.clear()
            self._next = None
            if self._pool is not None:
                self._pool.shutdown(cancel_futures=True)
                self._pool = None

    def steps(self, steps: Iterable[StepData], waits: Callable[[int], None]) -> Iterator[StepData]:
        """Hand steps on, each when the one behind it has come.

        Args:
            waits: Is told which step is waited for, where it is another than the one that is asked for.
        """
        if self._pool is None:
            yield from steps
            return
        before: StepData | None = None
        for data in steps:
            self._next = data.rows
            if before is not None:
                yield before
            before = data
            waits(data.step + 1)
        if before is not None:
            yield before

    def begin(self) -> None:
        """Begin with the media of the next step: this one's backward pass is about to."""
        rows, self._next = self._next, None
        if rows is not None and self._pool is not None:
            self._jobs.append(_Job(rows, self._pool.submit(self._encode, rows)))

    @contextmanager
    def step(self, rows: Sequence[Row]) -> Iterator[Callable[[int], AbstractContextManager[None]]]:
        """What the rows of a step are read in, by number; as `Spread.step`.

        Args:
            rows: Of the step, as it was handed on.
        """
        job = self._jobs.popleft() if self._jobs and self._jobs[0].rows is rows else None
        if job is None:
            yield lambda number: nullcontext()
            return
        made, operations = job.made.result()
        self.gauges().add(operations)
        yield lambda number: prepared(self.model, made[number])

    def settle(self) -> None:
        """Wait for what is under way: the encoders are asked for something else, or looked at, before the next step."""
        wait([job.made for job in self._jobs])

    def _encode(self, rows: Sequence[Row]) -> tuple[list[Made], int]:
        with self.gauges().apart() as tally:
            return [made_of(self.model, row, self.parts) for row in rows], tally.total


def ahead_of(
    run: RunConfig, stage: Stage, world: World, model: AvlmForConditionalGeneration, gauges: Callable[[], Gauges]
) -> Ahead:
    """What encodes the media of a stage ahead, where that is wanted: by itself on a processor with a core to spare."""
    how: Any = run.speed.ahead
    possible = world.alone and stage.supervise == "answers" and model.device.type == "cpu"
    spare = torch.get_num_threads() < num_cores()
    return Ahead(model, gauges, wanted=possible and (how == "on" or (how == "auto" and spare)))
