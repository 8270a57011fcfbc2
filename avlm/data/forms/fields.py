"""Which value of a row is meant: ``a``, ``a[b][0]``, or the first that is there of ``a,b[c]``.

Source:
    The notation of Energon's field maps (its documentation, "Dataset Formats").
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from avlm.errors import ConfigError

_ONE = re.compile(r"([^\[\],]+)((?:\[[^\[\],]+\])*)")
ABSENT = object()
"""What `Field.of` gives where there is nothing."""


@dataclass(frozen=True, slots=True)
class Field:
    """A way to a value, or several to try in turn."""

    text: str
    ways: tuple[tuple[str, ...], ...]

    def of(self, row: Mapping[str, Any]) -> Any:
        """The value that it leads to; `ABSENT` where it leads nowhere."""
        for way in self.ways:
            value: Any = row
            for step in way:
                value = _step(value, step)
            if value is not ABSENT:
                return value
        return ABSENT

    def first(self) -> list[str]:
        """The columns that it begins with."""
        return [way[0] for way in self.ways]


def field_of(text: str, where: str) -> Field:
    """Read a field's notation.

    Args:
        where: The setting that it stands in, for messages.

    Raises:
        ConfigError: It is no such notation.
    """
    ways = []
    for one in text.split(","):
        found = _ONE.fullmatch(one.strip())
        if found is None:
            raise ConfigError(
                f"{where} is {text!r}, and that names no column. Write a name such as jpg, a value inside it such as "
                "json[answer], or several to try in turn with commas between them"
            )
        ways.append((found[1], *re.findall(r"\[([^\[\]]+)\]", found[2])))
    return Field(text, tuple(ways))


def _step(value: Any, step: str) -> Any:
    if isinstance(value, Mapping):
        return value.get(step, ABSENT)
    if isinstance(value, (list, tuple)) and step.lstrip("-").isdecimal() and -len(value) <= int(step) < len(value):
        return value[int(step)]
    return ABSENT
