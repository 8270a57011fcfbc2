"""An index of rows: what each takes of a row and of the encoders, counted once from texts and headers.

It is counted by the code that encodes, so the counts are those of the encoded rows. Columns
are memory-mapped; a hundred million rows stay on the disk. Making one again counts what is
new: rows are known by what is in them, media by their files' sizes and times of change.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from avlm.config.stage import Stage
from avlm.data.indexing.columns import digest, new_columns, open_columns, publish, seal, sealed
from avlm.data.indexing.counting import COLUMNS, KEYS, UNREAD, Batch, Hands, Job, Reason, Task, batches
from avlm.data.indexing.known import KnownFacts
from avlm.data.locks import alone
from avlm.data.planning.plan import Measures
from avlm.data.processor import AvlmProcessor
from avlm.data.rows import RowSource
from avlm.data.selection import own_kinds, stage_rows, video_senses
from avlm.data.staged import StageWriter
from avlm.data.workers.spread import LIMIT_S
from avlm.errors import ConfigError
from avlm.samples import MediaKind

VERSION = 1
"""Raised whenever the same row comes to be counted otherwise."""
BATCH = 256
"""Rows that one process counts at a time, at most."""
SAVE_S = 2.0
"""Seconds between two times that what was counted is put where a kill does not reach it."""
REASONS = "reasons.jsonl"
PLANNED = ("tokens", "targets", "tiles", "patches", "frames", "cut", "cost", "status")
"""Columns that a plan may depend on."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Made:
    """How an index came about."""

    rows: int
    counted: int
    reused: int
    """Rows whose counts were known from before."""
    bad: int
    measured: int
    """Media whose header was read, or that were decoded."""
    decoded: int
    """Media of those that only decoding could measure."""
    damaged: bool
    """Whether there was one before that could not be used."""


class Index:
    """Columns of one number for each row of a data source, in its order.

    Attributes:
        tokens: int32, room in a row; the larger of both versions where a stage distills. Cut where too long ones are.
        targets: int32, tokens that are learned.
        tiles: int32, squares, whole pictures and frames that the vision encoder takes.
        patches: int32, embeddings that it makes of them.
        frames: int32, frames of sound features that the audio encoder takes.
        cut: int32, tokens that are cut off.
        cost: int64, work of the encoders, as `layout.work` has it.
        bytes: int64, of the media's files.
        status: int32, 0 where a row was counted, the number of its reason (from 1) where it could not be, -1 where the
            stage does not read it. Other columns hold 0 there.
        fingerprint: A digest of all columns that a plan may depend on.
        bounds: Whether rows may take less than was counted, because media are drawn to be given in words.
        made: How it came about.
    """

    def __init__(self, folder: Path, head: dict[str, Any]) -> None:
        self.folder = folder
        columns = open_columns(folder, COLUMNS)
        self.tokens, self.targets, self.cut = columns["tokens"], columns["targets"], columns["cut"]
        self.tiles, self.patches, self.frames = columns["tiles"], columns["patches"], columns["frames"]
        self.cost, self.bytes, self.status = columns["cost"], columns["bytes"], columns["status"]
        self.fingerprint: str = head["fingerprint"]
        self.source: str = head["source"]
        self.settings: str = head["settings"]
        self.bounds: bool = head["bounds"]
        self.made = Made(**head["made"])

    def __len__(self) -> int:
        return len(self.tokens)

    def measures(self) -> Measures:
        """What a plan goes by."""
        return Measures(self.tokens, self.cost, self.tiles, self.frames, self.fingerprint)

    def reasons(self) -> Iterator[Reason]:
        """Rows that could not be counted, in order."""
        with (self.folder / REASONS).open("rb") as file:
            for line in file:
                yield Reason(**json.loads(line))


def open_index(folder: Path) -> Index | None:
    """An index that is there; None where there is none, or a damaged one."""
    head = sealed(folder)
    try:
        return None if head is None else Index(folder, head)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def build_index(
    source: RowSource,
    processor: AvlmProcessor,
    folder: Path,
    *,
    stage: Stage | None = None,
    video: frozenset[MediaKind] | None = None,
    too_long: Literal["refuse", "drop", "cut"] = "refuse",
    workers: int = 0,
    limit_s: float = LIMIT_S,
    memory_mb: int | None = None,
    progress: Progress | None = None,
) -> Index:
    """Count the rows of a source, or bring an index of them up to date.

    Args:
        source: The rows. With processes, one that can be pickled.
        processor: Of the model, with the stage's own template and the system prompts of the run.
        folder: Where indexes lie, one for each source and way of counting, beside the facts that they share. Sources of
            one name want folders of their own.
        stage: What it reads and how it changes rows; default: every row as it is.
        video: What the run's model takes from a video; default: what the processor's media settings say.
        too_long: With ``cut`` rows are counted as they are when cut to the stage's `row_tokens`.
        workers: Processes that count; 0: this one, where nothing can be ended.
        limit_s: How long they may take for one row, which is listed as one that cannot be counted if they take longer.
        memory_mb: How much memory each may have beyond what it begins with; None: as much as there is.
        progress: Called with rows done and in all.

    Returns:
        The index, in a folder of its own. What was counted before a kill is not counted again.

    Raises:
        ConfigError: The stage reads none of the rows, or not one of them can be counted.
        OSError: The folder cannot be written to, or processes cannot be started.
    """
    making = _making(source, processor, folder, stage, video, too_long)
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder / f".{making.target.name}.lock"):
        return making.make(Hands(workers, limit_s, memory_mb), progress)


