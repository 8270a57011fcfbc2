"""How many may ask at once. Who comes when all places are taken is told to try again, and when."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from avlm.config.serve import Serve
from avlm.inference.serving.refusing import RefusedError

LONGEST_WAIT_S = 60
FIRST_GUESS_S = 1.0
"""What an answer takes, before the first one is there."""


class Places:
    """Answers that are being made or wait, and the memory of what is being received; for one event loop.

    Args:
        settings: Of the server.
        full: Told whenever somebody is sent away.
    """

    def __init__(self, settings: Serve, full: Callable[[], None] = lambda: None) -> None:
        self.settings, self._full = settings, full
        self.most = settings.slots + settings.waiting
        self.taken = 0
        self.held = 0
        """Bytes of requests."""
        self._answer_s = FIRST_GUESS_S

    @contextmanager
    def take(self, count: int = 1) -> Iterator[None]:
        """Places for some answers.

        Raises:
            RefusedError: There are not so many.
        """
        if self.taken + count > self.most:
            raise self._refused()
        self.taken += count
        try:
            yield
        finally:
            self.taken -= count

    def hold(self, count: int) -> None:
        """Memory for so many bytes more; `let_go` gives it back.

        Raises:
            RefusedError: There is none.
        """
        if self.held + count > self.settings.held_mb * 2**20:
            raise self._refused()
        self.held += count

    def let_go(self, count: int) -> None:
        self.held -= count

    def took(self, seconds: float) -> None:
        """An answer took so long."""
        self._answer_s += 0.2 * (seconds - self._answer_s)

    def wait_s(self) -> int:
        """When there will be a place, as far as the last answers tell."""
        rounds = max(1, self.taken) / self.settings.slots
        return min(LONGEST_WAIT_S, max(1, math.ceil(rounds * self._answer_s / 2)))

    def _refused(self) -> RefusedError:
        self._full()
        wait_s = self.wait_s()
        return RefusedError(
            429,
            f"All places are taken: {self.taken} answers are being made or wait. Try again in {wait_s} s",
            code="rate_limit_exceeded",
            wait_s=wait_s,
        )
