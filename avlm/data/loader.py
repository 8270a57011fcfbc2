"""Steps of training data: rows of packed samples, prepared ahead in other processes.

What a step reads is a function of its number, so the loader has no state to save:
asking it for step k gives what an uninterrupted run would have had there. The unit of
work is a sample, so workers share a step evenly, and one that a sample kills costs that
sample only.
"""

from __future__ import annotations

import math
import pickle
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

import numpy as np

from avlm.config.data import DataConfig
from avlm.config.run import Stage
from avlm.data.crew import Crew, Lost, Outcome
from avlm.data.encode import pack
from avlm.data.foreman import Error, note
from avlm.data.plan import key, pack_rows, positions
from avlm.data.processor import AvlmProcessor
from avlm.data.rows import RowSource
from avlm.data.selection import BOTH, own_kinds, stage_rows
from avlm.data.text import described, without_media
from avlm.data.turns import with_state_tokens
from avlm.errors import ConfigError, DataError
from avlm.samples import IGNORE, Encoded, MediaKind, Row, Sample

AHEAD = 3
"""Steps that are prepared while one is used, and one more than that where they are so small that workers would idle."""
TASK_S = 0.02
"""Work that is handed to a worker at once: small against a step, large against what handing it over costs."""

Wanted = tuple[int, int]
"""A row that a step reads, and the epoch it reads it in."""


@dataclass(slots=True)
class Bad:
    """A sample that was left out, and why."""

    sample_id: str
    where: str
    reason: str
    file: str = ""
    """The medium that is to blame, if one is."""


@dataclass(slots=True)
class StepData:
    """What one optimizer step learns from, or one rank's part of it."""

    step: int
    rows: list[Row]
    bad: list[Bad] = field(default_factory=list)
    num_samples: int = 0
    """How many were good."""
    bad_at: list[int] = field(default_factory=list)
    """Where in the order of all samples each of the bad ones stood."""

    def num_targets(self) -> int:
        return sum(row.num_targets() for row in self.rows)

    def num_tokens(self) -> int:
        return sum(sum(row.lengths) for row in self.rows)


class StepLoader:
    """The steps of one stage.

    Args:
        source: The rows. Workers have a copy of it, so that an open file of it is not shared.
        stage: What the stage reads and how it changes it.
        processor: Of the model that is trained.
        data: Settings of the run's data. With ``workers=0`` samples are prepared in this process, and one that hangs or
            crashes a decoder hangs or ends the run.
        seed: Of the run.
        video: What the run's model takes from a video.
        rank, ranks: Which part of each step is prepared here, of how many.

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
        *,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        assert 0 <= rank < ranks, "a rank is one of the ranks"
        self.source = source
        self.stage = stage
        self.processor = processor
        self.data = data
        self.seed = seed
        self.rank, self.ranks = rank, ranks
        self.rows = stage_rows(source.facts, stage, video)
        self.prepare = SamplePreparer(source, stage, processor, data, seed, own_kinds(stage, video))

    def assigned(self, k: int) -> list[Wanted]:
        """The rows of step ``k`` that this rank reads, in order."""
        found = positions(k, self.stage.batch_samples, len(self.rows), seed=self.seed, stage=self.stage.name)
        return [(self.rows[number], epoch) for number, epoch in found[self.rank :: self.ranks]]

    def steps(self, first: int, last: int) -> Generator[StepData, None, None]:
        """Steps ``first`` to ``last - 1``, each prepared by worker processes while the ones before it are used.

        Raises:
            ConfigError: As `step` does.
            OSError: Worker processes cannot be started, or end as soon as they are.
        """
        if self.data.workers == 0 or first >= last:
            yield from (self.step(k) for k in range(first, last))
            return
        own = pickle.loads(pickle.dumps(self.source, protocol=5))  # with no file open that others read too
        with Crew(
            self.prepare.on(own),
            min(self.data.workers, (last - first) * self.stage.batch_samples),
            limit_s=self.stall_s(),
            memory_mb=self.data.worker_mb + self.data.cache_mb,
        ) as crew:
            waiting: deque[tuple[int, list[Wanted], list[int]]] = deque()
            for k in range(first, last):
                wanted = self.assigned(k)
                waiting.append((k, wanted, [crew.give(group) for group in self._groups(wanted, crew.pace_s)]))
                if len(waiting) > self._ahead():
                    yield self._collect(crew, *waiting.popleft())
            while waiting:
                yield self._collect(crew, *waiting.popleft())

    def step(self, k: int) -> StepData:
        """Read, decode, change, encode and pack the samples of step ``k``, in this process.

        Raises:
            ConfigError: A sample is longer than a row, and too long ones are refused.
        """
        return _packed(k, [self.prepare(wanted) for wanted in self.assigned(k)], self.stage.row_tokens)

    def stall_s(self) -> float:
        """Time that one sample may take."""
        return self.data.stall_s or 1.2 * self.processor.reader().limits.max_decode_s

    def _ahead(self) -> int:
        samples = math.ceil(self.stage.batch_samples / self.ranks)
        return max(AHEAD - 1, math.ceil(4 * self.data.workers / samples))

    def _groups(self, wanted: Sequence[Wanted], pace_s: float | None) -> list[Sequence[Wanted]]:
        """A step's samples as tasks: several small ones are one, but each worker has a share of every step."""
        share = math.ceil(len(wanted) / self.data.workers)
        size = share // 4 if pace_s is None else int(TASK_S / max(pace_s, 1e-6))
        size = max(1, min(share, size))
        return [wanted[i : i + size] for i in range(0, len(wanted), size)]

    def _collect(self, crew: Crew[Wanted, Encoded | Bad], k: int, wanted: list[Wanted], tickets: list[int]) -> StepData:
        outcomes = [outcome for ticket in tickets for outcome in crew.result(ticket)]
        found = [self._judged(outcome, row) for outcome, (row, _) in zip(outcomes, wanted, strict=True)]
        return _packed(k, found, self.stage.row_tokens)

    def _judged(self, outcome: Outcome[Encoded | Bad], row: int) -> Encoded | Bad:
        if isinstance(outcome, Error):
            raise outcome.error
        if isinstance(outcome, Lost):
            return Bad(outcome.about, self.source.where(row), self._epitaph(outcome), outcome.file)
        return outcome

    def _epitaph(self, lost: Lost) -> str:
        """Why a sample was lost."""
        name = lost.file or "its row"
        if lost.how == "time":
            return (
                f"{name}: takes longer than {self.stall_s():g} s, so the process that read it was ended. "
                "Replace it, or raise data.stall_s"
            )
        if lost.how == "memory":
            return (
                f"{name}: takes more memory than data.worker_mb={self.data.worker_mb} leaves to a process. "
                "Make it smaller, or raise data.worker_mb"
            )
        return f"{name}: crashed the process that read it, twice ({lost.detail}). Replace it, or remove the sample"


