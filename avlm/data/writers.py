"""Rows out: JSON lines with their media beside them, or tars of samples (WebDataset; `energon prepare` takes them).

Nothing of a sample is lost: reading what was written gives equal samples, whatever form they came in. It is written
aside and there when it is whole.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

from avlm.data.decoding.files import LIMITS, Limits, opened
from avlm.data.readers.endings import ending_of
from avlm.data.readers.taking import Progress, Ticker
from avlm.data.rows import RowSource
from avlm.errors import ConfigError, DataError
from avlm.samples import MediaItem, Sample, Text, Turn

To = Literal["jsonl", "webdataset", "energon"]
ROWS = "rows.jsonl"
SHARD_MB = 256
"""Size of a tar, about. Energon splits by tar, and a tar is what one process reads at a time."""
_CHUNK = 2**20
_KNOWN = 1024
"""Files that many rows share are copied once, if they come again among so many."""


@dataclass(slots=True)
class Converted:
    """What was written."""

    path: Path
    """The file of rows, or the folder of tars."""
    rows: int = 0
    media: int = 0
    """Files of media; one that several rows share is one in JSON lines."""
    bad: list[DataError] = field(default_factory=list)
    """Rows that could not be written, as a medium of theirs cannot be read."""


def convert_rows(
    source: RowSource,
    out: Path | str,
    *,
    to: To,
    limits: Limits = LIMITS,
    progress: Progress | None = None,
    shard_mb: float = SHARD_MB,
) -> Converted:
    """Write the rows of a source in another form.

    Args:
        out: Folder to be made. Rows are in `rows.jsonl` with their media in `media`, or tars are.
        to: ``jsonl``, ``webdataset``, or ``energon``: tars on which `energon prepare` is to be run.
        limits: What media may be, and where from.
        progress: Called with rows done and in all, where that takes longer than two seconds.
        shard_mb: Size of a tar, about.

    Raises:
        ConfigError: The folder is there already and holds something, or none of the rows could be written.
        OSError: It cannot be written.
    """
    ticker = Ticker(progress, len(source))

    def each() -> Iterable[tuple[Sample, str] | DataError]:
        for i, facts in enumerate(source.facts):
            try:
                yield source[i], facts.set
            except DataError as error:
                yield error
            ticker.at(i)

    made = write_rows(each(), Path(out), to=to, limits=limits, shard_mb=shard_mb)
    ticker.end()
    return made


def write_rows(
    rows: Iterable[tuple[Sample, str] | DataError],
    out: Path,
    *,
    to: To,
    limits: Limits = LIMITS,
    shard_mb: float = SHARD_MB,
) -> Converted:
    """As `convert_rows`, of samples and the sets that they are from, one at a time.

    Raises:
        ConfigError: The folder is there already and holds something, or none of the rows could be written.
        OSError: It cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: is there already. Give a folder that is not there yet")
    aside = out.with_name(f".{out.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    made = Converted(out)
    try:
        writer = _Lines(aside, limits) if to == "jsonl" else _Tars(aside, out.name, limits, round(shard_mb * 2**20))
        for row in rows:
            if isinstance(row, DataError):
                made.bad.append(row)
                continue
            try:
                writer.add(*row)
                made.rows += 1
            except DataError as error:
                where = error.where or row[0].where
                made.bad.append(DataError(error.reason, where=where, sample_id=row[0].id))
        made.path, made.media = out / writer.close(), writer.media
        if not made.rows:
            first = f" The first one: {made.bad[0]}" if made.bad else ""
            raise ConfigError(f"{out}: not one row could be written, so nothing is.{first}")
        os.replace(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return made


# ---------------------------------------------------------------- a sample as a row


def as_row(sample: Sample, name: str, place: Callable[[MediaItem], str]) -> dict[str, Any]:
    """A sample as a row of `messages`, from which an equal one is read.

    Args:
        name: The set that it is from.
        place: Puts a medium somewhere and says the path to it.
    """
    row: dict[str, Any] = {"id": sample.id}
    if sample.task:
        row["task"] = sample.task
    if name:
        row["set"] = name
    worse = {} if sample.rejected is None else {"rejected": _message(sample.rejected, place)}
    return row | {"messages": [_message(turn, place) for turn in sample.turns]} | worse


def _message(turn: Turn, place: Callable[[MediaItem], str]) -> dict[str, Any]:
    alone = len(turn.parts) == 1 and isinstance(turn.parts[0], Text)
    content: Any = turn.text() if alone else [_part(part, place) for part in turn.parts]
    message: dict[str, Any] = {"role": turn.role, "content": content}
    if turn.verbatim:
        message["verbatim"] = True
    if turn.state:
        message["state"] = turn.state
    if not turn.ended:
        message["ended"] = False
    if not turn.learned:
        message["weight"] = 0
    return message


def _part(part: Text | MediaItem, place: Callable[[MediaItem], str]) -> dict[str, Any]:
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    fetched = part.path is None and part.data is None and part.url
    found: dict[str, Any] = {"type": part.kind, **({"url": part.url} if fetched else {"path": place(part)})}
    if part.alt:
        found["alt"] = part.alt
    if part.start_s:
        found["start"] = part.start_s
    if part.end_s is not None:
        found["end"] = part.end_s
    return found


def _line(row: dict[str, Any], sample: Sample) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise DataError("holds half of a character, which no file of rows can. Write the whole one") from None


def _identity(item: MediaItem) -> tuple[Any, ...]:
    """What makes two media items of a row the same bytes."""
    return (item.kind, item.path, item.span, None if item.data is None else hashlib.sha256(item.data).digest())


# ---------------------------------------------------------------- JSON lines


class _Lines:
    """Rows in one file, media named by what is in them."""

    def __init__(self, folder: Path, limits: Limits) -> None:
        self.folder, self.limits = folder, limits
        self.media = 0
        self._known: dict[tuple[Any, ...], str] = {}
        self._file = (folder / ROWS).open("wb")

    def add(self, sample: Sample, name: str) -> None:
        self._file.write(_line(as_row(sample, name, self._place), sample) + b"\n")

    def close(self) -> Path:
        self._file.close()
        return Path(ROWS)

    def _place(self, item: MediaItem) -> str:
        identity = _identity(item)
        if identity not in self._known:
            if len(self._known) >= _KNOWN:
                del self._known[next(iter(self._known))]
            self._known[identity] = self._copied(item)
        return self._known[identity]

    def _copied(self, item: MediaItem) -> str:
        aside = self.folder / "medium.writing"
        digest = hashlib.sha256()
        with opened(item, self.limits) as source, aside.open("wb") as target:
            begins = chunk = source.read(_CHUNK)
            while chunk:
                digest.update(chunk)
                target.write(chunk)
                chunk = source.read(_CHUNK)
        name = digest.hexdigest()[:32]
        path = Path("media", name[:2], f"{name}.{ending_of(_called(item), begins, item.kind)}")
        if not (self.folder / path).exists():
            (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
            os.replace(aside, self.folder / path)
            self.media += 1
        aside.unlink(missing_ok=True)
        return path.as_posix()


def _called(item: MediaItem) -> str:
    return item.title or ("" if item.path is None else item.path.name)


# ---------------------------------------------------------------- tars


class _Tars:
    """Samples in tars of a size; all members of one stand together, its row last.

    Energon wants keys that are unique in all tars of a dataset, those of other folders too.
    """

    def __init__(self, folder: Path, name: str, limits: Limits, shard_bytes: int) -> None:
        self.folder, self.limits = folder, limits
        self.name = re.sub(r"[^\w-]", "_", name)
        self.shard_bytes = shard_bytes
        self.media = 0
        self._samples = self._shards = 0
        self._tar: tarfile.TarFile | None = None

    def add(self, sample: Sample, name: str) -> None:
        found: dict[tuple[Any, ...], tuple[str, MediaItem]] = {}

        def place(item: MediaItem) -> str:
            identity = _identity(item)
            if identity not in found:
                with opened(item, self.limits) as file:
                    begins = file.read(64)
                found[identity] = (f"{len(found)}.{ending_of(_called(item), begins, item.kind)}", item)
            return found[identity][0]

        row = _line(as_row(sample, name, place), sample)
        media = []
        for ending, item in found.values():  # all are opened before anything is written, so that a sample is whole
            with opened(item, self.limits) as file:
                media.append((ending, file.read()))
        tar = self._shard()
        key = f"{self.name}-{self._samples:08d}"
        for ending, data in [*media, ("json", row)]:
            _add(tar, f"{key}.{ending}", io.BytesIO(data), len(data))
        self._samples += 1
        self.media += len(media)

    def _shard(self) -> tarfile.TarFile:
        if self._tar is not None and self._tar.offset >= self.shard_bytes:
            self._tar.close()
            self._tar = None
        if self._tar is None:
            path = self.folder / f"{self.name}-{self._shards:06d}.tar"
            self._tar = tarfile.open(path, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115 (open from sample to sample)
            self._shards += 1
        return self._tar

    def close(self) -> Path:
        if self._tar is not None:
            self._tar.close()
        return Path()


def _add(tar: tarfile.TarFile, name: str, file: BinaryIO, size: int) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    tar.addfile(member, file)
