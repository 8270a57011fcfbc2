"""Where a stage stands in its data, for a checkpoint: a position, and what it rests on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from avlm.errors import ConfigError

SOURCE = "source "
"""What the names of sources begin with in `PlanState.depends`."""


@dataclass(frozen=True, slots=True)
class PlanState:
    """Where a stage stands in its data, and what that rests on."""

    step: int
    """Steps done."""
    depends: dict[str, str]
    """Everything that the plan follows from, by name: fingerprints of sources, and settings."""
    packs: tuple[int, ...] = ()
    """Rows of each window planned so far. They follow from the rest; with them no window is planned twice."""

    def to_json(self) -> str:
        """As text that `from_json` reads back, with a digest of it."""
        data = {"step": self.step, "depends": self.depends, "packs": list(self.packs)}
        return json.dumps({**data, "digest": _digest(data)})

    @staticmethod
    def from_json(text: str) -> PlanState:
        """Read a state.

        Raises:
            ConfigError: The text is not what was written.
        """
        try:
            data = json.loads(text)
            if data.pop("digest") != _digest(data):
                raise ValueError("its digest is of another text")
            return PlanState(int(data["step"]), dict(data["depends"]), tuple(data["packs"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"the state of the data is not what was written ({error}), so where the run stood is not known. "
                "Go on from an older checkpoint"
            ) from error


def check(state: PlanState, depends: Mapping[str, str]) -> None:
    """Refuse to go on where the plan would be another one. A source may have another name now.

    Raises:
        ConfigError: It names the first thing that changed: a source, or a setting.
    """
    problem = _changed_source(_sources(state.depends), _sources(depends))
    if problem is not None:
        raise ConfigError(
            f"{problem} since step {state.step} was saved, so other samples would follow than without the "
            "interruption. Put the data back as it was, or begin in another directory with out=DIR"
        )
    for name in dict.fromkeys([*depends, *state.depends]):
        before, now = state.depends.get(name), depends.get(name)
        if before != now and not name.startswith(SOURCE):
            raise ConfigError(
                f"the data of step {state.step} was planned with {name}={before}, and now {name}={now}, so other "
                f"samples would follow than without the interruption. Set {name} as it was, or begin in another "
                "directory with out=DIR"
            )


def _sources(depends: Mapping[str, str]) -> dict[str, str]:
    return {name.removeprefix(SOURCE): digest for name, digest in depends.items() if name.startswith(SOURCE)}


def _changed_source(before: dict[str, str], now: dict[str, str]) -> str | None:
    """What became of the first source that is not what it was; None if all are, in their order."""
    if list(before.values()) == list(now.values()):
        return None
    for name, digest in before.items():
        if digest not in now.values():
            return f"{name} has changed" if name in now else f"{name} is no longer read"
    for name, digest in now.items():
        if digest not in before.values():
            return f"{name} is new"
    return f"the order of {', '.join(now)} has changed"


def _digest(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