def _packed(k: int, found: Sequence[Encoded | Bad], row_tokens: int) -> StepData:
    """A step's samples in rows, and those that are none aside."""
    good = [sample for sample in found if isinstance(sample, Encoded)]
    bad = {at: sample for at, sample in enumerate(found) if isinstance(sample, Bad)}
    rows = pack_rows([sample.room() for sample in good], row_tokens)
    packed = [pack([good[i] for i in row]) for row in rows]
    return StepData(k, packed, list(bad.values()), len(good), list(bad))


class SamplePreparer:
    """From a row's number to a sample as the model reads it, the same in every process.

    Args:
        kinds: Media that the stage takes as they are.
    """

    def __init__(
        self,
        source: RowSource,
        stage: Stage,
        processor: AvlmProcessor,
        data: DataConfig,
        seed: int,
        kinds: frozenset[MediaKind],
    ) -> None:
        self.source = source
        self.stage = stage
        self.processor = processor
        self.data = data
        self.seed = seed
        self.kinds = kinds

    def on(self, source: RowSource) -> SamplePreparer:
        """The same, from another copy of the rows."""
        return SamplePreparer(source, self.stage, self.processor, self.data, self.seed, self.kinds)

    def __call__(self, wanted: Wanted) -> Encoded | Bad:
        """Read, decode, change and encode one sample, or say what is wrong with it.

        Raises:
            ConfigError: It is longer than a row, and too long ones are refused.
        """
        row, epoch = wanted
        sample_id, where = "", self.source.where(row)
        try:
            sample = self.source[row]
            sample_id = sample.id
            note(about=sample_id)
            encoded = self._encode(sample, row, epoch)
            if encoded.room() > self.stage.row_tokens:
                raise self._too_long(encoded, where)
            return encoded
        except DataError as error:
            return Bad(error.sample_id or sample_id, error.where or where, error.reason, error.file)

    def _encode(self, sample: Sample, row: int, epoch: int) -> Encoded:
        rng = np.random.default_rng([self.seed, key(self.stage.name), epoch, row])
        sample = described(sample, self.stage.describe, rng, self.kinds)
        if self.stage.rows == "text":
            sample = without_media(sample)
        if self.stage.state_tokens is not None:
            sample = with_state_tokens(sample, self.stage.state_tokens)
        encoded = self.processor.encode(sample, supervise=self.stage.supervise, augment=(self.stage.augment, rng))
        if self.stage.loss == "distill":
            encoded.teacher = self._teacher(sample, encoded)
        return encoded

    def _teacher(self, sample: Sample, student: Encoded) -> Encoded:
        """What the language model reads as its own teacher: the same conversation, system turn and answers, in words.

        Raises:
            DataError: A medium's words are not known, or the answers are other tokens behind them.
        """
        for item in sample.media():
            if not item.alt:
                raise DataError(
                    f"{item.name()} has no alt, so the teacher of stage {self.stage.name} (loss=distill) has nothing "
                    "to read in its place. Give the medium an alt: what it shows or says",
                    where=sample.where,
                    sample_id=sample.id,
                )
        teacher = self.processor.encode(without_media(self.processor.addressed(sample)))
        if _targets(teacher) != _targets(student):
            raise DataError(
                "the tokenizer writes the answer in other tokens behind the words of a medium than behind the medium, "
                "so the two cannot be compared place by place. Use a chat template that begins an answer with a "
                "special token, or leave the row out",
                where=sample.where,
                sample_id=sample.id,
            )
        return teacher

    def _too_long(self, encoded: Encoded, where: str) -> Exception:
        message = (
            f"has {encoded.room()} tokens, and a row of stage {self.stage.name} holds {self.stage.row_tokens}. "
            f"Raise stages.{self.stage.name}.row_tokens, or leave such samples out with data.too_long=drop"
        )
        if self.data.too_long == "drop":
            return DataError(message, where=where, sample_id=encoded.id)
        return ConfigError(f'{where} (id "{encoded.id}"): {message}')


def _targets(encoded: Encoded) -> list[int]:
    """The tokens that are learned, in order."""
    return [label for label in encoded.labels[1:] if label != IGNORE]
