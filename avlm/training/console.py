"""Where long work tells how far it is: bars with the time left, or a plain line now and then without a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

EVERY_S = 30.0
"""Between two plain lines about the same work."""


def make_console() -> Console:
    """Where a run tells what it does: standard error, so that standard output stays for answers."""
    return Console(file=sys.stderr)


def tell(console: Console, sentence: str) -> None:
    """Print a sentence as it is: what looks like markup in a file's name is none."""
    console.print(sentence, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def counted(name: str, console: Console) -> Iterator[Callable[[int, int], None]]:
    """A bar for work that reports (done, all)."""
    with world_progress(console) as progress:
        yield lambda done, total: progress(name, done, total)


@contextmanager
def world_progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Bars for work of several kinds that reports (kind, done, all); plain lines where there is no terminal."""
    if not console.is_terminal:
        yield _plain_lines(console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as shown:
        tasks: dict[str, Any] = {}

        def update(kind: str, done: int, total: int) -> None:
            if kind not in tasks:
                tasks[kind] = shown.add_task(kind, total=total)
            shown.update(tasks[kind], completed=done, total=total)

        yield update


def _plain_lines(console: Console) -> Callable[[str, int, int], None]:
    """A line for each kind of work that takes long, every half minute; work of seconds says nothing."""
    begun: dict[str, float] = {}
    told: dict[str, float] = {}

    def update(kind: str, done: int, total: int) -> None:
        now = time.monotonic()
        since = begun.setdefault(kind, now)
        if now - told.setdefault(kind, now) >= EVERY_S:
            told[kind] = now
            left = (now - since) * (total - done) / max(1, done)
            tell(console, f"{kind}: {done:,} of {total:,}, about {left:,.0f} s left")

    return update
