"""How two sides are timed against each other, and how the result is written down.

The sides of a case take turns, so that whatever else the machine does disturbs all of them alike. What is told is each
side's best round, the one least disturbed, and the ratio of these; beside it stand the least, the median and the
greatest ratio of a round. A case first shows that its sides give the same result.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

VERSIONS = (
    "torch", "transformers", "numpy", "pillow", "simplejpeg", "av", "soundfile", "soxr", "megatron-energon",
    "webdataset", "datasets",
)  # fmt: skip
WARM_UP = 2
"""Rounds before the first that counts."""


@dataclass(slots=True)
class Case:
    """One thing that ours and some peers do."""

    name: str
    ours: Callable[[], object]
    peers: dict[str, Callable[[], object]]
    rounds: int = 15
    bar: float | None = None
    """The least ratio that is wanted against each peer; None: told for comparison."""
    check: Callable[[], None] = lambda: None
    """Raises where the sides do not give the same."""
    unbarred: tuple[str, ...] = ()
    """Peers that are told for comparison only."""
    tells: bool = False
    """Whether each side returns the seconds that count, which are not all that it takes."""


@dataclass(slots=True)
class Line:
    """Ours against one peer: a line of a table."""

    what: str
    ours: float
    """Best round: seconds, or samples a second."""
    peer_name: str
    peer: float
    ratio: float
    """How many times faster ours is, best round against best round."""
    ratios: list[float]
    """The same, round by round."""
    bar: float | None = None

    def cells(self, unit: str) -> list[str]:
        scale = 1000.0 if unit == "ms" else 1.0
        rounds = [f"{pick(self.ratios):.2f}" for pick in (min, statistics.median, max)]
        figures = [f"{scale * self.ours:.2f}", self.peer_name, f"{scale * self.peer:.2f}", f"{self.ratio:.2f}"]
        return [self.what, *figures, " ".join(rounds), self.verdict()]

    def verdict(self) -> str:
        """The bar, and whether the ratio is at least that."""
        return "" if self.bar is None else judged(self.bar, self.ratio >= self.bar)


@dataclass(slots=True)
class Table:
    """What one bench found."""

    name: str
    title: str
    unit: str
    """ms or samples/s."""
    notes: list[str] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)

    def verdicts(self) -> list[tuple[str, str]]:
        """What there is a bar for, with its verdict."""
        return [
            (f"{line.what}, against {line.peer_name}: {line.ratio:.2f}", line.verdict())
            for line in self.lines
            if line.bar is not None
        ]

    def text(self) -> str:
        """The table in Markdown."""
        head = ["what", f"avlm, {self.unit}", "peer", f"peer, {self.unit}", "ratio", "least, median, greatest", "bar"]
        return _markdown(self.title, self.notes, [head, *(line.cells(self.unit) for line in self.lines)])


@dataclass(slots=True)
class Figures:
    """What a bench without a peer found."""

    name: str
    title: str
    head: list[str]
    """The last column, "bar", is empty or what `judged` makes of it."""
    rows: list[list[str]] = field(default_factory=list)

    def verdicts(self) -> list[tuple[str, str]]:
        """What there is a bar for, with its verdict."""
        return [(row[0], row[-1]) for row in self.rows if row[-1]]

    def text(self) -> str:
        """The table in Markdown."""
        return _markdown(self.title, [], [self.head, *self.rows])


REACHED, MISSED = "reached", "missed"


def judged(bar: float | str, reached: bool) -> str:
    """A bar, and whether it was reached."""
    bar = f"{bar:g}" if isinstance(bar, float | int) else bar
    return f"{bar} {REACHED if reached else MISSED}"


def _markdown(title: str, notes: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    written = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths)) + " |" for row in rows]
    written.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join([f"## {title}", "", *notes, "", *written, ""])


def timed(case: Case) -> list[Line]:
    """Time a case, its sides in turns.

    Raises:
        AssertionError: The sides do not give the same.
    """
    case.check()
    sides = {"": case.ours, **case.peers}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(WARM_UP + case.rounds):
        names = list(sides)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            began = time.perf_counter()
            found = sides[name]()
            took = time.perf_counter() - began
            if turn >= WARM_UP:
                times[name].append(float(found) if case.tells else took)  # type: ignore[arg-type]
    ours = times.pop("")
    return [
        Line(
            case.name,
            min(ours),
            name,
            min(theirs),
            min(theirs) / min(ours),
            [b / a for a, b in zip(ours, theirs, strict=True)],
            None if name in case.unbarred else case.bar,
        )
        for name, theirs in times.items()
    ]


def machine() -> dict[str, Any]:
    """The machine and the versions, for whoever reads the table later."""
    found = {}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "python": platform.python_version(),
        **found,
    }


def _processor() -> str:
    """The processor's name, where Linux tells it."""
    try:
        told = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in told.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def written(table: Table | Figures, folder: Path, about: dict[str, Any]) -> None:
    """Write a table for people and for programs: ``NAME.md`` and ``NAME.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    told = ", ".join(f"{key} {value}" for key, value in about.items())
    (folder / f"{table.name}.md").write_text(f"{table.text()}\n{told}\n")
    (folder / f"{table.name}.json").write_text(json.dumps({"machine": about, **asdict(table)}, indent=1) + "\n")


def read(path: Path) -> Table | Figures:
    """A table that `written` wrote."""
    found = json.loads(path.read_text())
    found.pop("machine")
    if "lines" not in found:
        return Figures(**found)
    lines: Sequence[dict[str, Any]] = found.pop("lines")
    return Table(**found, lines=[Line(**line) for line in lines])


def summary(folder: Path) -> str:
    """All bars of the tables in a folder, in Markdown: how many of each table were reached, and which were missed."""
    rows = [["table", "bars", "reached", "missed"]]
    for path in sorted(folder.glob("*.json")):
        table = read(path)
        verdicts = table.verdicts()
        missed = [f"{what} ({verdict})" for what, verdict in verdicts if verdict.endswith(MISSED)]
        if verdicts:
            rows.append([f"[{table.title}]({table.name}.md)", str(len(verdicts)), str(len(verdicts) - len(missed)),
                         "; ".join(missed)])  # fmt: skip
    return _markdown("What was wanted, and what was reached", [], rows)
