"""The other side of `crew`: the process that starts, ends and buries a crew's workers, and what a worker does.

A crew has one foreman. It has a single thread, so it forks safely whatever its own parent
has become meanwhile, and a worker is replaced within milliseconds. It ends, workers and
all, as soon as the process that has the crew closes it or is gone.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import pickle
import select
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from avlm.data.workers import parcels
from avlm.errors import AvlmError

LOOK_S = 0.5
"""How often a process looks whether the one that started it is still there."""
BURIAL_S = 3.0
"""How long a foreman waits for workers it has killed; one that waits for a dead file server may take forever."""
OUT_OF_MEMORY = 77
"""Exit status of a worker that could get no more memory."""
UNKNOWN_WORK = 78
"""Exit status of a foreman that cannot make out what the work is."""
LAST_RESORT = 500
"""Where memory runs out in spite of all, the kernel takes a worker before the process that trains (oom_score_adj)."""

START, KILL = b"s", b"k"
ORDER = struct.Struct("<cH")
"""What is to be done, and with which worker."""
DEATH = struct.Struct("<ii")
"""Which worker, and its wait status."""


def end_with(parent: int) -> None:
    """End this process, at once and whatever it is doing, when the one that started it is gone."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_S)
        os._exit(1)

    threading.Thread(target=watch, name="avlm-end-with-parent", daemon=True).start()


# ---------------------------------------------------------------- what a worker is at


STARTING, IDLE, HANDING = -3, -1, -2
"""What a worker is at when it is at none of a task's items: HANDING is between the last of them and the next task."""


@dataclass(frozen=True, slots=True)
class At:
    """What a worker is at."""

    task: int
    item: int
    """Its number in the task; negative: none of them."""
    since: float
    """By time.monotonic(), which all processes of a machine share."""
    about: str = ""
    file: str = ""


class Slot:
    """A worker's line in the memory that it shares with the process that has the crew."""

    SIZE = 1024
    _FACTS = struct.Struct("<qqd")
    _SINCE = struct.Struct("<d")
    _TEXTS = ((32, 224), (256, 768))
    """Where each text begins, and its room: two bytes of length, then UTF-8."""

    def __init__(self, memory: mmap.mmap, number: int) -> None:
        self.memory, self.start = memory, number * self.SIZE

    def put(self, task: int, item: int) -> None:
        self._FACTS.pack_into(self.memory, self.start, task, item, time.monotonic())

    def begin(self) -> None:
        """Count the time from now, at the same item."""
        self._SINCE.pack_into(self.memory, self.start + self._FACTS.size - self._SINCE.size, time.monotonic())

    def note(self, texts: tuple[str | None, ...]) -> None:
        """Say what the item is about, and the file that is being read; None leaves what is there."""
        for text, (at, room) in zip(texts, self._TEXTS, strict=True):
            if text is not None:
                data = text.encode("utf-8", "replace")[-(room - 2) :]
                struct.pack_into(f"<H{len(data)}s", self.memory, self.start + at, len(data), data)

    def read(self) -> At:
        task, item, since = self._FACTS.unpack_from(self.memory, self.start)
        texts = []
        for at, room in self._TEXTS:
            (length,) = struct.unpack_from("<H", self.memory, self.start + at)
            begin = self.start + at + 2
            texts.append(self.memory[begin : begin + min(length, room - 2)].decode("utf-8", "replace"))
        return At(task, item, since, *texts)


_mine: Slot | None = None
"""This process's line, if it is a worker."""


def note(*, about: str | None = None, file: str | None = None) -> None:
    """Say what the item at hand is about and which file is being read, for whoever must tell why it was given up.

    Does nothing in a process that is no worker.
    """
    if _mine is not None:
        _mine.note((about, file))


def begin(*, about: str) -> None:
    """Say that work on a part of the item begins, and what that is about: it has as much time as a whole item.

    Does nothing in a process that is no worker.
    """
    if _mine is not None:
        _mine.begin()
        _mine.note((about, ""))


# ---------------------------------------------------------------- a worker


@dataclass(frozen=True, slots=True)
class Posts:
    """Where a crew's processes meet."""

    control: socket.socket
    """The foreman's end: orders come in, deaths go out."""
    tasks: socket.socket
    """Workers take tasks here, each as soon as it is free: the kernel gives every message to one of them."""
    results: socket.socket
    slots: mmap.mmap


@dataclass(frozen=True, slots=True)
class Error:
    """What an item's work raised."""

    error: Exception


def work_on(posts: Posts, number: int, work: Callable[[Any], Any], memory_mb: int | None) -> None:
    """Be a worker until there is no more to do."""
    global _mine
    _mine = slot = Slot(posts.slots, number)
    torch.set_num_threads(1)
    if memory_mb is not None:
        _limit_memory(memory_mb)
    while True:
        slot.put(0, IDLE)
        task = parcels.receive(posts.tasks)
        if task is None:
            return
        ticket, items = task
        began, found = time.perf_counter(), []
        for at, item in enumerate(items):
            slot.note(("", ""))
            slot.put(ticket, at)
            found.append(_done(work, item))
        slot.put(ticket, HANDING)
        _hand_over(posts.results, ticket, found, time.perf_counter() - began)


