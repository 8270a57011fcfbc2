"""Steps of training data: rows of packed samples, prepared ahead in other processes.

What a step reads is a function of its number, so the loader has no state to save:
asking it for step k gives what an uninterrupted run would have had there.
"""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from functools import partial

from torch.utils.data import DataLoader, Dataset

from avlm.config.data import DataConfig
from avlm.config.run import Stage
from avlm.data.encode import cut, pack
from avlm.data.plan import pack_rows, positions
from avlm.data.processor import AvlmProcessor
from avlm.data.rows import RowSource
from avlm.data.selection import BOTH, own_kinds, stage_rows
from avlm.data.staged import StageWriter
from avlm.errors import AvlmError, ConfigError, DataError
from avlm.samples import Encoded, MediaKind, Row

LOOK_S = 0.5
"""How often a process looks whether the one that started it is still there."""


@dataclass(slots=True)
class Bad:
    """A sample that was left out, or cut, and why."""

    sample_id: str
    where: str
    reason: str
    cut: int = 0
    """Tokens that were cut off its end; 0: it was left out."""


@dataclass(slots=True)
class StepData:
    """What one optimizer step learns from."""

    step: int
    rows: list[Row]
    bad: list[Bad] = field(default_factory=list)
    num_samples: int = 0
    cut: list[Bad] = field(default_factory=list)
    """Samples that were read without their end."""

    def num_targets(self) -> int:
        return sum(row.num_targets() for row in self.rows)

    def num_tokens(self) -> int:
        return sum(sum(row.lengths) for row in self.rows)


def _begin_worker(parent: int, worker: int) -> None:
    """A stop is the training process's to grant, between two steps; where that is killed, its workers end too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with(parent)


def end_with(parent: int) -> None:
    """End this process, at once and whatever it is doing, when the one that started it is gone."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_S)
        os._exit(1)

    threading.Thread(target=watch, name="avlm-end-with-parent", daemon=True).start()


class _Steps(Dataset[bytes]):
    """A stage's steps by number, for worker processes.

    They travel as bytes through a pipe. Shared memory, torch's own way, is 64 MB in many containers.
    """

    def __init__(self, loader: StepLoader) -> None:
        self.loader = loader

    def __getitem__(self, k: int) -> bytes:
        try:
            return pickle.dumps(self.loader.step(k), protocol=5)
        except AvlmError as error:
            return pickle.dumps(error, protocol=5)


class StepLoader:
    """The steps of one stage.

    Args:
        source: The rows.
        stage: What the stage reads and how it changes it.
        processor: Of the model that is trained.
        data: Settings of the run's data.
        seed: Of the run.
        video: What the run's model takes from a video.

    Raises:
        ConfigError: The stage finds no row to learn from.
    """

    def __init__(
        self,
        source: RowSource,
        stage: Stage,
        processor: AvlmProcessor,
        data: DataConfig,
        seed: int,
        video: frozenset[MediaKind] = BOTH,
    ) -> None:
        self.source = source
        self.stage = stage
        self.processor = processor
        self.data = data
        self.seed = seed
        self.writer = StageWriter(stage, processor, own_kinds(stage, video), seed)
        self.rows = stage_rows(source.facts, stage, video)

    def steps(self, first: int, last: int) -> Generator[StepData, None, None]:
        """Steps ``first`` to ``last - 1``, each prepared by worker processes while the ones before it are used.

        Raises:
            ConfigError: As `step` does.
            OSError: A worker was ended from outside.
        """
        if self.data.workers == 0 or first >= last:
            yield from (self.step(k) for k in range(first, last))
            return
        workers = DataLoader(
            _Steps(self),
            batch_size=None,
            sampler=range(first, last),
            num_workers=min(self.data.workers, last - first),
            prefetch_factor=2,
            worker_init_fn=partial(_begin_worker, os.getpid()),
        )
        try:
            for packed in workers:
                prepared = pickle.loads(packed)  # bytes of our own worker
                if isinstance(prepared, Exception):
                    raise prepared
                yield prepared
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker (pid"):
                raise  # a mistake of our own, with the worker's traceback
            raise OSError("a process that prepares data was ended from outside. Start the same command again") from None

    def step(self, k: int) -> StepData:
        """Read, decode, change, encode and pack the samples of step ``k``.

        Raises:
            ConfigError: A sample is longer than a row, and too long ones are refused.
        """
        found: list[Encoded] = []
        bad: list[Bad] = []
        shortened: list[Bad] = []
        wanted = positions(k, self.stage.batch_samples, len(self.rows), seed=self.seed, stage=self.stage.name)
        for number, epoch in wanted:
            row = self.rows[number]
            sample_id, where = "", self.source.where(row)
            try:
                sample = self.source[row]
                sample_id = sample.id
                found.append(self._fitted(self.writer.encode(sample, row, epoch), where))
                if found[-1].cut:
                    shortened.append(Bad(sample_id, where, "is longer than a row; its end was cut off", found[-1].cut))
            except DataError as error:
                bad.append(Bad(error.sample_id or sample_id, error.where or where, error.reason))
        packed = pack_rows([e.room() for e in found], self.stage.row_tokens)
        return StepData(k, [pack([found[i] for i in row]) for row in packed], bad, len(found), shortened)

    def _fitted(self, encoded: Encoded, where: str) -> Encoded:
        """A sample that fits into a row, without its end if that is wanted."""
        if encoded.room() <= self.stage.row_tokens:
            return encoded
        if self.data.too_long == "cut":
            return cut(encoded, self.stage.row_tokens)
        raise self._too_long(encoded, where)

    def _too_long(self, encoded: Encoded, where: str) -> Exception:
        message = (
            f"has {encoded.room()} tokens, and a row of stage {self.stage.name} holds {self.stage.row_tokens}. "
            f"Raise stages.{self.stage.name}.row_tokens, leave such samples out with data.too_long=drop, or cut them "
            "with data.too_long=cut"
        )
        if self.data.too_long == "drop":
            return DataError(message, where=where, sample_id=encoded.id)
        return ConfigError(f'{where} (id "{encoded.id}"): {message}')
