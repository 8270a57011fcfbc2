"""Rows of a reader that somebody wrote: one class, named as ``FILE.py:CLASS`` or ``MODULE:CLASS``.

It is made without arguments, or with the run's data settings, and has

    __len__ and __getitem__    rows by number, in any order and from any process; or
    __iter__                   rows in their order only; they are written to `data.spool` once

A row is a `Sample`, or an object in one of the forms that are read (docs/data.md). `where(index)` and `fingerprint()`
are used where it has them.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from avlm.config.data import DataConfig
from avlm.data.forms.fields import Field
from avlm.data.forms.folders import folders_of
from avlm.data.forms.parse import recognise
from avlm.data.readers.code import module_of, named_in
from avlm.data.readers.taking import Parser, Progress, Ticker, shares
from avlm.data.rownumbers import Columns
from avlm.data.rows import RowTable, facts_of
from avlm.errors import AvlmError, ConfigError, DataError
from avlm.samples import Sample


def made_reader(text: str, data: DataConfig) -> Any:
    """An instance of the class that a user names.

    Raises:
        ConfigError: It is not there, is none, or cannot be made.
    """
    file, _, name = text.rpartition(":")
    found = named_in(module_of(file), name, file)
    if not inspect.isclass(found):
        raise ConfigError(f"{text}: is {type(found).__name__} and no class. Name a class that reads rows")
    make: Callable[..., Any] = found
    try:
        return make(data) if inspect.signature(make).parameters else make()
    except AvlmError:
        raise
    except Exception as error:
        raise ConfigError(f"{text}: cannot be made ({type(error).__name__}: {error}). Correct it") from error


def rows_of(reader: Any, where: str, parser: Parser) -> Iterator[tuple[Sample, str] | DataError]:
    """The rows of a reader that has them in their order only, each with its set, and what is wrong with those that
    are."""
    try:
        for number, row in enumerate(reader, 1):
            try:
                yield sample_of(row, f"{where} row {number}", parser)
            except DataError as error:
                yield error
    except AvlmError:
        raise
    except Exception as error:
        raise ConfigError(f"{where}: stopped with {type(error).__name__} ({error}). Correct the reader") from error


def sample_of(row: Any, where: str, parser: Parser) -> tuple[Sample, str]:
    """What a reader gave, as a sample, and the set that it is from.

    Raises:
        DataError: It is neither a sample nor a row in a form that is read.
    """
    if isinstance(row, Sample):
        return (row if row.where else replace(row, where=where, id=row.id or where)), ""
    row = parser.shaped(row)
    return parser.parse_shaped(row, where, recognise(row))


class OwnSource:
    """The rows of somebody's reader that can be read in any order.

    Args:
        text: What names its class.
        data: Of the run.
        columns: What the rows' columns are called, where they have other names.
        reader: It, where it was made already.
        progress: Called with rows done and in all, where that takes longer than two seconds.

    Raises:
        ConfigError: No row can be read.
    """

    def __init__(
        self,
        text: str,
        data: DataConfig,
        *,
        columns: Mapping[str, Field] | None = None,
        reader: Any = None,
        progress: Progress | None = None,
    ) -> None:
        self.text, self.data = text, data
        self.name = text.rpartition(":")[2]
        self.kind = f"a reader of your own ({text})"
        self.parser = Parser(folders_of(Path("here"), data), columns)
        file = Path(text.rpartition(":")[0])
        self.roots = (*([file.parent] if file.suffix == ".py" else []), self.parser.folders.base)
        self.facts = RowTable()
        self.errors: list[DataError] = []
        self._numbers = Columns(number="q")
        self._reader = made_reader(text, data) if reader is None else reader
        self._scan(progress)

    def _scan(self, progress: Progress | None) -> None:
        digest = hashlib.sha256()
        count = self._asked(self._reader.__len__)
        ticker = Ticker(progress, count)
        for number in range(count):
            try:
                sample, name = self._sample(number)
                digest.update(repr((sample.id, sample.task, sample.turns)).encode(errors="backslashreplace"))
                self.facts.append(facts_of(sample, name))
                self._numbers.append(number)
            except DataError as error:
                self.errors.append(error)
            ticker.at(number)
        ticker.end()
        if not self.facts:
            first = f" The first one: {self.errors[0]}" if self.errors else " It has none."
            raise ConfigError(f"{self.text}: has no row that can be read, so there is nothing to learn from.{first}")
        self._digest = digest.hexdigest()
        kept = shares(self.facts, self.parser.folders)
        if kept is not None:
            self.facts, self._numbers = self.facts.kept(kept), self._numbers.kept(kept)

    def _sample(self, number: int) -> tuple[Sample, str]:
        where = self._where(number)
        try:
            row = self._reader[number]
        except AvlmError:
            raise
        except Exception as error:
            raise DataError(
                f"the reader raised {type(error).__name__} ({error}). Correct it, or have it raise a DataError that "
                "says what is wrong with the row",
                where=where,
            ) from error
        return sample_of(row, where, self.parser)

    def _where(self, number: int) -> str:
        own = getattr(self._reader, "where", None)
        return str(self._asked(own, number)) if callable(own) else f"{self.name} row {number + 1}"

    def _asked(self, method: Callable[..., Any], *arguments: int) -> Any:
        """What the reader says of itself.

        Raises:
            ConfigError: It cannot.
        """
        try:
            return method(*arguments)
        except AvlmError:
            raise
        except Exception as error:
            name = f"{method.__name__}({', '.join(map(str, arguments))})"
            raise ConfigError(f"{self.text}: its {name} raised {type(error).__name__} ({error}). Correct it") from error

    def __len__(self) -> int:
        return len(self.facts)

    def __getitem__(self, index: int) -> Sample:
        """The sample of one row.

        Raises:
            DataError: The row is wrong after all.
        """
        return self._sample(self._numbers.row(index)[0])[0]

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def where(self, index: int) -> str:
        """What to call the place of a row in a message."""
        return self._where(self._numbers.row(index)[0])

    def fingerprint(self) -> str:
        """The reader's own, or a digest of all its rows."""
        own = getattr(self._reader, "fingerprint", None)
        return str(self._asked(own)) if callable(own) else self._digest

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reader = made_reader(self.text, self.data)
