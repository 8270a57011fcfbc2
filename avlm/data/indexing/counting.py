"""Count batches of rows: what an index is made of, in this process or by a crew."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from avlm.data.decoding.files import Limits
from avlm.data.indexing.columns import open_columns
from avlm.data.indexing.known import FactsKeys, Identity, KnownFacts, identity
from avlm.data.media.reader import MediaReader
from avlm.data.rows import RowSource
from avlm.data.staged import StageWriter
from avlm.data.workers.crew import Crew, Lost
from avlm.data.workers.foreman import Error, begin
from avlm.data.workers.spread import LIMIT_S, why_lost
from avlm.errors import AvlmError, DataError
from avlm.layout import Facts
from avlm.samples import Counts, MediaItem, Sample

COUNTED: dict[str, type] = {
    "tokens": np.int32,
    "targets": np.int32,
    "tiles": np.int32,
    "patches": np.int32,
    "frames": np.int32,
    "cut": np.int32,
    "cost": np.int64,
    "bytes": np.int64,
}
"""What is counted of each row."""
KEYS: dict[str, type] = {"key_a": np.uint64, "key_b": np.uint64}
"""What a row is known by: both halves of a digest of all that its counts follow from, but for the settings."""
COLUMNS: dict[str, type] = {**COUNTED, "status": np.int32, **KEYS}
UNREAD = -1
"""Status of a row that the stage does not read."""


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a row could not be counted."""

    row: int
    where: str
    sample_id: str
    reason: str
    file: str = ""
    """The medium that is to blame, if one is."""


@dataclass(slots=True)
class Batch:
    """The columns of some rows that follow each other."""

    rows: range
    columns: dict[str, np.ndarray]
    bad: list[Reason] = field(default_factory=list)
    facts: dict[bytes, Facts] = field(default_factory=dict)
    """Of media that were measured for it."""
    reused: int = 0
    """Rows whose counts were known."""
    decoded: int = 0
    """Media that only decoding could measure."""


@dataclass(frozen=True, slots=True)
class Job:
    """All that counting a row takes."""

    source: RowSource
    writer: StageWriter
    capacity: int | None
    limits: Limits
    facts: Path
    """File of known facts."""
    before: Path | None
    """Folder with the keys of rows that are known, in order, and where they are."""
    old: Path | None
    """Folder of the index in which they are."""


class Counter:
    """Counts rows of one job."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.media = job.writer.processor.media_spec()
        self.reader = MediaReader(self.media, limits=job.limits)
        self.facts, self.facts_keys = KnownFacts(job.facts), FactsKeys(self.media, job.limits)
        self.known = None if job.before is None else _opened(job.before, {**KEYS, "at": np.int64})
        self.old = None if job.old is None else _opened(job.old, COUNTED)

    def __call__(self, task: Task) -> Batch:
        """Count some rows, as a crew asks for it."""
        return self.count(*task)

    def count(self, rows: range, read: np.ndarray) -> Batch:
        """Count some rows.

        Args:
            read: bool [rows], whether the stage reads each of them.
        """
        batch = Batch(rows, {name: np.zeros(len(rows), dtype) for name, dtype in COLUMNS.items()})
        batch.columns["status"][~read] = UNREAD
        samples: dict[int, Sample] = {}
        media: dict[int, list[Identity | None]] = {}
        for i, row in enumerate(rows):
            if read[i]:
                self._look_at(batch, i, row, samples, media)
        self._take_known(batch, samples)
        self._count_others(batch, samples, media)
        return batch

    def _look_at(
        self, batch: Batch, i: int, row: int, samples: dict[int, Sample], media: dict[int, list[Identity | None]]
    ) -> None:
        """Read a row, and note what it is known by."""
        begin(about=str(row))
        try:
            sample = self.job.source[row]
        except DataError as error:
            self._refuse(batch, i, error, error.sample_id)
            return
        found = [identity(item) for item in sample.media()]
        samples[i], media[i] = sample, [known_by for known_by, _ in found]
        batch.columns["bytes"][i] = sum(size for _, size in found)
        if all(known_by is not None for known_by in media[i]):
            batch.columns["key_a"][i], batch.columns["key_b"][i] = row_key(sample, media[i])

    def _take_known(self, batch: Batch, samples: dict[int, Sample]) -> None:
        """Counts of rows that were counted before, with the same settings."""
        if self.known is None or self.old is None or not samples:
            return
        rows = np.array([i for i in samples if batch.columns["key_a"][i]], np.int64)
        keys = self.known["key_a"], self.known["key_b"]
        at, found = found_among(keys, (batch.columns["key_a"][rows], batch.columns["key_b"][rows]))
        rows, places = rows[found], self.known["at"][at[found]]
        for name in COUNTED:
            batch.columns[name][rows] = self.old[name][places]
        batch.reused += len(rows)
        for i in rows.tolist():
            del samples[i]

    def _count_others(self, batch: Batch, samples: dict[int, Sample], media: dict[int, list[Identity | None]]) -> None:
        keys = {
            known_by: self.facts_keys.key(known_by) for i in samples for known_by in media[i] if known_by is not None
        }
        begin(about="")
        facts = self.facts.find(keys.values())

        def measure(known_by: Mapping[int, Identity | None], item: MediaItem) -> Facts:
            identity = known_by[id(item)]
            key = None if identity is None else keys[identity]
            if key is not None and key in facts:
                return facts[key]
            found = self.reader.measure(item)
            if key is not None:
                facts[key] = batch.facts[key] = found
            return found

        for i, sample in samples.items():
            known_by = {id(item): found for item, found in zip(sample.media(), media[i], strict=True)}
            begin(about=str(batch.rows[i]))
            try:
                counts = self.job.writer.count(sample, partial(measure, known_by), self.job.capacity)
            except AvlmError as error:
                self._refuse(batch, i, error, sample.id)
                continue
            _fill(batch, i, counts)
        batch.decoded, self.reader.decoded = self.reader.decoded, 0

    def _refuse(self, batch: Batch, i: int, error: AvlmError, sample_id: str) -> None:
        reason, file = (error.reason, error.file) if isinstance(error, DataError) else (str(error), "")
        row = batch.rows[i]
        batch.columns["status"][i] = 1
        batch.bad.append(Reason(row, self.job.source.where(row), sample_id, reason, file))


def found_among(
    known: tuple[np.ndarray, np.ndarray], wanted: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Where keys are among those that are known, and which of them are there at all.

    Args:
        known: Both halves of keys, in the order of the first.
        wanted: Both halves of others.
    """
    at, end = (np.searchsorted(known[0], wanted[0], side) for side in ("left", "right"))
    here = at < end
    while True:  # past those that have the first half in common: once in ages
        wrong = np.flatnonzero(here)
        wrong = wrong[known[1][at[wrong]] != wanted[1][wrong]]
        if not len(wrong):
            return at, here
        at[wrong] += 1
        here[wrong] = at[wrong] < end[wrong]


