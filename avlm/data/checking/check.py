"""What is wrong with a data set: every row read, every medium decoded once, and whatever is there twice.

    rows     each row parsed again, its conversation looked at, its text in a few numbers     (`reading`)
    media    each medium once, however many rows share it: decoded, or its header read        (`look`)
    twice    equal and near rows, pictures and sounds, in one file and between two            (`doubles`)

What is kept of a row is about 100 bytes in columns, so that a million rows fit into any memory.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from avlm.config.media import MediaSpec
from avlm.data.checking.conversations import MARKERS
from avlm.data.checking.doubles import find_doubles
from avlm.data.checking.duplicates import equal_groups
from avlm.data.checking.histogram import Histogram, histogram
from avlm.data.checking.look import ANYTHING
from avlm.data.checking.problems import Findings, Problem, listed, worst
from avlm.data.checking.reading import Media, Rows, look_at_media, read_rows
from avlm.data.decoding.files import LIMITS, Limits
from avlm.data.rows import KINDS, RowSource
from avlm.data.workers.spread import Progress

NAMES = {"image": "pictures", "audio": "sounds", "video": "videos"}
SHARED = 0.02
"""A medium in more than this share of all rows, and in more than `SHARED_ROWS`, is told."""
SHARED_ROWS = 20


@dataclass(slots=True)
class StageFit:
    """What one stage makes of the rows."""

    name: str
    rows: int = 0
    """Rows that it reads."""
    unfit: int = 0
    """Rows of them that cannot be written down for the model, and are left out."""
    too_long: int = 0
    row_tokens: int | None = None
    """What a row of the stage holds; None where no stage was asked for."""
    tokens: int = 0
    """Of all rows that fit."""
    targets: int = 0
    """Tokens of these that are learned."""
    told: str = ""
    """What it leaves out for the media that rows hold."""
    lengths: Histogram | None = None


@dataclass(slots=True)
class CheckReport:
    """What a data set is like, and what is wrong with it."""

    data: str
    rows: int
    """Rows that can be read."""
    decoded: bool
    media: dict[str, int] = field(default_factory=dict)
    """Different media by kind; one that many rows share counts once."""
    tasks: dict[str, int] = field(default_factory=dict)
    findings: Findings = field(default_factory=Findings)
    bad: set[int] = field(default_factory=set)
    """Numbers of the rows that have an error."""
    histograms: list[Histogram] = field(default_factory=list)
    stages: list[StageFit] = field(default_factory=list)
    """What a training run would read, leave out and refuse, by stage."""
    seconds: float = 0.0

    @property
    def problems(self) -> list[Problem]:
        """What is wrong, the worst first."""
        return self.findings.problems()

    def fine(self) -> bool:
        """Whether nothing is wrong: notes are no fault."""
        return worst(self.problems) in (None, "note")

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "data": self.data,
            "fine": self.fine(),
            "rows": self.rows,
            "decoded": self.decoded,
            "media": self.media,
            "tasks": self.tasks,
            "problems": [problem.as_dict() for problem in self.problems],
            "histograms": [each.as_dict() for each in self.histograms],
            "stages": [asdict(stage) for stage in self.stages],
            "seconds": round(self.seconds, 1),
        }


def check_data(
    source: RowSource,
    *,
    against: RowSource | None = None,
    decode: bool = True,
    media: MediaSpec = ANYTHING,
    markers: Sequence[str] = MARKERS,
    limits: Limits = LIMITS,
    base: str = "",
    workers: int = 0,
    progress: Progress | None = None,
) -> CheckReport:
    """Find out what is wrong with the rows of a source.

    Args:
        against: Held-out rows; what both have is told. What is wrong with them alone is not.
        decode: Decode every medium; otherwise its header is read.
        media: Which frames of a video are looked at.
        markers: What no text may spell.
        base: Folder of the data: media in it are named from there.
        workers: Processes that read and decode; 0 does it in this one.
        progress: Told ``(what, done, all)``.
    """
    began = time.monotonic()
    findings = Findings(base)
    sets = [
        read_rows(each, markers, workers=workers, progress=progress, name=f"rows of {each.name}")
        for each in (source, against)
        if each is not None
    ]
    shown = look_at_media(sets, limits, media, decode=decode, workers=workers, progress=progress)
    rows = sets[0]
    for error in source.errors:
        findings.add_message(error.where, error.reason)
    for severity, title, row, message in rows.odd:
        findings.add(severity, title, source.where(row), message)
    _tell_ids(rows, findings)
    _tell_media(rows, shown, findings)
    _tell_shared(rows, shown, findings)
    find_doubles(sets, shown, findings, limits, media, workers=workers, progress=progress)
    bad = {row for severity, _, row, _ in rows.odd if severity == "error"}
    bad |= {row for number in shown.problem for row, _ in shown.rows_with(number, 0)}
    return CheckReport(
        source.name,
        len(source),
        decode,
        _counts(rows, shown),
        _tasks(source),
        findings,
        bad,
        histograms_of(rows, shown),
        seconds=time.monotonic() - began,
    )


def _tell_ids(rows: Rows, findings: Findings) -> None:
    for group in equal_groups(rows.id):
        first = rows.where(group[0])
        name = rows.source[int(group[0])].id
        for row in group[1:]:
            message = f'has the id "{name}", and so has {first}. Give each row an id of its own'
            findings.add("warning", "an id that another row has", f"{rows.where(row)} (as {first})", message)


def _tell_media(rows: Rows, shown: Media, findings: Findings) -> None:
    """What is wrong with media, told of each row that they are in."""
    for number, message in sorted((shown.problem | shown.odd).items()):
        severity: Any = "error" if number in shown.problem else "warning"
        for row, at in shown.rows_with(number, 0):
            item = rows.source[row].media()[at]
            findings.add_message(rows.where(row), message, item.name(), severity)


def _tell_shared(rows: Rows, shown: Media, findings: Findings) -> None:
    counts = shown.count(0)
    many = np.flatnonzero((counts > SHARED_ROWS) & (counts > SHARED * max(1, len(rows))))
    for number in many[np.argsort(-counts[many], kind="stable")]:
        places = shown.rows_with(int(number), 0)
        name = rows.source[places[0][0]].media()[places[0][1]].name()
        where = listed([rows.where(row) for row, _ in places[:3]], 3, int(counts[number]))
        findings.add(
            "note",
            "a medium that many rows share",
            f"{name}: {where}",
            f"{name} is in {counts[number]:,} rows, so much of what is learned is learned of it",
        )


def _counts(rows: Rows, shown: Media) -> dict[str, int]:
    there = shown.count(0) > 0
    return {kind: n for i, kind in enumerate(KINDS) if (n := int((there & (shown.kind == i)).sum()))}


def _tasks(source: RowSource) -> dict[str, int]:
    numbers, counts = np.unique(source.facts.task, return_counts=True)
    named = [(source.facts.tasks[int(i)], int(n)) for i, n in zip(numbers, counts, strict=True)]
    return dict(sorted(named, key=lambda entry: (-entry[1], entry[0])))


def histograms_of(rows: Rows, shown: Media) -> list[Histogram]:
    """How long answers, sounds and videos are, and how large pictures."""
    there = shown.count(0) > 0
    found = [histogram("characters of a row's text", "", rows.characters)]
    for i, kind in enumerate(KINDS):
        mine = there & (shown.kind == i)
        if kind != "image":
            lasting = shown.seconds[mine & (shown.seconds > 0)]
            found.append(histogram(f"seconds of {NAMES[kind]}", "s", lasting))
        if kind != "audio":
            sizes = shown.size_px[mine & (shown.size_px[:, 0] > 0)]
            found.append(histogram(f"longer side of {NAMES[kind]}", "px", sizes.max(1) if len(sizes) else sizes))
    return [each for each in found if each is not None]
