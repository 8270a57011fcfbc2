"""Work on many things, one by one or by a crew of processes, with its progress told and its results in order."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from avlm.data.workers.crew import Crew, Lost
from avlm.data.workers.foreman import Error

T = TypeVar("T")
R = TypeVar("R")
Progress = Callable[[str, int, int], None]
"""Told ``(what, done, all)`` as the work goes on."""

LIMIT_S = 360.0
"""Time that one thing may take before the process that is at it is ended."""


def num_cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def spread(
    work: Callable[[T], R],
    items: Sequence[T],
    *,
    lost: Callable[[T, str], R],
    workers: int = 0,
    part: int = 1,
    name: str = "",
    progress: Progress | None = None,
    limit_s: float = LIMIT_S,
) -> Iterator[R]:
    """What a function returns for each of many things, in their order.

    Args:
        work: What is done with one of them.
        lost: What stands in for it where the process that was at it had to be ended, or died of it; told why.
        workers: Processes; 0 does it in this one, where nothing can be ended.
        part: How many things a process takes at once.
        name: What the progress is called.
    """
    parts = [items[start : start + part] for start in range(0, len(items), part)]
    done = 0
    for number, results in enumerate(_results(work, parts, lost, workers, limit_s)):
        yield from results
        done += len(parts[number])
        if progress is not None:
            progress(name, done, len(items))


def _results(
    work: Callable[[T], R],
    parts: Sequence[Sequence[T]],
    lost: Callable[[T, str], R],
    workers: int,
    limit_s: float,
) -> Iterator[list[R]]:
    if workers == 0 or not parts:
        for part in parts:
            yield [work(item) for item in part]
        return
    with Crew(work, min(workers, len(parts)), limit_s=limit_s) as crew:
        for part, outcomes in zip(parts, crew.in_order(parts, ahead=4 * workers), strict=True):
            yield [_judged(item, outcome, lost, limit_s) for item, outcome in zip(part, outcomes, strict=True)]


def _judged(item: T, outcome: R | Error | Lost, lost: Callable[[T, str], R], limit_s: float) -> R:
    if isinstance(outcome, Error):
        raise outcome.error
    if isinstance(outcome, Lost):
        return lost(item, why_lost(outcome, limit_s))
    return outcome


def why_lost(lost: Lost, limit_s: float) -> str:
    """Why something that was read has no result, behind its name."""
    return {
        "time": f"takes longer than {limit_s:g} s to read, so that was given up. Replace it, or remove the sample",
        "memory": "takes more memory to read than there is. Make it smaller, or remove the sample",
        "crash": f"crashed the process that read it, twice ({lost.detail}). Replace it, or remove the sample",
    }[lost.how]
