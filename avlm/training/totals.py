"""What all processes read in a step together: the numbers that losses are divided by, and whatever was bad."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

from avlm.config.stage import Stage
from avlm.data.loader import Bad, StepData
from avlm.training.loss import num_units
from avlm.training.states import state_weight
from avlm.training.world import World


@dataclass(frozen=True, slots=True)
class Totals:
    """Of one step, over all processes; the same in each of them."""

    targets: int
    units: int
    """What losses are divided by to be a mean: pairs of answers, or targets."""
    tokens: int
    samples: int
    rows: int
    most_rows: int
    """Of any one process."""
    states: float
    """What the states weigh together."""
    bad: StepData
    """The step's bad and cut samples, without its rows."""


def totals(world: World, data: StepData, stage: Stage) -> Totals:
    """Add up what the processes read in a step.

    Args:
        data: This process's part of it.
    """
    states = 0.0 if stage.state_head is None else state_weight(data.rows, stage.state_head)
    targets, units = data.num_targets(), num_units(data.rows, stage)
    if world.alone:
        rows = len(data.rows)
        return Totals(targets, units, data.num_tokens(), data.num_samples, rows, rows, states, data)
    own = {
        "step": data.step, "targets": targets, "units": units, "tokens": data.num_tokens(), "samples": data.num_samples,
        "rows": len(data.rows), "states": states, "bad_at": data.bad_at,
        "bad": [asdict(bad) for bad in data.bad], "cut": [asdict(bad) for bad in data.cut],
    }  # fmt: skip
    seen = world.gather(own)
    assert all(one["step"] == data.step for one in seen), "all processes are at the same step"

    def total(name: str) -> Any:
        return sum(one[name] for one in seen)

    return Totals(
        targets=total("targets"),
        units=total("units"),
        tokens=total("tokens"),
        samples=total("samples"),
        rows=total("rows"),
        most_rows=max(one["rows"] for one in seen),
        states=total("states"),
        bad=_bad(data.step, seen),
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
