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
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import numpy as np

from avlm.config.data import DataConfig
from avlm.config.stage import Stage
from avlm.data.decoding.files import Limits
from avlm.data.encode import cut, pack
from avlm.data.planning.packing import pack_rows
from avlm.data.planning.plan import Measures
from avlm.data.planning.planned import plan_of
from avlm.data.processor import AvlmProcessor
from avlm.data.rows import RowSource
from avlm.data.selection import BOTH, own_kinds, stage_rows
from avlm.data.staged import StageWriter
from avlm.data.workers.crew import Crew, Lost, Outcome
from avlm.data.workers.foreman import Error, note
from avlm.errors import ConfigError, DataError
from avlm.samples import Encoded, MediaKind, Row

AHEAD = 3
"""Steps that are prepared while one is used, and one more than that where they are so small that workers would idle."""
TASK_S = 0.02
"""Work that is handed to a worker at once: small against a step, large against what handing it over costs."""

Wanted = tuple[int, int]
"""A row that a step reads, and the epoch it reads it in."""

Packs = list[int] | None
"""How many of a step's samples, in their order, go into each row; None where that follows from their lengths."""


@dataclass(slots=True)
class Bad:
    """A sample that was left out, or cut, and why."""

    sample_id: str
    where: str
    reason: str
    file: str = ""
    """The medium that is to blame, if one is."""
    cut: int = 0
    """Tokens that were cut off its end; 0: it was left out."""


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
    cut: list[Bad] = field(default_factory=list)
    """Samples that were read without their end."""

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
        measures: Of all rows of the source, where the plan of the stage needs them.
        uncounted: Rows that have no measures, and why. They are left out of the plan, and so are too long ones where
            those are dropped; all of them are listed in `left_out`.
        rank, ranks: Which part of each step is prepared here, of how many.

    Raises:
        ConfigError: The stage finds no row to learn from, or its plan needs measures and there are none.
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
        measures: Measures | None = None,
        uncounted: Mapping[int, Bad] | None = None,
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
        self.left_out: list[Bad] = []
        """Rows of the stage that its plan leaves out."""
        if measures is not None:
            self._leave_out(uncounted or {}, np.asarray(measures.tokens[np.array(self.rows)]))
        self.measures = measures
        self.plan = plan_of(source, self.rows, stage, data, seed, measures)
        writer = StageWriter(stage, processor, own_kinds(stage, video), seed)
        self.prepare = SamplePreparer(source, writer, data)

    def _leave_out(self, uncounted: Mapping[int, Bad], tokens: np.ndarray) -> None:
        """Keep rows that the plan can have.

        Args:
            tokens: Of each row of the stage.
        """
        rows = np.array(self.rows)
        out = np.isin(rows, list(uncounted))
        if self.data.too_long == "drop":
            out |= tokens > self.stage.row_tokens
        for row, count in zip(rows[out].tolist(), tokens[out].tolist(), strict=True):
            bad = uncounted.get(row)
            if bad is None:
                bad = Bad(self.source[row].id, self.source.where(row), too_long(count, self.stage))
            self.left_out.append(bad)
        kept: list[int] = rows[~out].tolist()
        if not kept:
            first = self.left_out[0]
            raise ConfigError(
                f"stage {self.stage.name} can learn from none of its {len(self.rows)} rows. "
                f"The first one, {first.where}: {first.reason}"
            )
        self.rows = kept

    def assigned(self, k: int) -> tuple[list[Wanted], Packs]:
        """The samples of step ``k`` that this rank reads, in order, and how they are packed."""
        packs: Packs = None
        if self.stage.batch_rows is None:
            found = self.plan.samples(k)[self.rank :: self.ranks]
        else:
            rows = self.plan.step(k).of_rank(self.rank, self.ranks)
            found, packs = [member for row in rows for member in row], [len(row) for row in rows]
        return [(self.rows[number], epoch) for number, epoch in found], packs

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
            min(self.data.workers, (last - first) * (self.stage.batch_rows or self.stage.batch_samples)),
            limit_s=self.stall_s(),
            memory_mb=self.data.worker_mb + self.data.cache_mb,
        ) as crew:
            waiting: deque[tuple[int, list[Wanted], Packs, list[int]]] = deque()
            for k in range(first, last):
                wanted, packs = self.assigned(k)
                waiting.append((k, wanted, packs, [crew.give(group) for group in self._groups(wanted, crew.pace_s)]))
                if len(waiting) > self._ahead(len(wanted)):
                    yield self._collect(crew, *waiting.popleft())
            while waiting:
                yield self._collect(crew, *waiting.popleft())

    def step(self, k: int) -> StepData:
        """Read, decode, change, encode and pack the samples of step ``k``, in this process.

        Raises:
            ConfigError: A sample is longer than a row, and too long ones are refused.
        """
        wanted, packs = self.assigned(k)
        return self._packed(k, wanted, packs, [self.prepare(one) for one in wanted])

    def stall_s(self) -> float:
        """Time that one sample may take."""
        return stall_s(self.data, self.processor.reader().limits)

    def _ahead(self, samples: int) -> int:
        return max(AHEAD - 1, math.ceil(4 * self.data.workers / max(1, samples)))

    def _groups(self, wanted: Sequence[Wanted], pace_s: float | None) -> list[Sequence[Wanted]]:
        """A step's samples as tasks: several small ones are one, but each worker has a share of every step."""
        share = math.ceil(len(wanted) / self.data.workers)
        size = share // 4 if pace_s is None else int(TASK_S / max(pace_s, 1e-6))
        size = max(1, min(share, size))
        return [wanted[i : i + size] for i in range(0, len(wanted), size)]

    def _collect(
        self, crew: Crew[Wanted, Encoded | Bad], k: int, wanted: list[Wanted], packs: Packs, tickets: list[int]
    ) -> StepData:
        outcomes = [outcome for ticket in tickets for outcome in crew.result(ticket)]
        found = [self._judged(outcome, row) for outcome, (row, _) in zip(outcomes, wanted, strict=True)]
        return self._packed(k, wanted, packs, found)

    def _packed(self, k: int, wanted: Sequence[Wanted], packs: Packs, found: Sequence[Encoded | Bad]) -> StepData:
        """A step's samples in rows, and those that are none aside; a planned row is shorter without one of its own."""
        good = [sample for sample in found if isinstance(sample, Encoded)]
        if packs is None:
            rows = [[good[i] for i in row] for row in pack_rows([s.room() for s in good], self.stage.row_tokens)]
        else:
            ends = list(accumulate(packs, initial=0))
            found = [one for a, b in pairwise(ends) for one in self._within(found[a:b], wanted[a:b])]
            good = [sample for sample in found if isinstance(sample, Encoded)]
            planned = [found[a:b] for a, b in pairwise(ends)]
            rows = [[sample for sample in row if isinstance(sample, Encoded)] for row in planned]
        bad = {at: sample for at, sample in enumerate(found) if isinstance(sample, Bad)}
        shorter = [
            Bad(sample.id, self.source.where(row), "is longer than a row; its end was cut off", cut=sample.cut)
            for sample, (row, _) in zip(found, wanted, strict=True)
            if isinstance(sample, Encoded) and sample.cut
        ]
        packed = [pack(row) for row in rows if row]
        return StepData(k, packed, list(bad.values()), len(good), list(bad), shorter)

    def _within(self, row: Sequence[Encoded | Bad], wanted: Sequence[Wanted]) -> Sequence[Encoded | Bad]:
        """What was planned for a row, without what takes more than was counted where the row would be too long for it.

        Nothing else shows that media have changed behind an index, if their size and time are what they were. Where
        media are drawn to be given in words, a sample may take a few tokens more than was counted.
        """
        room = sum(one.room() for one in row if isinstance(one, Encoded))
        if room <= self.stage.row_tokens or 0 < self.stage.describe < 1:
            return row
        assert self.measures is not None
        counts = self.measures.tokens[np.array([number for number, _ in wanted])].tolist()
        return [
            self._outgrown(one, number, count) if isinstance(one, Encoded) and one.room() > count else one
            for one, (number, _), count in zip(row, wanted, counts, strict=True)
        ]

    def _outgrown(self, sample: Encoded, row: int, count: int) -> Bad:
        return Bad(
            sample.id,
            self.source.where(row),
            f"takes {sample.room()} tokens, and {count} were counted, so it has changed since. Touch its files, and "
            "index them again (avlm data index)",
        )

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


