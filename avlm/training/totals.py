"""What all processes read in a step together: the numbers that losses are divided by, and whatever was bad."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

from avlm.config.run import StateHead
from avlm.data.loader import Bad, StepData
from avlm.training.states import state_weight
from avlm.training.world import World


@dataclass(frozen=True, slots=True)
class Totals:
    """Of one step, over all processes; the same in each of them."""

    targets: int
    tokens: int
    samples: int
    rows: int
    most_rows: int
    """Of any one process."""
    states: float
    """What the states weigh together."""
    bad: StepData
    """The step's bad and cut samples, without its rows."""


def totals(world: World, data: StepData, head: StateHead | None) -> Totals:
    """Add up what the processes read in a step.

    Args:
        data: This process's part of it.
        head: Of the stage, if it has one.
    """
    states = 0.0 if head is None else state_weight(data.rows, head)
    if world.alone:
        rows = len(data.rows)
        return Totals(data.num_targets(), data.num_tokens(), data.num_samples, rows, rows, states, data)
    own = {
        "step": data.step, "targets": data.num_targets(), "tokens": data.num_tokens(), "samples": data.num_samples,
        "rows": len(data.rows), "states": states, "bad_at": data.bad_at,
        "bad": [asdict(bad) for bad in data.bad], "cut": [asdict(bad) for bad in data.cut],
    }  # fmt: skip
    seen = world.gather(own)
    assert all(one["step"] == data.step for one in seen), "all processes are at the same step"

    def total(name: str) -> Any:
        return sum(one[name] for one in seen)

    most = max(one["rows"] for one in seen)
    return Totals(
        total("targets"), total("tokens"), total("samples"), total("rows"), most, total("states"), _bad(data.step, seen)
    )


def _bad(step: int, seen: list[dict[str, Any]]) -> StepData:
    """The bad samples of all processes as if one had read them, each process's part behind that of the one before."""
    read = [one["samples"] + len(one["bad"]) for one in seen]
    starts = accumulate(read[:-1], initial=0)
    return StepData(
        step,
        [],
        bad=[Bad(**bad) for one in seen for bad in one["bad"]],
        num_samples=sum(one["samples"] for one in seen),
        bad_at=[start + at for start, one in zip(starts, seen, strict=True) for at in one["bad_at"]],
        cut=[Bad(**bad) for one in seen for bad in one["cut"]],
    )
