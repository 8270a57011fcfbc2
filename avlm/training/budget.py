"""How many samples may be bad before a run stops: a share of all, and so many one after the other."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from avlm.config.data import DataConfig
from avlm.data.loader import Bad, StepData
from avlm.errors import DataError

ALWAYS = 10
"""So many may be bad whatever the share, so that a few at the very beginning stop nothing."""
TOLD = 3
"""How many of the last ones a report names."""


class BadBudget:
    """Counts the bad samples of a stage against the run's settings.

    Attributes:
        bad: How many there were.
        run: How many of them came last, with no good one behind them.
    """

    def __init__(self, data: DataConfig) -> None:
        self.data = data
        self.bad = 0
        self.run = 0
        self.longest_run = 0
        self.seen = 0
        self.beside = 0.0
        """Samples that were left out before any was read, for each one that is read."""
        self.last: deque[Bad] = deque(maxlen=TOLD)

    def begin(self, left_out: Sequence[Bad], rows: int) -> None:
        """Take samples into account that are left out of every reading of all rows.

        Args:
            rows: How many others there are.

        Raises:
            DataError: They are too many by themselves.
        """
        if not left_out:
            return
        self.beside = len(left_out) / rows
        self.last.extend(left_out)
        self._check_share(len(left_out), len(left_out) + rows)

    def go_on(self, bad: int, run: int, seen: int) -> None:
        """Count on from where a checkpoint stands."""
        self.bad, self.run, self.seen = bad, run, seen

    def count(self, data: StepData) -> None:
        """Take a step's bad samples into account."""
        self.seen += data.num_samples + len(data.bad)
        self.bad += len(data.bad)
        self.last.extend(data.bad)
        self.longest_run = self.run
        places = set(data.bad_at)
        for place in range(data.num_samples + len(data.bad)):
            self.run = self.run + 1 if place in places else 0
            self.longest_run = max(self.longest_run, self.run)

    def check(self) -> None:
        """Stop the run if there were too many.

        Raises:
            DataError: There were.
        """
        limits = self.data
        left_out = round(self.beside * self.seen)
        self._check_share(self.bad + left_out, self.seen + left_out)
        if self.longest_run >= limits.max_bad_run:
            self._stop(
                f"{self.longest_run} samples one after the other were bad, and data.max_bad_run={limits.max_bad_run}",
                "data.max_bad_run",
            )

    def _check_share(self, bad: int, seen: int) -> None:
        if bad > max(ALWAYS, self.data.max_bad * seen):
            told = f"{bad} of {seen} samples were bad, more than data.max_bad={self.data.max_bad:g} allows"
            self._stop(told, "data.max_bad")

    def _stop(self, what: str, setting: str) -> None:
        *before, last = self.last
        named = "".join(f"; before it {bad.where}: {bad.reason}" for bad in reversed(before))
        raise DataError(
            f"{what}; the last one: {last.reason}{named}. All are listed in quarantine.jsonl; correct them, or raise "
            f"{setting}",
            where=last.where,
            sample_id=last.sample_id,
        )
