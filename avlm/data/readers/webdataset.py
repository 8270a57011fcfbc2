"""Samples in tars (WebDataset): an index of where each begins, made by reading headers and texts and no media.

A truncated or damaged tar is read as far as it is whole, and named.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from avlm.config.data import DataConfig
from avlm.data.forms.fields import Field
from avlm.data.forms.folders import Beside, Folders, folders_of
from avlm.data.forms.parse import recognise
from avlm.data.forms.tars import CutError, Member, Tar
from avlm.data.readers.members import Fields, natural_row, split_name
from avlm.data.readers.taking import Parser, Progress, Ticker, shares
from avlm.data.rownumbers import Columns
from avlm.data.rows import RowTable, facts_of
from avlm.errors import ConfigError, DataError
from avlm.samples import Sample

Shape = Callable[[Fields], dict[str, Any]]
"""Makes a row of a sample's members."""

_NUMBERED = re.compile(r"(\D*)([0-9]+)\.")
"""The ending of one of several members of a kind: ``0.png``, ``image_12.jpg``."""
_BRACES = re.compile(r"\{([^{}]*)\}")
_MAX_NAMES = 1_000_000


class WebDataset:
    """The samples of some tars.

    Args:
        tars: The tars, in order.
        data: Where media lie that are not in the tars, and which share of each set is read.
        name: What to call it.
        columns: What the members are, where their endings do not say it.
        shape: Makes a row of a sample's members, where neither do columns nor the members themselves.
        taken: Which samples are read, by the name of their tar, their key and their number; default: all.
        progress: Called with bytes done and in all, where that takes longer than two seconds.

    Raises:
        ConfigError: A tar is missing or compressed, or no sample can be read.
    """

    def __init__(
        self,
        tars: Sequence[Path],
        data: DataConfig | None = None,
        *,
        name: str = "",
        columns: Mapping[str, Field] | None = None,
        shape: Shape = natural_row,
        taken: Callable[[Path, str, int], bool] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.tars = list(tars)
        self.name = name or self.tars[0].name
        self.kind = f"{len(tars)} tar{'' if len(tars) == 1 else 's'} of samples (WebDataset)"
        self.folders: Folders = folders_of(self.tars[0], data or DataConfig())
        self.roots = tuple(dict.fromkeys([*(path.parent for path in self.tars), self.folders.base]))
        self.parser = Parser(self.folders, columns)
        self.shape = shape
        self.facts = RowTable()
        self.errors: list[DataError] = []
        self.counts = [0] * len(self.tars)
        """Samples of each tar, those that cannot be read too."""
        self._places = Columns(tar="i", begins="q", ends="q")
        self._scan(taken, progress)
        if not self.facts:
            first = f" The first one: {self.errors[0]}" if self.errors else " They hold none."
            raise ConfigError(f"{self.name}: has no sample that can be read, so there is nothing to learn from.{first}")
        kept = shares(self.facts, self.folders)
        if kept is not None:
            self.facts, self._places = self.facts.kept(kept), self._places.kept(kept)

    # ------------------------------------------------------------ the index

    def _scan(self, taken: Callable[[Path, str, int], bool] | None, progress: Progress | None) -> None:
        digest = hashlib.sha256()
        sizes = [path.stat().st_size if path.is_file() else 0 for path in self.tars]
        ticker, before = Ticker(progress, sum(sizes)), 0
        for number, path in enumerate(self.tars):
            with Tar(path) as tar:
                for key, members in self._groups(tar):
                    count = sum(self.counts)
                    self.counts[number] += 1
                    if taken is None or taken(path, key, count):
                        self._take(number, tar, key, members, digest)
                    ticker.at(before + members[-1].ends)
            before += sizes[number]
        ticker.end()
        self._digest = digest.hexdigest()

    def _groups(self, tar: Tar) -> Iterator[tuple[str, list[Member]]]:
        """The samples of a tar that are whole; what is not is noted."""
        key: str | None = None
        members: list[Member] = []
        try:
            for member in tar.members():
                named = split_name(member.name)
                if named is None:
                    continue
                if named[0] != key and members:
                    yield key or "", members
                    members = []
                key = named[0]
                members.append(member)
        except CutError as error:
            self.errors.append(error)
            cut = split_name(error.name)
            if cut is not None and cut[0] == key:
                return  # a part of this sample is lost
        if members:
            yield key or "", members

    def _take(self, number: int, tar: Tar, key: str, members: list[Member], digest: Any) -> None:
        try:
            sample, name = self._parse(tar, key, members)
        except DataError as error:
            self.errors.append(error)
            return
        for member in members:
            digest.update(f"{member.name}\0{member.size}\0".encode())
        digest.update(repr([(turn.role, turn.text(), turn.state) for turn in sample.turns]).encode())
        digest.update(b"".join(b"\0not learned %d" % i for i, turn in enumerate(sample.turns) if not turn.learned))
        self.facts.append(facts_of(sample, name))
        self._places.append(number, members[0].begins, members[-1].ends)

    # ------------------------------------------------------------ rows

    def _parse(self, tar: Tar, key: str, members: Sequence[Member]) -> tuple[Sample, str]:
        where = f"{tar.path.name} {key}"
        by_ending = _counted({named[1]: m for m in members if (named := split_name(m.name)) is not None})
        if len(by_ending) < len(members):
            raise DataError(
                f"has {len(members)} members and only {len(by_ending)} different ones, so which is meant is not known. "
                "Give each sample a key of its own",
                where=where,
                sample_id=key,
            )
        beside = Beside(tar.path, key, by_ending, self.folders)
        fields = Fields(tar, beside, tar.path.name)
        try:
            row = self.parser.shaped(fields) if self.parser.columns else self.shape(fields)
        except DataError as error:
            raise DataError(error.reason, where=error.where or where, sample_id=key) from None
        return self.parser.parse_shaped(row, where, recognise(row), beside, key)

    def __len__(self) -> int:
        return len(self.facts)

    def __getitem__(self, index: int) -> Sample:
        """The sample of one row; its media are parts of the tar.

        Raises:
            DataError: The tar has changed.
            ConfigError: It is not there any more.
        """
        number, begins, ends = self._places.row(index)
        with Tar(self.tars[number]) as tar:
            members = [m for m in tar.members(begins, ends) if split_name(m.name) is not None]
            named = split_name(members[0].name) if members else None
            if named is None:
                raise DataError("has changed since it was looked through. Start again", where=tar.path.name)
            return self._parse(tar, named[0], members)[0]

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def where(self, index: int) -> str:
        """The tar and the key of a row."""
        number, begins, ends = self._places.row(index)
        path = self.tars[number]
        try:
            with Tar(path) as tar:
                named = split_name(next(tar.members(begins, ends)).name)
        except (ConfigError, DataError, StopIteration):
            named = None
        return f"{path.name} {named[0] if named else f'at byte {begins}'}"

    def fingerprint(self) -> str:
        """A digest of the names and sizes of all members and of all words, in order; media are not read for it."""
        return self._digest


def _counted(members: dict[str, Member]) -> dict[str, Member]:
    """A sample's members, those that are numbered in the order of their numbers: programs that write them by name put
    10.png before 2.png."""
    numbered = {name: found for name in members if (found := _NUMBERED.match(name)) is not None}
    names = iter(sorted(numbered, key=lambda name: (numbered[name][1], int(numbered[name][2]))))
    return {name: members[name] for name in [next(names) if one in numbered else one for one in members]}


def tars_in(path: str) -> list[Path]:
    """The tars of a folder (and of folders in it), of a pattern with braces, or the one tar.

    Raises:
        ConfigError: A pattern stands for too many names.
    """
    folder = Path(path)
    if folder.is_dir():
        return sorted(folder.rglob("*.tar"))
    return [Path(name) for name in expanded(path)]


def expanded(pattern: str) -> list[str]:
    """The names that a pattern stands for: ``{a,b}`` is each of them, ``{000..012}`` each number.

    Raises:
        ConfigError: They are too many, or a range is none.
    """
    found = [pattern]
    while any(_BRACES.search(name) for name in found):
        longer = []
        for name in found:
            group = _BRACES.search(name)
            if group is None:
                longer.append(name)
                continue
            longer += [name[: group.start()] + one + name[group.end() :] for one in _alternatives(group[1], pattern)]
            if len(longer) > _MAX_NAMES:
                raise ConfigError(f"{pattern}: stands for more than {_MAX_NAMES} files. Correct its numbers")
        found = longer
    return found


def _alternatives(inside: str, pattern: str) -> list[str]:
    first, dots, last = inside.partition("..")
    if not dots:
        return inside.split(",")
    if not (first.isdecimal() and last.isdecimal()) or not 0 <= int(last) - int(first) <= _MAX_NAMES:
        raise ConfigError(f"{pattern}: {{{inside}}} is no range of numbers. Write it as {{000..012}}")
    width = len(first)
    return [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
