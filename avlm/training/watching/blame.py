"""The samples of a step as a person finds them again: their ids, their rows, their files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from avlm.data.loader import StepLoader
from avlm.errors import DataError

SHOWN = 4
"""Samples that a sentence names; the journal has all."""


@dataclass(frozen=True, slots=True)
class Blamed:
    """A sample that something went wrong with, or may have."""

    id: str
    where: str
    files: tuple[str, ...]
    """Of its media, in their order."""

    def facts(self) -> dict[str, Any]:
        return {"id": self.id, "where": self.where, "files": list(self.files)}

    def __str__(self) -> str:
        return f'"{self.id}" ({", ".join((self.where, *self.files))})'


def step_samples(loader: StepLoader, step: int, wanted: Sequence[str] = ()) -> list[Blamed]:
    """The samples of a step that this rank reads, in their order.

    Args:
        step: Of the stage, from 0.
        wanted: Ids of those that are asked for; empty: all.
    """
    found = []
    for row in dict.fromkeys(row for row, _ in loader.assigned(step)[0]):
        try:
            sample = loader.source[row]
        except DataError:
            continue  # it is no sample, and was left out of the step
        if not wanted or sample.id in wanted:
            files = tuple(item.name() for item in sample.media())
            found.append(Blamed(sample.id, loader.source.where(row), files))
    return found


def listed(samples: Sequence[Blamed]) -> str:
    """The first of them for a sentence, and how many more there are."""
    more = f" and {len(samples) - SHOWN} more" if len(samples) > SHOWN else ""
    return ", ".join(map(str, samples[:SHOWN])) + more
