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
        """A digest of the sources' own, their order and their weights."""
        text = "\n".join([*self.fingerprints().values(), repr(self.weights)])
        return hashlib.sha256(text.encode()).hexdigest()

    def fingerprints(self) -> dict[str, str]:
        """Of each source, by its name; a name that stands twice is told apart by its number."""
        names = [source.name for source in self.members]
        return {
            name if names.count(name) == 1 else f"{name} ({i + 1})": source.fingerprint()
            for i, (name, source) in enumerate(zip(names, self.members, strict=True))
        }


def blended(sources: Sequence[RowSource], weights: Sequence[float | None]) -> JoinedSource:
    """Several sources as one, of which each may be a blend already: its weights then share the one given here.

    Args:
        weights: Of each, above 0; or None for all, and every row is read once an epoch.

    Raises:
        ConfigError: One is a blend with weights of its own, and no weights are given here.
    """
    given = None if None in weights else [float(w) for w in weights if w is not None]
    members: list[RowSource] = []
    shares: list[float] = []
    for i, source in enumerate(sources):
        own = source.weights if isinstance(source, JoinedSource) else None
        if own is not None and given is None:
            raise ConfigError(
                f"{source.name} is a blend with weights of its own, and what stands beside it has none, so its share "
                "is not known. Give every source of data.train a weight"
            )
        inner = source.members if isinstance(source, JoinedSource) else [source]
        parts = own or [float(len(member)) for member in inner]
        members += inner
        shares += [(1.0 if given is None else given[i]) * part / sum(parts) for part in parts]
    return JoinedSource(members, None if given is None else shares)