def _fill(batch: Batch, i: int, counts: Counts) -> None:
    load = counts.load
    numbers = (counts.tokens, counts.targets, load.tiles, load.patches, load.frames, counts.cut, load.cost)
    for name, number in zip(COUNTED, numbers, strict=False):  # the bytes are there already
        batch.columns[name][i] = number


def _opened(folder: Path, names: Mapping[str, type]) -> dict[str, np.ndarray]:
    """Columns that are there, without what a `memmap` does at each look besides."""
    return {name: np.asarray(column) for name, column in open_columns(folder, names).items()}


def row_key(sample: Sample, media: Sequence[Identity | None]) -> tuple[int, int]:
    """A digest of all that a row's counts follow from, the settings aside; never 0."""
    known_by = iter(media)
    said = [
        (
            turn.role,
            turn.verbatim,
            turn.state,
            turn.ended,
            *(() if turn.learned else ("not learned",)),  # so that rows that were counted before are known again
            [(part.alt, next(known_by)) if isinstance(part, MediaItem) else part.text for part in turn.parts],
        )
        for turn in sample.turns
    ]
    told = repr(said)
    if sample.rejected is not None:
        told += repr((sample.rejected.ended, sample.rejected.text()))
    whole = hashlib.blake2b(told.encode(errors="replace"), digest_size=16).digest()
    return int.from_bytes(whole[:8], "little") | 1, int.from_bytes(whole[8:], "little")


# ---------------------------------------------------------------- several processes


Task = tuple[range, np.ndarray]
"""Rows that follow each other, and whether the stage reads each of them."""


@dataclass(frozen=True, slots=True)
class Hands:
    """Who counts."""

    workers: int = 0
    """Processes; 0: this one, where nothing can be ended."""
    limit_s: float = LIMIT_S
    """How long one row may take until the process that is at it is ended."""
    memory_mb: int | None = None
    """How much memory a process may have beyond what it begins with; None: as much as there is."""


def batches(job: Job, tasks: Iterable[Task], hands: Hands) -> Iterator[Batch]:
    """Count batches, in this process or in others, in whatever order they are done.

    A row at which a process hangs or ends is listed, and the other rows of its batch are counted again.
    """
    if hands.workers == 0:
        counter = Counter(job)
        yield from (counter.count(*task) for task in tasks)
        return
    own = pickle.loads(pickle.dumps(job.source, protocol=5))  # with no file open that others read too
    counter = Counter(replace(job, source=own))
    with Crew(counter, hands.workers, limit_s=hands.limit_s, memory_mb=hands.memory_mb) as crew:
        rest: Iterable[Task] = tasks
        while rest:
            rest = yield from _counted(crew, job, rest, hands)


def _counted(
    crew: Crew[Task, Batch], job: Job, tasks: Iterable[Task], hands: Hands
) -> Generator[Batch, None, list[Task]]:
    """Count what is to be counted; returns what is to be counted again."""
    given: dict[int, Task] = {}
    again: list[Task] = []

    def handed() -> Iterator[list[Task]]:
        for number, task in enumerate(tasks):
            given[number] = task
            yield [task]

    for number, (outcome,) in crew.as_done(handed(), ahead=3 * hands.workers):
        task = given.pop(number)
        if isinstance(outcome, Error):
            raise outcome.error
        if isinstance(outcome, Lost):
            row = _culprit(task, outcome)
            if row is not None:
                yield _lost(job, row, f"{outcome.file or 'its row'}: {why_lost(outcome, hands.limit_s)}", outcome.file)
            again += _without(task, row)
        else:
            yield outcome
    return again


def _culprit(task: Task, lost: Lost) -> int | None:
    """The row at which a process was lost; None if it was at none of them."""
    rows, _ = task
    if lost.about.isdecimal() and int(lost.about) in rows:
        return int(lost.about)
    return rows[0] if len(rows) == 1 else None


def _without(task: Task, row: int | None) -> list[Task]:
    """A batch again without one row; in halves if it is not known which."""
    rows, read = task
    before, after = (len(rows) // 2,) * 2 if row is None else (row - rows.start, row - rows.start + 1)
    return [(rows[part], read[part]) for part in (slice(0, before), slice(after, None)) if rows[part]]


def _lost(job: Job, row: int, reason: str, file: str) -> Batch:
    batch = Batch(range(row, row + 1), {name: np.zeros(1, dtype) for name, dtype in COLUMNS.items()})
    batch.columns["status"][0] = 1
    batch.bad.append(Reason(row, job.source.where(row), "", reason, file))
    return batch
