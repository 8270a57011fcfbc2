"""Stopping well.

Ctrl-C, SIGTERM (what schedulers and `kill` send) and SIGUSR1 (what Slurm is asked to send some time before the end) are
wishes that are granted between two steps, with everything saved; a second one of them stops at once.

A run that stopped for SIGTERM or SIGUSR1 did what its scheduler asked: exit status 0. After Ctrl-C it is 130, as shells
have it: whoever sits there and stops ``avlm train ... && avlm eval ...`` does not mean the second command to begin.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Literal

SIGNALS = tuple(signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGUSR1") if name in signal.Signals.__members__)


class Stopped(KeyboardInterrupt):
    """A run was asked to stop, and did.

    Args:
        number: The signal that asked.
        saved: Whether all that was done is on the disk.
    """

    def __init__(self, number: int, *, saved: bool = True) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number, self.saved = number, saved

    def told(self) -> str:
        """What a person is told, with the way to go on."""
        if self.saved:
            return "stopped; all that was done is saved, and the same command goes on from there"
        return (
            "stopped, and the last steps could not be saved (see above). Look after the disk; the same command goes on "
            "from the checkpoint before them"
        )

    def status(self) -> int:
        """The exit status of a command that ends with it."""
        if not self.saved:
            return 1
        return 128 + self.number if self.number == signal.SIGINT else 0


class StopWish:
    """Whether the run has been asked to stop."""

    def __init__(self) -> None:
        self.number: int | None = None

    def grant(self, *, saved: bool = True) -> None:
        """Stop here if that was asked.

        Raises:
            Stopped: It was.
        """
        if self.number is not None:
            raise Stopped(self.number, saved=saved)


@contextmanager
def stop_wishes(*, second: Literal["ends", "nothing"] = "ends") -> Iterator[StopWish]:
    """Catch the first signal while the block runs. Only the main thread can; elsewhere nothing changes.

    Args:
        second: What a second signal does. It `ends` the program, or does `nothing` in a process whose parent ends it:
            there the first may have come from a scheduler, to all processes, and the second from the parent.
    """
    wish = StopWish()

    def wanted(number: int) -> None:
        if wish.number is None and second == "ends":
            with suppress(OSError):  # not by print: the signal may have come in the middle of one
                os.write(2, b"stopping after this step; once more stops at once\n")
        wish.number = number
        if second == "ends":
            caught.restore()

    caught = _Caught(wanted)
    with caught:
        yield wish


@contextmanager
def stops_at_once() -> Iterator[None]:
    """Where there is nothing to be saved, the first signal ends the block; what it holds open is cleaned up.

    Raises:
        Stopped: There was one.
    """

    def ended(number: int) -> None:
        caught.restore()
        raise Stopped(number)

    caught = _Caught(ended)
    with caught:
        yield


class _Caught:
    """Signals that are handled in a way of our own while a block runs."""

    def __init__(self, handle: Callable[[int], None]) -> None:
        self.handle = handle
        self.before: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                handler = signal.getsignal(number)
                if handler not in (signal.SIG_IGN, None):  # ignored on purpose (nohup), or not Python's to change
                    self.before[number] = handler
                    signal.signal(number, self._called)

    def _called(self, number: int, frame: FrameType | None) -> None:
        self.handle(number)

    def restore(self) -> None:
        while self.before:
            signal.signal(*self.before.popitem())

    def __exit__(self, *_: object) -> None:
        self.restore()