def stall_s(data: DataConfig, limits: Limits) -> float:
    """Time that one sample may take: to be fetched, where that is allowed, and to be decoded."""
    fetching = 0.0 if data.fetch is None else data.fetch.total_s
    return data.stall_s or 1.2 * (fetching + limits.max_decode_s)


def too_long(tokens: int, stage: Stage) -> str:
    """Why a sample does not fit into a row of a stage, and what to do."""
    return (
        f"has {tokens} tokens, and a row of stage {stage.name} holds {stage.row_tokens}. Raise "
        f"stages.{stage.name}.row_tokens, leave such samples out with data.too_long=drop, or cut them with "
        "data.too_long=cut"
    )


class SamplePreparer:
    """From a row's number to a sample as the model reads it, the same in every process.

    Args:
        writer: Writes a row down as the stage wants it.
    """

    def __init__(self, source: RowSource, writer: StageWriter, data: DataConfig) -> None:
        self.source, self.writer, self.data = source, writer, data
        self.stage = writer.stage

    def on(self, source: RowSource) -> SamplePreparer:
        """The same, from another copy of the rows."""
        return SamplePreparer(source, self.writer, self.data)

    def __call__(self, wanted: Wanted) -> Encoded | Bad:
        """Read, decode, change and encode one sample, or say what is wrong with it.

        Raises:
            ConfigError: It is longer than a row, and too long ones are refused.
        """
        row, epoch = wanted
        sample_id = ""
        try:
            sample = self.source[row]
            sample_id = sample.id
            note(about=sample_id)
            return self._fitted(self.writer.encode(sample, row, epoch), row)
        except DataError as error:
            where = error.where or self.source.where(row)
            return Bad(error.sample_id or sample_id, where, error.reason, error.file)

    def _fitted(self, encoded: Encoded, row: int) -> Encoded:
        """A sample that fits into a row, without its end if that is wanted."""
        if encoded.room() <= self.stage.row_tokens:
            return encoded
        if self.data.too_long == "cut":
            return cut(encoded, self.stage.row_tokens)
        raise self._too_long(encoded, self.source.where(row))

    def _too_long(self, encoded: Encoded, where: str) -> Exception:
        message = too_long(encoded.room(), self.stage)
        if self.data.too_long == "drop":
            return DataError(message, where=where, sample_id=encoded.id)
        return ConfigError(f'{where} (id "{encoded.id}"): {message}')
