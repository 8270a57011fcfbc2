"""Time that a thing may take, as the moment when it ends."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import TypeVar

from avlm.data.fetching.urls import NotFetchedError

T = TypeVar("T")


class Deadline:
    """A moment by which something is done.

    Args:
        seconds: From now.
        clock: Gives seconds that never go back.
    """

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._end = clock() + seconds

    def left(self) -> float:
        """Seconds until then, not below 0."""
        return max(0.0, self._end - self._clock())

    def at_most(self, seconds: float) -> float:
        """So many seconds, or what is left.

        Raises:
            TimeoutError: Nothing is left.
        """
        left = self.left()
        if left == 0:
            raise TimeoutError
        return min(seconds, left)


def within(deadline: Deadline, call: Callable[[], T]) -> T:
    """Wait for what cannot be told to stop, and no longer than the deadline: it then goes on by itself, unheard.

    Raises:
        NotFetchedError: It is not done in time.
    """
    answers: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            answers.put((call(), None))
        except BaseException as error:
            answers.put((None, error))

    threading.Thread(target=work, name="avlm-fetch", daemon=True).start()
    try:
        found, error = answers.get(timeout=deadline.left())
    except queue.Empty:
        raise NotFetchedError("did not come in time. Raise data.fetch.total_s, or download it") from None
    if error is not None:
        raise error
    return found  # type: ignore[return-value]
