"""A step that never ends: after so many seconds the run tells what it waits for, and where every thread stands."""

from __future__ import annotations

import faulthandler
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

STATUS = 1
"""Of a process that a stall ends."""


class Stall:
    """A thread that looks at the clock.

    Args:
        seconds: Without a sign of life for so long, the run has stalled.
        then: Whether it goes on waiting, or the process ends with status 1.
        tell: Says a sentence.
        describe: What the run waits for, in words.
        stacks: The file that the threads' stacks are appended to.
        end: Ends the process.
    """

    def __init__(
        self,
        seconds: float,
        then: Literal["wait", "stop"],
        tell: Callable[[str], None],
        describe: Callable[[], str],
        stacks: Path,
        end: Callable[[int], None] = os._exit,
    ) -> None:
        self.seconds, self.then = seconds, then
        self.tell, self.describe, self.stacks, self.end = tell, describe, stacks, end
        self.told = 0
        """Stalls so far."""
        self._last = time.monotonic()
        self._over = threading.Event()

    def alive(self) -> None:
        """A sign of life."""
        self._last = time.monotonic()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look while the block runs."""
        self.alive()
        thread = threading.Thread(target=self._watch, name="stall watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()

    def _watch(self) -> None:
        told_at = None
        while not self._over.wait(max(0.005, self._left(told_at))):
            last = self._last
            silent = time.monotonic() - last
            if silent < self.seconds or last == told_at:
                continue
            told_at = last
            self._report(silent)

    def _left(self, told_at: float | None) -> float:
        """Seconds until the next look; a stall that was told is not told again, only its end is waited for."""
        if self._last == told_at:
            return min(1.0, self.seconds)
        return self._last + self.seconds - time.monotonic()

    def _report(self, silent: float) -> None:
        self.told += 1
        stopping = self.then == "stop"
        after = "the process ends here, and the same command goes on from its last checkpoint"
        self.tell(
            f"no step for {silent:.0f} s (watch.stall_s={self.seconds:g}): {self.describe()}; "
            f"{after if stopping else 'it goes on waiting'}. Where every thread stands:"
        )
        stacks = _all_stacks()
        self.tell(stacks)
        with suppress(OSError), self.stacks.open("a") as file:
            file.write(f"{time.strftime('%F %T')}, after {silent:.0f} s in process {os.getpid()}:\n{stacks}\n")
        if stopping:
            self.end(STATUS)


def _all_stacks() -> str:
    """The stack of every thread, most recent call first."""
    with tempfile.TemporaryFile("w+") as file:  # faulthandler writes to a descriptor, whatever state the threads are in
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
