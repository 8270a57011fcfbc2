"""Count batches of rows: what an index is made of, in this process or in several."""

from __future__ import annotations

import hashlib
import itertools
import os
import pickle
import signal
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from avlm.data.decoding.files import Limits
from avlm.data.indexing.columns import open_columns
from avlm.data.indexing.known import Identity, KnownFacts, facts_key, identity
from avlm.data.media.reader import MediaReader
from avlm.data.rows import RowSource
from avlm.data.staged import StageWriter
from avlm.data.workers.foreman import end_with
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
    """All that counting a row takes, as it goes to another process."""

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
        self.facts = KnownFacts(job.facts)
        self.known = None if job.before is None else open_columns(job.before, {**KEYS, "at": np.int64})
        self.old = None if job.old is None else open_columns(job.old, COUNTED)

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
        if self.known is None or self.old is None:
            return
        first = np.searchsorted(self.known["key_a"], batch.columns["key_a"])
        for i in list(samples):
            a, b = batch.columns["key_a"][i], batch.columns["key_b"][i]
            at = int(first[i])
            while a and at < len(self.known["key_a"]) and self.known["key_a"][at] == a:
                if self.known["key_b"][at] == b:
                    for name in COUNTED:
                        batch.columns[name][i] = self.old[name][self.known["at"][at]]
                    batch.reused += 1
                    del samples[i]
                    break
                at += 1

    def _count_others(self, batch: Batch, samples: dict[int, Sample], media: dict[int, list[Identity | None]]) -> None:
        keys = {
            known_by: facts_key(known_by, self.media, self.job.limits)
            for i in samples
            for known_by in media[i]
            if known_by is not None
        }
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
            try:
                counts = self.job.writer.count(sample, partial(measure, known_by), self.job.capacity)
            except AvlmError as error:
                self._refuse(batch, i, error, sample.id)
                continue
            _fill(batch, i, counts)
        batch.decoded, self.reader.decoded = self.reader.decoded, 0

    def _refuse(self, batch: Batch, i: int, error: AvlmError, sample_id: str) -> None:
        reason = error.reason if isinstance(error, DataError) else str(error)
        row = batch.rows[i]
        batch.columns["status"][i] = 1
        batch.bad.append(Reason(row, self.job.source.where(row), sample_id, reason))


def _fill(batch: Batch, i: int, counts: Counts) -> None:
    load = counts.load
    numbers = (counts.tokens, counts.targets, load.tiles, load.patches, load.frames, counts.cut, load.cost)
    for name, number in zip(COUNTED, numbers, strict=False):  # the bytes are there already
        batch.columns[name][i] = number


def row_key(sample: Sample, media: Sequence[Identity | None]) -> tuple[int, int]:
    """A digest of all that a row's counts follow from, the settings aside; never 0."""
    known_by = iter(media)
    said = [
        (
            turn.role,
            turn.verbatim,
            turn.state,
            turn.ended,
            [(part.alt, next(known_by)) if isinstance(part, MediaItem) else part.text for part in turn.parts],
        )
        for turn in sample.turns
    ]
    whole = hashlib.blake2b(repr(said).encode(errors="replace"), digest_size=16).digest()
    return int.from_bytes(whole[:8], "little") | 1, int.from_bytes(whole[8:], "little")


# ---------------------------------------------------------------- several processes

_counter: Counter | None = None
"""Of this process, where it counts for another."""


def _begin(job: bytes, parent: int) -> None:
    global _counter
    for name in ("SIGINT", "SIGUSR1"):  # a stop is for the process to grant that started this one; it sends SIGTERM
        if name in signal.Signals.__members__:
            signal.signal(signal.Signals[name], signal.SIG_IGN)
    end_with(parent)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    _counter = Counter(pickle.loads(job))  # bytes of the process that started this one


def _count(rows: range, read: np.ndarray) -> Batch:
    assert _counter is not None
    return _counter.count(rows, read)


Task = tuple[range, np.ndarray]


def batches(job: Job, tasks: Iterable[Task], workers: int) -> Iterator[Batch]:
    """Count batches, in this process (`workers` 0) or in others, in whatever order they are done.

    When a process ends, the rows that were under way are counted again one by one; one that ends it again is listed.
    """
    if workers == 0:
        counter = Counter(job)
        yield from (counter.count(*task) for task in tasks)
        return
    rest = iter(tasks)
    while suspects := (yield from _in_processes(job, rest, workers)):
        one_by_one = iter([(rows[i : i + 1], read[i : i + 1]) for rows, read in suspects for i in range(len(rows))])
        while lost := (yield from _in_processes(job, one_by_one, 1)):
            yield _lost(job, lost[0][0])  # one process takes them in order, so the first that is missing was under way
            one_by_one = iter([*lost[1:], *one_by_one])


def _lost(job: Job, rows: range) -> Batch:
    batch = Batch(rows, {name: np.zeros(1, dtype) for name, dtype in COLUMNS.items()})
    batch.columns["status"][0] = 1
    reason = "ends the process that measures it. Replace its media"
    batch.bad.append(Reason(rows[0], job.source.where(rows[0]), "", reason))
    return batch


def _in_processes(job: Job, tasks: Iterator[Task], workers: int) -> Generator[Batch, None, list[Task]]:
    """Count what is to be counted; what was under way when a process ended is returned."""
    under_way: dict[Future[Batch], Task] = {}
    beginning: Task | None = None
    with ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=_begin, initargs=(pickle.dumps(job), os.getpid())
    ) as pool:
        try:
            while True:
                for beginning in itertools.islice(tasks, 2 * workers - len(under_way)):
                    under_way[pool.submit(_count, *beginning)] = beginning
                beginning = None
                if not under_way:
                    return []
                done, _ = wait(under_way, return_when=FIRST_COMPLETED)
                for future in done:
                    batch = future.result()
                    del under_way[future]
                    yield batch
        except BrokenProcessPool:
            lost = {task[0].start: task for task in [*under_way.values(), beginning] if task is not None}
            return [lost[start] for start in sorted(lost)]
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