def _done(work: Callable[[Any], Any], item: Any) -> Any:
    try:
        return work(item)
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except Exception as error:
        if isinstance(error, RuntimeError) and "can't allocate memory" in str(error):  # torch's word for it
            os._exit(OUT_OF_MEMORY)
        return Error(_portable(error))


def _portable(error: Exception) -> Exception:
    """The error with what its traceback says, which does not travel; in other words if it does not travel itself."""
    told = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    if not isinstance(error, AvlmError):  # a mistake of our own
        error.add_note(f"In a worker process:\n{told}")
    return error


def _hand_over(way: socket.socket, ticket: int, found: list[Any], seconds: float) -> None:
    try:
        parcel = parcels.wrap(ticket, (seconds, found))
    except Exception as error:  # it does not travel, or there is no room for it
        parcel = parcels.wrap(ticket, (seconds, [Error(_portable(error))] * len(found)))
    parcel.post(way)


def _limit_memory(megabytes: int) -> None:
    """Let this process have so much memory of its own beyond what it has now.

    What is limited is private memory that can be written (RLIMIT_DATA): an address space as a whole says little about
    a process with torch, or even a GPU, in it. Asking for more is a MemoryError here, and no trouble elsewhere.
    """
    import resource  # not on every system

    has = 0
    with suppress(OSError), open("/proc/self/status") as status:
        has = sum(int(line.split()[1]) << 10 for line in status if line.startswith("VmData:"))
    with suppress(OSError, ValueError):  # a stricter limit stands already
        resource.setrlimit(resource.RLIMIT_DATA, (has + (megabytes << 20), resource.getrlimit(resource.RLIMIT_DATA)[1]))
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write(str(LAST_RESORT))


# ---------------------------------------------------------------- the foreman


def lead(posts: Posts, parent: int, work: Callable[[Any], Any], memory_mb: int | None) -> None:
    """Be a foreman until the crew is closed or the process that has it is gone."""
    signal.set_wakeup_fd(-1)
    # A stop is for the process to grant that has the crew.
    for wish in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(wish, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    gc.freeze()  # so that workers do not copy all of it just to find out that none of it is garbage
    workers: dict[int, tuple[int, int]] = {}
    """By the pipe that closes when the worker ends: its number and process."""
    sight = select.poll()
    sight.register(posts.control, select.POLLIN)
    try:
        while os.getppid() == parent:
            for descriptor, _ in sight.poll(LOOK_S * 1000):
                if descriptor in workers:
                    sight.unregister(descriptor)
                    os.close(descriptor)
                    number, process = workers.pop(descriptor)
                    posts.control.send(DEATH.pack(number, os.waitpid(process, 0)[1]))
                    continue
                data = posts.control.recv(ORDER.size)
                if not data:
                    return
                order, number = ORDER.unpack(data)
                if order == START:
                    pipe, process = _fork_worker(posts, number, work, memory_mb, list(workers))
                    workers[pipe] = number, process
                    sight.register(pipe, select.POLLHUP)
                else:
                    for theirs, process in workers.values():
                        if theirs == number:
                            os.kill(process, signal.SIGKILL)
    except OSError:  # whoever has the crew is gone
        pass
    finally:
        _bury([process for _, process in workers.values()])


def _fork_worker(
    posts: Posts, number: int, work: Callable[[Any], Any], memory_mb: int | None, others: list[int]
) -> tuple[int, int]:
    """Start a worker; returns a pipe that closes when it ends, and its process."""
    ours, theirs = os.pipe()
    foreman = os.getpid()
    process = os.fork()
    if process:
        os.close(theirs)
        return ours, process
    status = 1
    try:
        _end_with_foreman(foreman)
        for descriptor in (ours, posts.control.detach(), *others):
            os.close(descriptor)
        work_on(posts, number, work, memory_mb)
        status = 0
    except (BrokenPipeError, ConnectionError):
        pass  # whoever has the crew is gone
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type] # there is an exception here
    finally:
        os._exit(status)
    raise AssertionError


def _end_with_foreman(foreman: int) -> None:
    """Have the kernel end this process with its foreman, which works even while a decoder holds the interpreter."""
    if sys.platform == "linux":
        kernel_option = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None).prctl(kernel_option, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != foreman:
            os._exit(1)
    else:
        end_with(foreman)


def _bury(processes: list[int]) -> None:
    """Kill processes and wait until they are gone."""
    for process in processes:
        with suppress(OSError):
            os.kill(process, signal.SIGKILL)
    until = time.monotonic() + BURIAL_S
    while processes and time.monotonic() < until:
        processes = [process for process in processes if os.waitpid(process, os.WNOHANG)[0] == 0]
        if processes:
            time.sleep(0.001)


def start_fresh(control: int, tasks: int, results: int, slots: int, parent: int) -> None:
    """What a foreman in an interpreter of its own begins with: the work comes as the first message."""
    ends = [socket.socket(fileno=descriptor) for descriptor in (control, tasks, results)]
    posts = Posts(ends[0], ends[1], ends[2], mmap.mmap(slots, 0))
    os.close(slots)
    try:
        first = parcels.receive(posts.control)
    except Exception:
        traceback.print_exc()
        os._exit(UNKNOWN_WORK)
    if first is not None:
        lead(posts, parent, *first[1])
