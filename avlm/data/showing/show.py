"""A page that shows and plays samples: media, conversation, tokens by place, label and pack.

One file that needs nothing but a browser. All text on it comes from data and is escaped; the only
script that it runs is its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from avlm.config.data import DataConfig
from avlm.config.stage import Stage
from avlm.data.checking.look import ANYTHING, decoded_of
from avlm.data.decoding.doors import doors_of
from avlm.data.decoding.files import Limits, limits_of
from avlm.data.loader import StepLoader
from avlm.data.media.reader import MediaReader, Prepared
from avlm.data.processor import AvlmProcessor
from avlm.data.rows import RowSource
from avlm.data.selection import own_kinds, usable, video_senses
from avlm.data.showing.media import Shown
from avlm.data.showing.page import document, esc, note, percent
from avlm.data.showing.style import SCRIPT, STYLE
from avlm.data.showing.tokens import counts_of, seen_html, tokens_html
from avlm.data.staged import StageWriter
from avlm.data.workers.spread import Progress
from avlm.errors import AvlmError, ConfigError, DataError
from avlm.samples import Encoded, Row, Sample, Text, Turn

MOST = 200
"""Rows on one page."""
HUES = 6
_NUMBERED = re.compile(r" (?:line|row) (\d+)$")


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which rows go onto the page.

    Attributes:
        numbers: Lines of the file, or numbers of rows where there are no lines, from 1. None: the rows of the first
            step of a run, where there is one, else the first 20. Not asked where something else says which.
    """

    numbers: frozenset[int] | None = None
    task: str | None = None
    id: str | None = None
    bad: bool = False


