"""Sources one behind the other, as one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from avlm.data.rows import RowSource, RowTable
from avlm.errors import ConfigError, DataError
from avlm.samples import Sample


class JoinedSource:
    """The rows of several sources, in their order.

    Args:
        sources: At least one.
        weights: Of each source how often its rows are wanted beside the others', where a blend says so; the order of
            the rows here is not touched by it.
        name: What to call it.

    Attributes:
        members: The sources.
        starts: int64 [sources + 1]; of each the number of its first row, and the number of all.
    """

    def __init__(
        self, sources: Sequence[RowSource], weights: Sequence[float] | None = None, *, name: str = "", kind: str = ""
    ) -> None:
        if not sources:
            raise ConfigError("no data set is named, so there is nothing to learn from. Name one")
        self.members = list(sources)
        self.weights = None if weights is None else [float(weight) for weight in weights]
        self.name = name or " + ".join(source.name for source in sources)
        self.kind = kind or f"{len(sources)} data sets, one behind the other"
        self.facts = RowTable.joined([source.facts for source in sources])
        self.roots = tuple(dict.fromkeys(root for source in sources for root in source.roots))
        self.errors: list[DataError] = [error for source in sources for error in source.errors]
        self.starts = np.cumsum([0, *(len(source) for source in sources)])

    def part(self, index: int) -> tuple[int, int]:
        """The source that a row is of, and its number there."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        number = int(np.searchsorted(self.starts, index, "right")) - 1
        return number, index - int(self.starts[number])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> Sample:
        """The sample of one row.

        Raises:
            DataError: The row is wrong after all.
        """
        number, row = self.part(index)
        return self.members[number][row]

    def __iter__(self) -> Iterator[Sample]:
        return (sample for source in self.members for sample in source)

    def where(self, index: int) -> str:
        """What to call the place of a row in a message: as its source does."""
        number, row = self.part(index)
        return self.members[number].where(row)

    def fingerprint(self) -> str:
        """A digest of the sources' own, in their order."""
        return hashlib.sha256(" ".join(source.fingerprint() for source in self.members).encode()).hexdigest()
