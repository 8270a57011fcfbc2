"""Work on many rows, spread over processes.

A process that dies of what it reads (a file that crashes a decoder) costs that row alone:
what it had to do is done again in smaller and smaller parts until the row is known.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar

Result = TypeVar("Result", covariant=True)
Progress = Callable[[str, int, int], None]


class Work(Protocol[Result]):
    """What is done with rows. It can be pickled, and each process gets it once."""

    def begin(self) -> None:
        """Called once in each process before the first rows."""

    def __call__(self, rows: Sequence[int]) -> Result: ...

    def broken(self, row: int) -> Result:
        """What to say of a row over which the process died."""


def num_cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def spread(
    work: Work[Result],
    rows: Sequence[int],
    *,
    workers: int,
    part: int,
    name: str,
    progress: Progress | None = None,
) -> Iterator[Result]:
    """Do work on rows, in parts.

    Args:
        workers: Processes; 0 does it in this one.
        part: Rows in one part.
        name: What the progress is called.

    Returns:
        The result of each part, in order.
    """
    parts = [rows[start : start + part] for start in range(0, len(rows), part)]
    done = 0
    results = _here(work, parts) if workers == 0 or len(parts) < 2 else _in_processes(work, parts, workers)
    for number, result in results:
        done += len(parts[number]) if number is not None else 0
        if progress is not None:
            progress(name, done, len(rows))
        yield result


def _here(work: Work[Result], parts: Sequence[Sequence[int]]) -> Iterator[tuple[int | None, Result]]:
    if parts:
        work.begin()
    for number, part in enumerate(parts):
        yield number, work(part)


def _in_processes(
    work: Work[Result], parts: Sequence[Sequence[int]], workers: int
) -> Iterator[tuple[int | None, Result]]:
    """The parts' results in order, a few parts ahead of who takes them."""
    start = 0
    while start < len(parts):
        with _pool(work, min(workers, len(parts) - start)) as pool:
            waiting: deque[tuple[int, Future[Any]]] = deque()
            following = start
            try:
                while start < len(parts):
                    while following < len(parts) and len(waiting) < 2 * workers:
                        waiting.append((following, pool.submit(_do, parts[following])))
                        following += 1
                    result = waiting[0][1].result()
                    yield waiting.popleft()[0], result
                    start += 1
                return
            except BrokenProcessPool:
                pass  # the pool is gone; the part that was waited for may be the one
        for i, result in enumerate(_alone(work, parts[start])):
            yield (None if i else start), result
        start += 1


def _alone(work: Work[Result], rows: Sequence[int]) -> Iterator[Result]:
    """Rows of which one may kill a process: in one of their own, then in halves."""
    try:
        with _pool(work, 1) as pool:
            result = pool.submit(_do, rows).result()
    except BrokenProcessPool:
        if len(rows) == 1:
            yield work.broken(rows[0])
            return
        half = len(rows) // 2
        yield from _alone(work, rows[:half])
        yield from _alone(work, rows[half:])
        return
    yield result


@contextmanager
def _pool(work: Work[Result], workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes with the work in them; one intra-op thread each."""
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    before = {name: os.environ.get(name) for name in one_thread}
    os.environ.update(one_thread)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(work,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


class _Mine(Generic[Result]):
    """The work of this process."""

    work: Work[Any]


def _begin(work: Work[Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is for the process that started this one
    _Mine.work = work
    work.begin()


def _do(rows: Sequence[int]) -> Any:
    return _Mine.work(rows)