def numbers_of(text: str) -> frozenset[int]:
    """Numbers as people write them: ``1-20``, ``3,7,40-42``.

    Raises:
        ConfigError: They are none.
    """
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,12})\s*(?:-\s*(\d{1,12})\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if not 1 <= first <= last:
            raise ConfigError(
                f"--rows {text}: {part.strip() or 'nothing'} is no number of a row. Write 1-20, or 3,7,40-42"
            )
        found |= set(range(first, min(last, first + MOST - 1) + 1))
    return frozenset(found)


def write_page(
    out: Path,
    source: RowSource,
    wanted: Wanted,
    processor: AvlmProcessor | None = None,
    stages: Sequence[Stage] = (),
    data: DataConfig | None = None,
    *,
    progress: Progress | None = None,
) -> int:
    """Write the page.

    Args:
        processor: Of a model: tokens are shown as it counts them.
        stages: Of a run: tokens are shown as the last of them that reads a row does, and how its first step is packed.

    Returns:
        How many rows are on it.

    Raises:
        ConfigError: No row is among those that are wanted.
    """
    data = data or DataConfig()
    limits = limits_of(data.limits, doors_of(data, source.roots))
    reader = None if processor is None else _Reader(source, processor, stages, data, limits)
    packs = [] if reader is None else reader.packs()
    rows = list(_chosen(source, wanted, reader, limits, progress))
    unread = source.errors[:MOST] if wanted.bad else []
    if not rows and not unread:
        raise ConfigError(_none(source, wanted))
    page = _Page(source, reader, Shown(ANYTHING if processor is None else processor.media_spec(), limits))
    cards = []
    for done, row in enumerate(rows, 1):
        cards.append(page.card(row))
        if progress is not None:
            progress("samples", done, len(rows))
    cards += [_unread(error) for error in unread]
    body = page.head(rows, len(cards)) + _packs(packs, page.ids) + _tools(page) + f"<main>{''.join(cards)}</main>"
    html = document(f"{source.name} - avlm data", body, style=STYLE, script=SCRIPT)
    html = html.replace("<body>", '<body data-colour="place">', 1)
    aside = out.with_name(f".{out.name}.writing")
    aside.write_bytes(html.encode("utf-8", "replace"))
    aside.replace(out)
    return len(cards)


# ---------------------------------------------------------------- which rows


def _chosen(
    source: RowSource, wanted: Wanted, reader: _Reader | None, limits: Limits, progress: Progress | None
) -> Iterator[int]:
    found = 0
    for row in range(len(source)):
        if progress is not None and row % 100 == 0:
            progress("rows", row, len(source))
        if found < MOST and _is_wanted(source, row, wanted, reader, limits):
            found += 1
            yield row


def _is_wanted(source: RowSource, row: int, wanted: Wanted, reader: _Reader | None, limits: Limits) -> bool:
    if wanted.task is not None and source.facts[row].task != wanted.task:
        return False
    if wanted.id is not None:
        try:
            return source[row].id == wanted.id
        except DataError:
            return False
    if wanted.bad:
        return _wrong(source, row, reader, limits) != ""
    if wanted.task is not None:
        return True
    if wanted.numbers is None and reader is not None and reader.place:
        return reader.is_in_step(row)
    match = _NUMBERED.search(source.where(row))
    return (int(match[1]) if match else row + 1) in (wanted.numbers or range(1, 21))


def _wrong(source: RowSource, row: int, reader: _Reader | None, limits: Limits) -> str:
    """Why a row cannot be used; empty if it can."""
    try:
        sample = source[row]
        if reader is not None:
            reader.read(sample, row)
        else:
            for item in sample.media():
                decoded_of(item, limits)
    except AvlmError as error:
        return error.reason if isinstance(error, DataError) else str(error)
    return ""


def _none(source: RowSource, wanted: Wanted) -> str:
    if wanted.id is not None:
        return f"--id {wanted.id}: no row of {source.name} has this id. Look it up with grep, or show rows with --rows"
    if wanted.bad:
        return f"--bad: every row of {source.name} can be used, so there is none to show. Leave --bad out"
    if wanted.task is not None:
        tasks = ", ".join(sorted(name or "(none)" for name in source.facts.tasks)[:20])
        return f"--task {wanted.task}: no row of {source.name} is of this task. Its tasks are {tasks}"
    return f"--rows: none of these rows can be read in {source.name}, which has {len(source)}. Choose others"


# ---------------------------------------------------------------- as a model reads them


class _Reader:
    """Rows as a model reads them, in the last stage that does."""

    def __init__(
        self,
        source: RowSource,
        processor: AvlmProcessor,
        stages: Sequence[Stage],
        data: DataConfig,
        limits: Limits,
    ) -> None:
        self.source, self.processor, self.data = source, processor, data
        if data.system is not None:
            processor.use_system(data.system)
        spec = processor.media_spec()
        processor.use_reader(MediaReader(spec, data.cache_mb, limits))
        self.spec = spec
        self.video = video_senses(spec.audio is not None, spec.video.order)
        self.stages = [stage for stage in stages if stage.data is None]
        self.rows = [frozenset(usable(source.facts, stage, self.video)) for stage in self.stages]
        self.place: dict[str, tuple[int, int]] = {}
        """By id, the row of the last stage's first step that a sample is packed in, and where it is in that."""

    def stage_of(self, row: int) -> Stage | None:
        """The last stage that reads a row."""
        reading = [stage for stage, rows in zip(self.stages, self.rows, strict=True) if row in rows]
        return reading[-1] if reading else None

    def writer(self, stage: Stage | None) -> AvlmProcessor:
        return (
            self.processor if stage is None or stage.template is None else self.processor.with_template(stage.template)
        )

    def read(self, sample: Sample, row: int) -> tuple[Encoded, list[Prepared]]:
        """A sample as tokens, and its media as the encoders take them, if all of them are read as media.

        Raises:
            DataError: It cannot be written down.
        """
        stage = self.stage_of(row)
        if stage is None:
            prepared = self.processor.prepare(sample)
            return self.processor.encode(sample, prepared=prepared), prepared
        writer = StageWriter(stage, self.writer(stage), own_kinds(stage, self.video))
        encoded = writer.encode(sample, row, 0)
        whole = len({place.item for place in encoded.places}) == len(sample.media())
        return encoded, self.processor.prepare(sample) if whole else []

    def is_in_step(self, row: int) -> bool:
        """Whether a row is in the step that is shown."""
        try:
            return self.source[row].id in self.place
        except DataError:
            return False

    def packs(self) -> list[tuple[Stage, list[Row]]]:
        """How the first step of the last stage that reads any row is packed."""
        for stage in reversed(self.stages):
            try:
                loader = StepLoader(self.source, stage, self.writer(stage), self.data, 0, self.video)
                rows = loader.step(0).rows
            except AvlmError:
                continue
            for number, row in enumerate(rows):
                for at, name in enumerate(row.ids):
                    self.place[name] = number, at
            return [(stage, rows)]
        return []


# ---------------------------------------------------------------- the page


@dataclass(slots=True)
class _Page:
    source: RowSource
    reader: _Reader | None
    shown: Shown
    ids: dict[str, int] = field(default_factory=dict)
    tasks: set[str] = field(default_factory=set)

    def head(self, rows: Sequence[int], count: int) -> str:
        full = (
            note(f"{self.shown.named} media found no room on this page. Choose fewer rows") if self.shown.named else ""
        )
        most = note(f"Only the first {MOST} rows are shown.") if len(rows) == MOST else ""
        return (
            f'<header><p class="quiet">avlm data show</p><h1 dir="auto">{esc(self.source.name)}</h1>'
            f"<p>{count:,} of {len(self.source) + len(self.source.errors):,} rows</p>{full}{most}</header>"
        )

    def card(self, row: int) -> str:
        """One sample."""
        try:
            sample = self.source[row]
        except DataError as error:
            return _unread(error)
        self.ids[sample.id] = row
        self.tasks.add(sample.task)
        chips, tokens, seen, wrong = self._tokens(sample, row)
        figures = [
            self.shown.figure(item, number, seen[number - 1] if number <= len(seen) else "")
            for number, item in enumerate(sample.media(), 1)
        ]
        turns = _turns(sample)
        media = f'<div class="media">{"".join(figures)}</div>' if figures else ""
        problem = f'<p class="wrong">{esc(wrong)}</p>' if wrong else ""
        hue = self._hue(sample.id)
        kinds = " ".join(sorted(sample.kinds())) or "text"
        body = f'<div class="body{"" if figures else " plain"}">{media}<div>{turns}{problem}{tokens}</div></div>'
        return (
            f'<article class="card {hue}" tabindex="-1" id="row-{row}" data-task="{esc(sample.task)}" '
            f'data-kinds="{esc(kinds)}"><header>{_named(sample.id, self.source.where(row))}{chips}</header>{body}'
            "</article>"
        )

    def _hue(self, name: str) -> str:
        place = None if self.reader is None else self.reader.place.get(name)
        return "" if place is None else f"hue{place[1] % HUES}"

    def _tokens(self, sample: Sample, row: int) -> tuple[str, str, list[str], str]:
        """Chips with counts, the tokens, what the encoders see of each medium, and what is wrong."""
        chips = [f'<span class="chip">{esc(sample.task)}</span>'] if sample.task else []
        if self.reader is None:
            return "".join(chips), "", [], ""
        try:
            encoded, prepared = self.reader.read(sample, row)
        except AvlmError as error:
            return "".join(chips), "", [], error.reason if isinstance(error, DataError) else str(error)
        counts = counts_of(encoded)
        chips += [f'<span class="chip {kind}-chip">{count:,} {kind}</span>' for kind, count in counts.items()]
        place = self.reader.place.get(sample.id)
        if place is not None:
            chips.append(f'<span class="chip">row {place[0] + 1} of the first step</span>')
        stage = self.reader.stage_of(row)
        how = "" if stage is None else f" in stage {stage.name}"
        coded = (
            f'<details class="coded" open><summary>{len(encoded.ids):,} tokens as they are read{esc(how)}</summary>'
            f"{tokens_html(encoded, self.reader.processor)}</details>"
        )
        sizes = {p.item: sum(s.count for s in p.segments if s.kind != "text") for p in encoded.places}
        seen = [seen_html(each, self.reader.spec, sizes.get(i, 0)) for i, each in enumerate(prepared)]
        if encoded.rejected is not None:
            coded += (
                f'<details class="coded"><summary>{len(encoded.rejected.ids):,} tokens with the worse answer</summary>'
                f"{tokens_html(encoded.rejected, self.reader.processor)}</details>"
            )
        return "".join(chips), coded, seen, ""


def _turns(sample: Sample) -> str:
    numbers: dict[str, int] = {}
    turns = "".join(_turn(turn, numbers) for turn in sample.turns)
    worse = "" if sample.rejected is None else _turn(sample.rejected, numbers, "the worse answer")
    return f"<dl>{turns}{worse}</dl>"


def _turn(turn: Turn, numbers: dict[str, int], name: str = "") -> str:
    parts = []
    for part in turn.parts:
        if isinstance(part, Text):
            parts.append(f'<span dir="auto">{esc(part.text)}</span>')
        else:
            numbers["all"] = numbers.get("all", 0) + 1
            parts.append(f'<span class="place {part.kind}">{part.kind} {numbers["all"]}</span>')
    words = (" " if turn.verbatim else "\n").join(parts) or "<i>nothing</i>"
    told = [*([turn.state] if turn.state else []), *([] if turn.learned else ["not learned"])]
    state = f" ({esc(', '.join(told))})" if told else ""
    return f'<div class="turn {turn.role}"><dt>{name or turn.role}{state}</dt><dd>{words}</dd></div>'


def _named(name: str, where: str) -> str:
    """What a row is called and where it lies; once where it is called by that."""
    place = "" if name == where else f"<small>{esc(where)}</small>"
    return f'<h3 dir="auto">{esc(name)}</h3>{place}'


def _unread(error: DataError) -> str:
    return (
        '<article class="card" tabindex="-1" data-task="" data-kinds="">'
        f"<header>{_named(error.sample_id or 'a row that cannot be read', error.where)}</header>"
        f'<p class="wrong">{esc(error.reason)}</p></article>'
    )


def _packs(packs: Sequence[tuple[Stage, list[Row]]], there: dict[str, int]) -> str:
    """How a step is packed: a bar for each row, a stretch of it for each sample."""
    found = []
    for stage, rows in packs:
        used = sum(sum(row.lengths) for row in rows)
        fill = percent(used / max(1, stage.row_tokens * len(rows)))
        samples = sum(len(row.ids) for row in rows)
        told = (
            f"{samples} samples in {len(rows)} row{'' if len(rows) == 1 else 's'} of {stage.row_tokens:,} tokens, "
            f"{fill} full"
        )
        bars = "".join(_pack(row, stage.row_tokens, there) for row in rows[:40])
        head = f"<h3>The first step of stage {esc(stage.name)}</h3>"
        found.append(f'<section class="packs">{head}<p class="quiet">{told}</p>{bars}</section>')
    return "".join(found)


def _pack(row: Row, capacity: int, there: dict[str, int]) -> str:
    parts = []
    for at, (name, length) in enumerate(zip(row.ids, row.lengths, strict=True)):
        share = 100 * length / capacity
        label = esc(f"{name}: {length} tokens")
        leads = f' href="#row-{there[name]}"' if name in there else ""
        parts.append(
            f'<a class="hue{at % HUES}"{leads} style="width:{share:.3f}%" title="{label}" aria-label="{label}">'
            f"{length if share > 3 else ''}</a>"
        )
    return f'<div class="pack">{"".join(parts)}</div>'


def _tools(page: _Page) -> str:
    """What the page is searched and coloured with."""
    tasks = "".join(f'<option value="={esc(task)}">{esc(task or "(none)")}</option>' for task in sorted(page.tasks))
    chosen = f'<select id="task" aria-label="task"><option value="">all tasks</option>{tasks}</select>'
    kinds = "".join(
        f'<label><input type="checkbox" class="kind" value="{kind}"> {kind}</label>'
        for kind in ("image", "audio", "video")
    )
    checked = {"place": " checked"}
    colours = "".join(
        f'<label><input type="radio" name="colour" value="{name}"{checked.get(name, "")}> {name}</label>'
        for name in ("place", "label", "pack")
    )
    coloured = ""
    if page.reader is not None:
        coloured = f'<span role="group" aria-label="colour tokens by"><small>colour by</small> {colours}</span>'
    keys = "<kbd>/</kbd> search <kbd>j</kbd> <kbd>k</kbd> next, last" + (
        " <kbd>t</kbd> tokens" if page.reader is not None else ""
    )
    return (
        '<div class="tools" role="search"><input type="search" id="search" placeholder="search" aria-label="search">'
        f'{chosen if len(page.tasks) > 1 else ""}{kinds}{coloured}<small id="shown" aria-live="polite"></small>'
        f'<small class="keys">{keys}</small></div>'
    )
