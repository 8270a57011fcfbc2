"""Processes that work for this one and can be killed: a crew.

A picklable function and its tasks go in, what it returns comes out. What hangs or crashes
costs the item that it was at and nothing else: the worker is replaced, the rest of its task
comes again, and whoever asks for a task gets its results as if nothing had been. So the
order of results never depends on who did what, or how often.

For whatever decodes what strangers made: the training loader, the server.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Generic, Literal, Self, TypeAlias, TypeVar

from avlm.data.workers import parcels
from avlm.data.workers.foreman import (
    DEATH,
    HANDING,
    IDLE,
    KILL,
    ORDER,
    OUT_OF_MEMORY,
    START,
    STARTING,
    UNKNOWN_WORK,
    At,
    Error,
    Posts,
    Slot,
    lead,
)

T = TypeVar("T")
R = TypeVar("R")

LOOK_S = 0.2
"""How often a process that waits for its workers looks at what each of them is at."""
START_S = 120.0
"""How long a worker may take until it is ready; in an interpreter of its own it imports torch first."""
DIE_S = 10.0
"""How long a worker that was killed may take to be gone, and a crew that was closed."""
MAX_DEATHS = 5
"""Workers that die one after the other without anything at hand before that is an error."""

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), "1")
"""What libraries are told before they are imported."""
BEGIN = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from avlm.data.workers.foreman import start_fresh; start_fresh(*map(int, sys.argv[2:]))"
)


@dataclass(frozen=True, slots=True)
class Lost:
    """An item that has no result, because working on it ended the worker."""

    how: Literal["time", "memory", "crash"]
    detail: str
    """What a crash was: the signal, or the exit status."""
    about: str
    file: str
    """What the worker had said with `foreman.note`."""


Outcome: TypeAlias = R | Error | Lost
"""What became of an item: what the work returned, what it raised, or nothing."""


@dataclass(slots=True)
class _Task(Generic[T, R]):
    items: Sequence[T]
    found: dict[int, Outcome[R]] = field(default_factory=dict)
    strikes: dict[int, int] = field(default_factory=dict)
    """How often a worker died at an item."""


@dataclass(frozen=True, slots=True)
class _Part(Generic[T]):
    """Some items of a task, as they are sent."""

    task: int
    first: int
    items: Sequence[T]


_open: weakref.WeakSet[Crew[Any, Any]] = weakref.WeakSet()
"""The crews of this process; those of a forked one are not its own."""


class Crew(Generic[T, R]):
    """Worker processes. To be used by one thread at a time, and closed when done.

    Args:
        work: What is done with an item. Processes are forked, so it is only pickled with ``start="fresh"``.
        workers: How many processes work at once.
        limit_s: How long an item may take; the process that takes longer is killed, and the item is lost.
        memory_mb: How much memory a worker may have beyond what it begins with; None: as much as there is.
        start: Whether the first process is forked from this one, or begins as an interpreter of its own. The latter
            imports torch and transformers again, which takes seconds; it is for hosts whose other threads are at work
            when the crew begins (a fork would copy the locks that they hold).

    Raises:
        OSError: No process can be started.
    """

    def __init__(
        self,
        work: Callable[[T], R],
        workers: int,
        *,
        limit_s: float,
        memory_mb: int | None = None,
        start: Literal["fork", "fresh"] = "fork",
    ) -> None:
        if not hasattr(os, "fork"):
            raise OSError("this system cannot fork, and worker processes are forked. Work without any: workers=0")
        self.work, self.workers, self.limit_s, self.memory_mb, self.start = work, workers, limit_s, memory_mb, start
        self.pace_s: float | None = None
        """Seconds that one item takes, as of late."""
        self._owner = os.getpid()
        self._tasks: dict[int, _Task[T, R]] = {}
        self._parts: dict[int, _Part[T]] = {}
        """What was given out, by the number that it was sent with, and has not come back."""
        self._unsent: deque[parcels.Parcel] = deque()
        self._numbers = 0
        self._deaths = 0
        """Since the last result, of workers that had nothing at hand."""
        self._slow: dict[int, At] = {}
        """What workers were at for too long at the last look."""
        self._condemned: dict[int, tuple[At, float]] = {}
        """Workers that are to die: what they were at, and when that was ordered."""
        self._looked = time.monotonic()
        self._begun = [0.0] * workers
        self._slots_file = parcels.memory_of([bytes(workers * Slot.SIZE)], [0])
        self._slots = mmap.mmap(self._slots_file, 0)
        self._out, self._their_tasks = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._in, self._their_results = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control: socket.socket | None = None
        self._foreman = 0
        _open.add(self)
        self._start_foreman()

    # ------------------------------------------------------------ what is asked of it

    def give(self, items: Sequence[T]) -> int:
        """Give the crew a task, some items that one worker does one after the other; returns its ticket at once."""
        ticket = self._number()
        self._tasks[ticket] = _Task(items)
        self._send(_Part(ticket, 0, items))
        return ticket

    def result(self, ticket: int) -> list[Outcome[R]]:
        """Wait for a task; returns what became of each item, in the task's order. Each ticket is good for once.

        Raises:
            OSError: Workers die as soon as they are started.
        """
        while not self.is_done(ticket):
            self.attend()
        task = self._tasks.pop(ticket)
        return [task.found[i] for i in range(len(task.items))]

    def is_done(self, ticket: int) -> bool:
        """Whether `result` would not have to wait. It is found out by `attend` alone."""
        task = self._tasks[ticket]
        return len(task.found) == len(task.items)

    def in_order(self, tasks: Iterable[Sequence[T]], ahead: int) -> Generator[list[Outcome[R]], None, None]:
        """What becomes of some tasks, in their order, with at most ``ahead`` of them given out."""
        tickets: deque[int] = deque()
        for items in tasks:
            tickets.append(self.give(items))
            if len(tickets) == ahead:
                yield self.result(tickets.popleft())
        while tickets:
            yield self.result(tickets.popleft())

    def as_done(self, tasks: Iterable[Sequence[T]], ahead: int) -> Generator[tuple[int, list[Outcome[R]]], None, None]:
        """What becomes of some tasks as each is done, with its number, and at most ``ahead`` of them given out."""
        tickets: dict[int, int] = {}
        for number, items in enumerate(tasks):
            tickets[self.give(items)] = number
            if len(tickets) == ahead:
                yield self._first(tickets)
        while tickets:
            yield self._first(tickets)

    def _first(self, tickets: dict[int, int]) -> tuple[int, list[Outcome[R]]]:
        while True:
            for ticket in tickets:
                if self.is_done(ticket):
                    return tickets.pop(ticket), self.result(ticket)
            self.attend()

    def attend(self, beside: int | None = None) -> None:
        """Wait for news, not for long, and see to it.

        Args:
            beside: A descriptor of the caller's own: once there is something to read there, this waits no longer.

        Raises:
            OSError: Workers die as soon as they are started.
        """
        assert self._control is not None, "the crew is closed"
        sight = select.poll()
        sight.register(self._control, select.POLLIN)
        sight.register(self._in, select.POLLIN)
        if beside is not None:
            sight.register(beside, select.POLLIN)
        if self._unsent:
            sight.register(self._out, select.POLLOUT)
        news = sight.poll(LOOK_S * 1000)
        self._flush()
        self._take_in()
        if any(descriptor == self._control.fileno() for descriptor, _ in news):
            self._hear_of_deaths()
        if time.monotonic() - self._looked > LOOK_S:
            self._look()
            self._looked = time.monotonic()

    def close(self) -> None:
        """End all processes, whatever they are at, and wait until they are gone."""
        if self._control is None:
            return
        self._leave()
        if os.getpid() == self._owner:
            self._bury_foreman(DIE_S)
            self._slots.close()
        for parcel in self._unsent:
            parcel.drop()
        self._unsent.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_control"):
            self.close()

    # ------------------------------------------------------------ tasks out, results in

    def _number(self) -> int:
        self._numbers += 1
        return self._numbers

    def _send(self, part: _Part[T]) -> None:
        if part.items:
            number = self._number()
            self._parts[number] = part
            self._unsent.append(parcels.wrap(number, part.items))
            self._flush()

    def _flush(self) -> None:
        """Send what there is room for."""
        with suppress(BlockingIOError):
            while self._unsent:
                self._unsent[0].post(self._out, socket.MSG_DONTWAIT)
                self._unsent.popleft()

    def _send_again(self, numbers: Iterable[int]) -> None:
        """What a worker may have had. Should another come to do it too, what comes second is dropped."""
        for number in list(numbers):
            self._send(self._parts.pop(number))

    def _take_in(self) -> None:
        with suppress(BlockingIOError):
            while (arrived := parcels.receive(self._in, socket.MSG_DONTWAIT)) is not None:
                number, (seconds, found) = arrived
                part = self._parts.pop(number, None)
                if part is None:
                    continue  # done twice
                self._deaths = 0
                pace = seconds / len(found)
                self.pace_s = pace if self.pace_s is None else 0.8 * self.pace_s + 0.2 * pace
                task = self._tasks.get(part.task)
                if task is not None:
                    task.found.update(enumerate(found, part.first))

    # ------------------------------------------------------------ workers that die, and those that must

    def _hear_of_deaths(self) -> None:
        assert self._control is not None
        while True:
            try:
                news = self._control.recv(DEATH.size, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError:
                news = b""
            self._take_in()  # what was handed over before
            if not news:
                self._replace_foreman()
                return
            self._died(*DEATH.unpack(news))

    def _died(self, worker: int, status: int) -> None:
        at = Slot(self._slots, worker).read()
        condemned = self._condemned.pop(worker, None)
        self._start_worker(worker)
        if at.task not in self._parts:
            if at.item < 0:
                self._count_death(status)
            if at.item == IDLE:  # it may have taken a task, and no time to say so
                self._send_again(set(self._parts) - {Slot(self._slots, i).read().task for i in range(self.workers)})
        elif condemned is not None and not _same(condemned[0], at):
            self._send_again([at.task])  # it is no fault of what it had come to in the meantime
        elif at.item == HANDING and len(self._parts[at.task].items) > 1:
            part = self._parts.pop(at.task)
            for i in range(len(part.items)):
                self._send(_Part(part.task, part.first + i, part.items[i : i + 1]))
        else:
            self._suspect(at, "time" if condemned is not None else "crash", status)

    def _suspect(self, at: At, how: Literal["time", "crash"], status: int) -> None:
        """An item at which a worker died: once more alone, unless it took too long or has done that before."""
        part, item = self._parts.pop(at.task), max(0, at.item)
        task, index = self._tasks[part.task], part.first + item
        task.strikes[index] = task.strikes.get(index, 0) + 1
        if how == "time" or task.strikes[index] > 1:
            memory = os.WIFEXITED(status) and os.WEXITSTATUS(status) == OUT_OF_MEMORY
            task.found[index] = Lost("memory" if memory else how, _told(status), at.about, at.file)
        else:
            self._send(_Part(part.task, index, part.items[item : item + 1]))
        self._send(_Part(part.task, part.first, part.items[:item]))
        self._send(_Part(part.task, index + 1, part.items[item + 1 :]))

    def _count_death(self, status: int) -> None:
        self._deaths += 1
        if self._deaths > MAX_DEATHS:
            raise OSError(
                f"{self._deaths} worker processes ended one after the other before they had done anything (the last by "
                f"{_told(status)}), so more of them would end too. Make room in memory, or work without any: workers=0"
            )

    def _look(self) -> None:
        """Condemn workers that have been at something for too long at two looks."""
        now, slow = time.monotonic(), {}
        for worker in range(self.workers):
            if worker in self._condemned:
                if now - self._condemned[worker][1] > DIE_S:
                    os.kill(self._foreman, signal.SIGKILL)  # it does not answer
                continue
            at = Slot(self._slots, worker).read()
            begun = self._begun[worker] if at.item == STARTING else at.since
            if at.item == IDLE or now - begun <= (START_S if at.item == STARTING else self.limit_s):
                continue
            slow[worker] = at
            if worker in self._slow and _same(self._slow[worker], at):
                self._condemned[worker] = at, now
                self._order(KILL, worker)
        self._slow = slow

    # ------------------------------------------------------------ the foreman

    def _order(self, what: bytes, worker: int) -> None:
        assert self._control is not None
        with suppress(OSError):  # it is gone, which is found out where its end is read
            self._control.send(ORDER.pack(what, worker))

    def _start_worker(self, worker: int) -> None:
        Slot(self._slots, worker).put(0, STARTING)
        self._begun[worker] = time.monotonic()
        self._order(START, worker)

    def _start_foreman(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            posts = Posts(theirs, self._their_tasks, self._their_results, self._slots)
            self._foreman = self._fork(posts) if self.start == "fork" else self._begin_fresh(posts)
        for worker in range(self.workers):
            self._start_worker(worker)

    def _fork(self, posts: Posts) -> int:
        parent = os.getpid()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads: those of torch and of bars hold no locks
            process = os.fork()
        if process:
            return process
        try:
            for crew in list(_open):
                crew._leave()
            lead(posts, parent, self.work, self.memory_mb)
        except BaseException:
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type] # there is an exception here
        finally:
            os._exit(0)
        raise AssertionError

    def _begin_fresh(self, posts: Posts) -> int:
        ends = (posts.control.fileno(), posts.tasks.fileno(), posts.results.fileno(), self._slots_file)
        process = subprocess.Popen(
            [sys.executable, "-c", BEGIN, json.dumps(sys.path), *map(str, ends), str(os.getpid())],
            stdin=subprocess.DEVNULL, pass_fds=ends, env={**os.environ, **ONE_THREAD}, start_new_session=True,
        )  # fmt: skip
        process.returncode = 0  # it is waited for here, by its number
        assert self._control is not None
        parcels.wrap(0, (self.work, self.memory_mb)).post(self._control)
        return process.pid

    def _replace_foreman(self) -> None:
        """It was killed, and its workers with it, through no fault of what they were at."""
        assert self._control is not None
        self._control.close()
        status = self._bury_foreman(1.0)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == UNKNOWN_WORK:
            raise OSError(
                "a new interpreter does not know the work that it is to do, as it imports modules and no scripts. "
                "Define the work in a module"
            )
        self._count_death(status)
        self._condemned.clear()
        self._take_in()
        self._start_foreman()
        self._send_again(set(self._parts))

    def _bury_foreman(self, patience_s: float) -> int:
        """Wait until it is gone, and kill it in the end; returns its wait status."""
        until = time.monotonic() + patience_s
        try:
            while time.monotonic() < until:
                process, status = os.waitpid(self._foreman, os.WNOHANG)
                if process:
                    return status
                time.sleep(0.001)
            os.kill(self._foreman, signal.SIGKILL)
            return os.waitpid(self._foreman, 0)[1]
        except (ChildProcessError, ProcessLookupError):  # somebody else waited for it
            return 0

    def _leave(self) -> None:
        """Let go of this process's ends."""
        if self._control is not None:
            self._control.close()
            self._control = None
        for end in (self._out, self._in):
            end.close()
        if os.getpid() == self._owner:
            for end in (self._their_tasks, self._their_results):
                end.close()
            os.close(self._slots_file)


def _same(one: At, other: At) -> bool:
    return (one.task, one.item, one.since) == (other.task, other.item, other.since)


def _told(status: int) -> str:
    """What a wait status says."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    return f"exit status {os.WEXITSTATUS(status)}"