def standing_index(
    source: RowSource,
    processor: AvlmProcessor,
    folder: Path,
    *,
    stage: Stage | None = None,
    video: frozenset[MediaKind] | None = None,
    too_long: Literal["refuse", "drop", "cut"] = "refuse",
) -> Index | None:
    """The index of a source as it was made before, whatever has become of the media since; None where there is none.

    For a run that goes on: what it planned with is what it goes on with, and nothing is read again. Arguments are those
    of `build_index`.
    """
    making = _making(source, processor, folder, stage, video, too_long)
    index = open_index(making.target)
    if index is None or (index.source, index.settings) != (source.fingerprint(), making.settings):
        return None
    return index if np.array_equal(np.asarray(index.status) != UNREAD, making.read) else None


def _making(
    source: RowSource,
    processor: AvlmProcessor,
    folder: Path,
    stage: Stage | None,
    video: frozenset[MediaKind] | None,
    too_long: Literal["refuse", "drop", "cut"],
) -> _Making:
    """What is to be counted, how, and where it will be."""
    every = stage is None
    stage = Stage(name="index", steps=1) if stage is None else stage
    spec = processor.media_spec()
    senses = video_senses(spec.audio is not None, spec.video.order) if video is None else video
    writer = StageWriter(stage, processor, own_kinds(stage, senses))
    read = np.ones(len(source), bool)
    if not every:
        read[:] = False
        read[stage_rows(source.facts, stage, senses)] = True
    return _Making(source, writer, stage.row_tokens if too_long == "cut" else None, read, folder)


