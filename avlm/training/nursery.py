"""A process that has imported everything and does nothing, so that others of this run begin as copies of it.

Importing takes seconds, and a fork milliseconds. This process cannot be copied itself: it may have threads, locks that
they hold, a device. The nursery has none of them. It ends when the process that has it does, and so do its children.

    python -m avlm.training.nursery    reads what to start, a JSON line each; tells who began and who ended
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from typing import IO, Any

MODULES = ("avlm.training.building", "avlm.training.mates", "avlm.training.chain")
"""What its children need; each that is started has ``main(*arguments: str) -> int``."""
LOOK_S = 0.02
LOST = -int(signal.SIGKILL)
"""Exit status of a child whose nursery is gone: it ended with it."""


class Child:
    """A process that the nursery has started, as seen from here."""

    def __init__(self, nursery: _Nursery, number: int) -> None:
        self._nursery, self._number = nursery, number
        self.pid = 0
        self.returncode: int | None = None
        """Its exit status, or minus the signal that ended it; None: it is at work."""

    def poll(self) -> int | None:
        self._nursery.hear(0.0)
        return self.returncode

    def wait(self, seconds: float | None = None) -> None:
        """Wait until it has ended, or for so long."""
        until = None if seconds is None else time.monotonic() + seconds
        while self.returncode is None and (until is None or time.monotonic() < until):
            self._nursery.hear(0.1)

    def terminate(self) -> None:
        """Ask it to end."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)


class _Nursery:
    """The nursery of this process."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        assert self.process.stdin is not None and self.process.stdout is not None
        self.orders: IO[bytes] = self.process.stdin
        self.news: IO[bytes] = self.process.stdout
        os.set_blocking(self.news.fileno(), False)
        self.part = b""
        self.children: dict[int, Child] = {}
        self.number = 0
        atexit.register(self.close)

    def usable(self) -> bool:
        """Whether it is there, and this process's own: a forked one inherits that of its parent."""
        return self.owner == os.getpid() and self.process.poll() is None

    def start(self, module: str, arguments: tuple[str, ...], env: dict[str, str]) -> Child:
        self.number += 1
        child = self.children[self.number] = Child(self, self.number)
        order = {"number": self.number, "module": module, "arguments": arguments}
        order |= {"cwd": os.getcwd(), "env": {**os.environ, **env}}
        with suppress(BrokenPipeError):
            self.orders.write(json.dumps(order).encode() + b"\n")
            self.orders.flush()
        while not child.pid and child.returncode is None:
            self.hear(0.1)
        return child

    def hear(self, seconds: float) -> None:
        """Take in who began and who ended, waiting so long for the next that did."""
        if not select.select([self.news], [], [], seconds)[0]:
            return
        data = os.read(self.news.fileno(), 2**16)
        *lines, self.part = (self.part + data).split(b"\n")
        for line in lines:
            news: dict[str, int] = json.loads(line)
            child = self.children[news["number"]]
            child.pid = news["pid"]
            if "status" in news:
                self.children.pop(news["number"]).returncode = news["status"]
        if not data:  # it is gone
            while self.children:
                self.children.popitem()[1].returncode = LOST

    def close(self) -> None:
        """End it, and with it whatever it has started."""
        if self.owner == os.getpid():
            self.process.kill()
            self.process.wait()


_nursery: _Nursery | None = None


def warm() -> None:
    """Let the nursery begin, if it has not: it imports while this process does something else."""
    global _nursery
    if _nursery is None or not _nursery.usable():
        _nursery = _Nursery()


def start(module: str, *arguments: str, env: dict[str, str] | None = None) -> Child:
    """Start ``main(*arguments)`` of one of `MODULES` in a process and a session of its own.

    Ctrl-C reaches this process alone, which passes it on. What the child says goes to the same standard error.

    Args:
        env: Added to this process's environment.
    """
    warm()
    assert _nursery is not None
    return _nursery.start(module, arguments, env or {})


# ---------------------------------------------------------------- the nursery itself


def main() -> None:
    """Import everything, then start what is asked for until nobody can ask any more."""
    import gc
    import importlib

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # sent to all processes of a job: it ends when its parent does
    for module in MODULES:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()
    orders, news = 0, os.dup(1)
    os.dup2(2, 1)
    part, children = b"", dict[int, int]()
    while True:
        if select.select([orders], [], [], LOOK_S)[0]:
            data = os.read(orders, 2**16)
            if not data:
                os._exit(0)
            *lines, part = (part + data).split(b"\n")
            for line in lines:
                order = json.loads(line)
                process = _fork(order, news)
                children[process] = order["number"]
                _tell(news, number=order["number"], pid=process)
        while children:
            process, status = os.waitpid(-1, os.WNOHANG)
            if process == 0:
                break
            _tell(news, number=children.pop(process), pid=process, status=os.waitstatus_to_exitcode(status))


def _tell(news: int, **facts: int) -> None:
    with suppress(BrokenPipeError):
        os.write(news, json.dumps(facts).encode() + b"\n")


def _fork(order: dict[str, Any], news: int) -> int:
    """A child at work; its process number."""
    nursery = os.getpid()
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        os.close(news)
        status = _live(order, nursery)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with suppress(OSError, ValueError):
            sys.stderr.flush()
        os._exit(status)


def _live(order: dict[str, Any], nursery: int) -> int:
    """What a child does: begin as a program of its own would, and work."""
    import importlib

    from avlm.data.workers.foreman import end_with

    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    end_with(nursery)  # whoever starts the run again starts this again
    return int(importlib.import_module(order["module"]).main(*order["arguments"]))


if __name__ == "__main__":
    main()
