"""What is there twice, or nearly: rows and media of one file, and of held-out rows that were trained on."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from avlm.config.media import MediaSpec
from avlm.data.checking.duplicates import band_pairs, equal_groups, first_of_each, groups_of, mixed, near_pairs
from avlm.data.checking.look import View, view_of
from avlm.data.checking.problems import Findings, Severity
from avlm.data.checking.reading import FindMedia, Media, Rows
from avlm.data.checking.sketch import NEAR_TEXT, resemblance
from avlm.data.decoding.files import Limits
from avlm.data.rows import KINDS, RowSource
from avlm.data.workers.spread import Progress, spread
from avlm.errors import DataError
from avlm.samples import Text

VIEWS = 32
"""Decoded media that are kept to be compared again."""
COMPARED = 50_000
"""Pairs of one kind that are compared; more are told to be too many."""
ALIKE = {"image": "look alike", "audio": "sound alike", "video": "look alike"}
NAMED = {"image": "pictures", "audio": "sounds", "video": "videos"}


def find_doubles(
    sets: Sequence[Rows],
    media: Media,
    findings: Findings,
    limits: Limits,
    spec: MediaSpec,
    *,
    workers: int = 0,
    progress: Progress | None = None,
) -> None:
    """Tell what is there twice in the first set, and what the second one has of it."""
    rows = _Doubles(sets, media, findings)
    rows.equal_rows()
    rows.equal_media()
    rows.near_rows(workers, progress)
    rows.near_media(limits, spec, workers, progress)


class _Doubles:
    def __init__(self, sets: Sequence[Rows], media: Media, findings: Findings) -> None:
        self.sets, self.media, self.findings = sets, media, findings
        self.border = len(sets[0])
        """Rows from this number on are held out."""
        self.of_media = np.concatenate([media.of_rows(i) for i in range(len(sets))])
        self.text = np.concatenate([rows.text for rows in sets])
        self.whole = mixed(self.text, self.of_media)
        self.whole[self.text == 0] = 0

    # ------------------------------------------------------------ rows

    def equal_rows(self) -> None:
        for group in equal_groups(self.whole):
            mine, theirs = group[group < self.border], group[group >= self.border]
            for row in mine[1:]:
                self._tell_rows("warning", "a row that is there twice", "says the same", mine[0], row)
            for row in theirs if len(mine) else ():
                self._tell_leak("a held-out row that is also trained on", "says the same", mine[0], row)
        if len(self.sets) > 1:
            self._equal_questions()

    def _equal_questions(self) -> None:
        """Held-out questions about the same media that are trained on with another answer."""
        asked = np.concatenate([rows.asked for rows in self.sets])
        question = mixed(asked, self.of_media)
        question[asked == 0] = 0
        learned = np.isin(self.whole, self.whole[: self.border])
        for group in equal_groups(question):
            mine, theirs = group[group < self.border], group[group >= self.border]
            for row in theirs[~learned[theirs]] if len(mine) else ():
                self._tell_leak(
                    "a held-out question that is trained on with another answer", "asks the same", mine[0], row
                )

    def near_rows(self, workers: int, progress: Progress | None) -> None:
        firsts = first_of_each(self.whole)
        bands = np.concatenate([rows.bands for rows in self.sets])[firsts]
        pairs = firsts[band_pairs(bands, self.of_media[firsts])]
        near = self._compared(pairs, "near rows", NearRows(self.media.find.sources, self.border), workers, progress)
        for group in groups_of(near):
            mine = [row for row in group if row < self.border]
            for row in mine[1:]:
                self._tell_rows("note", "a row that is nearly there twice", "says nearly the same", mine[0], row)
            for row in group if mine else ():
                if row >= self.border:
                    self._tell_leak("a held-out row that is nearly trained on", "says nearly the same", mine[0], row)

    def _of(self, row: int) -> tuple[Rows, int]:
        return (self.sets[0], int(row)) if row < self.border else (self.sets[1], int(row) - self.border)

    def _where(self, row: int) -> str:
        rows, own = self._of(row)
        return rows.where(own)

    def _tell_rows(self, severity: Severity, title: str, does: str, first: int, row: int) -> None:
        one, other = self._where(first), self._where(row)
        message = f"{other} {does} as {one}, about the same media. Remove one of them, unless both are meant"
        self.findings.add(severity, title, f"{other} (as {one})", message)

    def _tell_leak(self, title: str, does: str, first: int, row: int) -> None:
        one, other = self._where(first), self._where(row)
        message = f"{other} {does} as {one}, so what is measured on it was learned. Remove one of the two"
        self.findings.add("warning", title, f"{other} (as {one})", message)

    # ------------------------------------------------------------ media

    def equal_media(self) -> None:
        for group in equal_groups(self.media.digest):
            self._tell_media([int(number) for number in group], "are the same", "warning", "is the same as")
        if len(self.sets) > 1:
            for number in np.flatnonzero((self.media.count(0) > 0) & (self.media.count(1) > 0)):
                one, other = (self.media.place(int(number), which) for which in (0, 1))
                title = f"held-out {self._named(int(number))} that are also trained on"
                self.findings.add("warning", title, f"{other} (as {one})", f"{other} is also in {one}")

    def near_media(self, limits: Limits, spec: MediaSpec, workers: int, progress: Progress | None) -> None:
        for number, kind in enumerate(KINDS):
            mine = np.flatnonzero((self.media.kind == number) & (self.media.sketch != 0).any(1))
            firsts = mine[first_of_each(self.media.known()[mine])]
            pairs = firsts[near_pairs(self.media.sketch[firsts])]
            alike = NearMedia(self.media.find, limits, spec)
            near = self._compared(pairs, f"near {NAMED[kind]}", alike, workers, progress)
            for group in groups_of(near):
                self._tell_media(group, f"are different files and {ALIKE[kind]}", "note", f"{ALIKE[kind]}:")

    def _named(self, number: int) -> str:
        return NAMED[KINDS[int(self.media.kind[number])]]

    def _tell_media(self, group: Sequence[int], are: str, leak: Severity, word: str) -> None:
        """Different files that hold the same: in the first set a note; a leak where the second has one of them."""
        there = [self.media.count(i) for i in range(len(self.sets))]
        mine = [number for number in group if there[0][number]]
        if not mine:
            return
        one, kind = self.media.place(mine[0], 0), self._named(mine[0])
        for number in mine[1:]:
            other = self.media.place(number, 0)
            self.findings.add("note", f"{kind} that {are}", f"{other} (as {one})", f"{other} {word} {one}")
        for number in group if len(self.sets) > 1 else ():
            if there[1][number] and not there[0][number]:
                other = self.media.place(number, 1)
                title = f"held-out {kind} that {are} as trained ones"
                self.findings.add(leak, title, f"{other} (as {one})", f"{other} {word} {one}")

    # ------------------------------------------------------------ pairs

    def _compared(
        self,
        pairs: np.ndarray,
        name: str,
        alike: Callable[[tuple[int, int]], bool],
        workers: int,
        progress: Progress | None,
    ) -> list[tuple[int, int]]:
        """Those of some candidates that are alike."""
        if len(pairs) > COMPARED:
            message = f"{len(pairs):,} pairs may be nearly the same, and the first {COMPARED:,} were compared"
            self.findings.add("note", f"{name}: more candidates than are compared", "", message, len(pairs) - COMPARED)
        listed = [(int(one), int(other)) for one, other in pairs[:COMPARED]]
        answers = spread(alike, listed, lost=_unlike, workers=workers, part=16, name=name, progress=progress)
        return [pair for pair, yes in zip(listed, answers, strict=True) if yes]


def _unlike(pair: tuple[int, int], why: str) -> bool:
    return False


@dataclass(slots=True)
class NearRows:
    """Whether two rows say nearly the same, in any process; those of the second source are numbered from the border."""

    sources: Sequence[RowSource]
    border: int

    def __call__(self, pair: tuple[int, int]) -> bool:
        one, other = map(self._words, pair)
        return resemblance(one, other) >= NEAR_TEXT

    def _words(self, row: int) -> str:
        sample = self.sources[0][row] if row < self.border else self.sources[1][row - self.border]
        return "\n".join(part.text for turn in sample.turns for part in turn.parts if isinstance(part, Text))


@dataclass(slots=True)
class NearMedia:
    """Whether two media show or let hear nearly the same, in any process."""

    find: FindMedia
    limits: Limits
    spec: MediaSpec
    _views: OrderedDict[int, View | None] = field(default_factory=OrderedDict)
    """Of those that were compared last: one is compared with several."""

    def __call__(self, pair: tuple[int, int]) -> bool:
        one, other = map(self._view, pair)
        return one is not None and other is not None and one.same(other)

    def _view(self, number: int) -> View | None:
        if number not in self._views:
            try:
                self._views[number] = view_of(self.find(number), self.limits, self.spec)
            except DataError:
                self._views[number] = None
        self._views.move_to_end(number)
        if len(self._views) > VIEWS:
            self._views.popitem(last=False)
        return self._views[number]
