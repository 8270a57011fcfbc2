"""Stopping well: a first Ctrl-C or SIGTERM is a wish that is granted between two steps; a second one stops at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A run was asked to stop, and did so with everything saved.

    Args:
        number: The signal that asked.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class StopWish:
    """Whether the run has been asked to stop."""

    def __init__(self) -> None:
        self.number: int | None = None

    def grant(self) -> None:
        """Stop here if that was asked.

        Raises:
            Stopped: It was.
        """
        if self.number is not None:
            raise Stopped(self.number)


@contextmanager
def stop_wishes() -> Iterator[StopWish]:
    """Catch the first signal of each kind while the block runs. Only the main thread can; elsewhere nothing changes."""
    wish = StopWish()
    before: dict[int, Any] = {}

    def wanted(number: int, frame: FrameType | None) -> None:
        wish.number = number
        restore()
        with suppress(OSError):  # not by print: the signal may have come in the middle of one
            os.write(2, b"stopping after this step; once more stops at once\n")

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if handler not in (signal.SIG_IGN, None):  # ignored on purpose (nohup), or not Python's to change
                before[number] = handler
                signal.signal(number, wanted)
    try:
        yield wish
    finally:
        if wish.number is None:
            restore()