class _Making:
    """One index on its way, beside where it will be."""

    def __init__(
        self,
        source: RowSource,
        writer: StageWriter,
        capacity: int | None,
        read: np.ndarray,
        folder: Path,
    ) -> None:
        self.source, self.writer, self.capacity, self.read = source, writer, capacity, read
        self.settings = _settings(writer, capacity)
        name = f"{re.sub(r'[^A-Za-z0-9._-]', '_', source.name)[:80]}-{self.settings[:12]}"
        self.target, self.aside = folder / name, folder / f".{name}.making"
        self.old: Index | None = None
        self.damaged = False
        self.reused = self.measured = self.decoded = 0
        self.done = np.zeros(0, np.uint8)
        self.columns: dict[str, np.ndarray] = {}

    def make(self, hands: Hands, progress: Progress | None) -> Index:
        self.old = open_index(self.target)
        self.damaged = self.target.exists() and self.old is None
        self.facts = KnownFacts(self.target.with_name("facts.sqlite"))
        self._begin()
        size = BATCH if hands.workers == 0 else max(1, min(BATCH, len(self.source) // (4 * hands.workers)))
        done = int(np.count_nonzero(self.done))
        waiting: list[Batch] = []
        saved = time.monotonic()
        for batch in batches(self._job(), self._tasks(size), hands):
            waiting.append(batch)
            done += len(batch.rows)
            if progress is not None:
                progress(done, len(self.source))
            if time.monotonic() - saved > SAVE_S:
                self._save(waiting)
                self._keep(waiting)
                saved, waiting = time.monotonic(), []
        self._save(waiting)
        return self._publish()

    # ------------------------------------------------------------ what is there already

    def _begin(self) -> None:
        """Go on with what a kill interrupted, if it is of the same rows and settings; otherwise begin."""
        about: dict[str, Any] = {"settings": self.settings, "source": self.source.fingerprint()}
        about["read"] = hashlib.sha256(self.read.tobytes()).hexdigest()
        try:
            if json.loads((self.aside / "about.json").read_bytes()) != about:
                raise ValueError
            self.columns = open_columns(self.aside, COLUMNS, "r+")
            self.done = open_columns(self.aside, {"done": np.uint8}, "r+")["done"]
        except (OSError, ValueError):
            shutil.rmtree(self.aside, ignore_errors=True)
            self.aside.mkdir()
            rows = len(self.source)
            self.columns = dict(new_columns(self.aside, COLUMNS, rows))
            self.done = new_columns(self.aside, {"done": np.uint8}, rows)["done"]
            (self.aside / REASONS).touch()
            self._note_known()
            (self.aside / "about.json").write_text(json.dumps(about))

    def _note_known(self) -> None:
        """Keys of the rows that the index of before has counted, in order, so that any process finds them."""
        if self.old is None:
            return
        keys = open_columns(self.old.folder, KEYS)
        at = np.flatnonzero((self.old.status == 0) & (keys["key_a"] != 0))
        at = at[np.argsort(keys["key_a"][at], kind="stable")]
        known = self.aside / "known"
        known.mkdir()
        for name, column in {**{name: keys[name][at] for name in KEYS}, "at": at.astype(np.int64)}.items():
            np.save(known / f"{name}.npy", column, allow_pickle=False)

    def _job(self) -> Job:
        known = self.aside / "known"
        reuses = self.old is not None and known.is_dir()
        return Job(
            self.source, self.writer, self.capacity, self.writer.processor.reader().limits, self.facts.path,
            known if reuses else None, self.target if reuses else None,
        )  # fmt: skip

    def _tasks(self, size: int) -> Iterator[Task]:
        for start in range(0, len(self.source), size):
            rows = range(start, min(start + size, len(self.source)))
            if not self.done[rows.start : rows.stop].all():
                yield rows, self.read[rows.start : rows.stop]

    # ------------------------------------------------------------ what is new

    def _save(self, waiting: list[Batch]) -> None:
        """Write batches down."""
        self.facts.add({key: found for batch in waiting for key, found in batch.facts.items()})
        for batch in waiting:
            for name, column in batch.columns.items():
                self.columns[name][batch.rows.start : batch.rows.stop] = column
            self.reused += batch.reused
            self.measured += len(batch.facts)
            self.decoded += batch.decoded
        with (self.aside / REASONS).open("a") as file:
            file.writelines(json.dumps(asdict(bad)) + "\n" for batch in waiting for bad in batch.bad)

    def _keep(self, waiting: list[Batch]) -> None:
        """Wait until what is written is on the disk, and only then say which batches are done."""
        for column in self.columns.values():
            column.flush()  # type: ignore[attr-defined]
        for batch in waiting:
            self.done[batch.rows.start : batch.rows.stop] = 1
        self.done.flush()  # type: ignore[attr-defined]

    def _publish(self) -> Index:
        bad = self._number_reasons()
        if bad and not (self.columns["status"] == 0).any():
            first = next(iter(bad.values()))
            raise ConfigError(
                f"{self.source.name}: not one row can be counted, so there is nothing to learn from. "
                f"The first one, {first.where}: {first.reason}"
            )
        known = int(np.count_nonzero(self.read)) - len(bad)
        made = Made(
            len(self.source), known - self.reused, self.reused, len(bad), self.measured, self.decoded, self.damaged
        )
        self.columns = {}
        self.done = np.zeros(0, np.uint8)
        shutil.rmtree(self.aside / "known", ignore_errors=True)
        for name in ("done.npy", "about.json"):
            (self.aside / name).unlink()
        hashes = "".join(digest(self.aside / f"{name}.npy") for name in PLANNED)
        share = self.writer.stage.describe
        head = {
            "version": VERSION,
            "settings": self.settings,
            "source": self.source.fingerprint(),
            "fingerprint": hashlib.sha256(hashes.encode()).hexdigest(),
            "bounds": 0 < share < 1 and self.writer.stage.rows != "text",
            "made": asdict(made),
        }
        seal(self.aside, head)
        publish(self.aside, self.target)
        return Index(self.target, head)

    def _number_reasons(self) -> dict[int, Reason]:
        """Give every row that could not be counted the number of its reason, in the order of the rows."""
        with (self.aside / REASONS).open("rb") as file:
            lines = [_parsed(line) for line in file]
        found = {reason.row: reason for reason in lines if reason is not None}
        status = self.columns["status"]
        bad = {row: found[row] for row in sorted(found) if status[row] > 0}
        for number, row in enumerate(bad, 1):
            status[row] = number
        (self.aside / REASONS).write_text("".join(json.dumps(asdict(reason)) + "\n" for reason in bad.values()))
        return bad


def _parsed(line: bytes) -> Reason | None:
    """A line of reasons; None where a kill cut it off."""
    try:
        return Reason(**json.loads(line))
    except (ValueError, TypeError):
        return None


def _settings(writer: StageWriter, capacity: int | None) -> str:
    """A digest of everything beside the rows that counts follow from."""
    processor, stage = writer.processor, writer.stage
    about = {
        "version": VERSION,
        "media": processor.media,
        "system": processor.system,
        "template": processor.tokens().template,
        "tokenizer": _tokenizer_digest(processor.tokenizer),
        "libraries": [version(name) for name in ("transformers", "tokenizers", "jinja2")],
        "stage": stage.model_dump(
            mode="json", include={"rows", "supervise", "state_tokens", "describe", "loss", "ctc"}
        ),
        "kinds": sorted(writer.kinds),
        "capacity": capacity,
        "limits": processor.reader().limits.model_dump(mode="json", exclude={"doors", "max_decode_s"}),
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = json.dumps(sorted(tokenizer.get_vocab().items())) if backend is None else backend.to_str()
    named = json.dumps({key: str(value) for key, value in tokenizer.special_tokens_map.items()}, sort_keys=True)
    return hashlib.sha256((text + named).encode(errors="replace")).hexdigest()
