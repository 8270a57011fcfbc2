"""A plan whose first steps read some of a stage's rows only; behind them another reads all, as if it were the first."""

from __future__ import annotations

from dataclasses import replace

from avlm.data.planning.plan import Member, Plan, PlannedStep
from avlm.data.planning.shuffle import Ints
from avlm.data.planning.state import PlanState, check

APART = 2**20
"""What the epochs of the first steps are counted from, so that no row is read twice in one epoch of the same number."""


class Led:
    """Two plans, one behind the other; asked as `Plan` is.

    Args:
        opening: Of the rows that come first, numbered among themselves.
        rows: Their numbers among all, int64.
        opening_steps: How many it has.
        then: Of all rows.
        said_by: The setting that wants this, and what it is.
    """

    def __init__(self, opening: Plan, rows: Ints, opening_steps: int, then: Plan, said_by: tuple[str, str]) -> None:
        self.opening, self.rows, self.opening_steps, self.then = opening, rows, opening_steps, then
        self.depends = {**then.depends, said_by[0]: said_by[1]}

    def steps(self, epochs: float) -> int:
        """Steps that it takes to read all samples so often; those of the opening are among them, not added."""
        return self.then.steps(epochs)

    def samples(self, k: int) -> list[Member]:
        """As `Plan.samples`."""
        return (
            self._named(self.opening.samples(k))
            if k < self.opening_steps
            else self.then.samples(k - self.opening_steps)
        )

    def step(self, k: int) -> PlannedStep:
        """As `Plan.step`."""
        if k >= self.opening_steps:
            return replace(self.then.step(k - self.opening_steps), step=k)
        own = self.opening.step(k)
        return replace(own, rows=[self._named(row) for row in own.rows])

    def reads_again(self, steps: int) -> bool:
        """As `Plan.reads_again`; a row that both plans read is not looked for."""
        return self.opening.reads_again(min(steps, self.opening_steps)) or self.then.reads_again(
            steps - self.opening_steps
        )

    def state(self, step: int) -> PlanState:
        """As `Plan.state`: what the plan that is under way knows of its rows."""
        return PlanState(step, self.depends, tuple(self._under_way(step).packs))

    def resume(self, state: PlanState) -> int:
        """As `Plan.resume`.

        Raises:
            ConfigError: The plan rests on other data or settings than the state did.
        """
        check(state, self.depends)
        self._under_way(state.step).learn(state.packs)
        return state.step

    def _under_way(self, step: int) -> Plan:
        return self.opening if step < self.opening_steps else self.then

    def _named(self, members: list[Member]) -> list[Member]:
        return [(int(self.rows[number]), APART + epoch) for number, epoch in members]


StagePlan = Plan | Led
"""What a stage reads, step by step."""
