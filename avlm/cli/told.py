"""A check of data as text: what is wrong, the worst first, and how things are spread, as bars."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterator

from avlm.data.checking.check import NAMES, CheckReport, StageFit
from avlm.data.checking.histogram import Histogram
from avlm.data.checking.problems import Problem, Severity, listed

HEADS: dict[Severity, str] = {
    "error": "Errors: training leaves these out, or refuses them",
    "warning": "Warnings: read, and hardly meant so",
    "note": "Notes",
}
PLACES = 6
TASKS = 12
BAR = 28


def tell_report(report: CheckReport) -> str:
    """All of it, as wide as the terminal."""
    width = min(120, max(60, shutil.get_terminal_size((100, 24)).columns))
    parts = ["\n".join(_head(report))]
    for severity, head in HEADS.items():
        problems = [problem for problem in report.problems if problem.severity == severity]
        if problems:
            parts.append("\n".join([head, *(line for problem in problems for line in _problem(problem, width))]))
    parts += ["\n".join(_stages(report.stages))] if report.stages else []
    parts += ["\n".join(_histogram(each)) for each in report.histograms]
    parts.append(_verdict(report))
    return "\n\n".join(parts)


def _head(report: CheckReport) -> Iterator[str]:
    media = ", ".join(f"{count:,} {NAMES[kind]}" for kind, count in report.media.items()) or "no media"
    how = "decoded" if report.decoded else "of which the headers were read"
    yield f"{report.data}: {report.rows:,} rows, {media} ({how}), {report.seconds:.1f} s"
    tasks = [f"{name or '(none)'} {count:,}" for name, count in report.tasks.items()]
    if tasks and list(report.tasks) != [""]:
        more = f", and {len(tasks) - TASKS} more" if len(tasks) > TASKS else ""
        yield f"tasks: {', '.join(tasks[:TASKS])}{more}"


def _problem(problem: Problem, width: int) -> Iterator[str]:
    yield from textwrap.wrap(
        f"{problem.count:,}  {problem.title}", width, initial_indent="  ", subsequent_indent="     "
    )
    if problem.places:
        places = listed(problem.places, PLACES, problem.count)
        yield from textwrap.wrap(places, width, initial_indent="     ", subsequent_indent="     ")
    example = f"such as: {problem.example}"
    yield from textwrap.wrap(example, width, initial_indent="     ", subsequent_indent="     ")


def _stages(stages: list[StageFit]) -> Iterator[str]:
    yield "What training makes of it"
    head = ["stage", "rows", "unfit", "too long", "row holds", "tokens", "learned", "left out for what they hold"]
    lines = [
        [
            stage.name,
            f"{stage.rows:,}",
            f"{stage.unfit:,}",
            f"{stage.too_long:,}",
            "-" if stage.row_tokens is None else f"{stage.row_tokens:,}",
            f"{stage.tokens:,}",
            f"{stage.targets:,}",
            stage.told or "-",
        ]
        for stage in stages
    ]
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
    for line in [head, *lines]:
        cells = [
            f"{cell:{w}}" if i in (0, len(head) - 1) else f"{cell:>{w}}"
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]
        yield f"  {'  '.join(cells)}".rstrip()


def _histogram(each: Histogram) -> Iterator[str]:
    unit = f" {each.unit}" if each.unit else ""
    yield (
        f"{each.name}: {_number(each.least)} to {_number(each.most)}{unit}, median {_number(each.median)}, "
        f"mean {_number(each.mean)}, 19 of 20 at most {_number(each.p95)}"
        + ("" if each.unit == "px" else f"; {_number(each.total)}{unit} in all")
    )
    most = max(count for _, _, count in each.bins)
    labels = [f"{_number(low)} to {_number(high)}" for low, high, _ in each.bins]
    wide, digits = max(map(len, labels)), len(f"{most:,}")
    for label, (_, _, count) in zip(labels, each.bins, strict=True):
        yield f"  {label:>{wide}}  {count:>{digits},}  {_bar(count / most)}".rstrip()


def _bar(share: float) -> str:
    full, half = ("\u2588", "\u258c") if _writes("\u2588\u258c") else ("#", "")
    halves = max(round(2 * BAR * share), 1 if share else 0)
    return full * (halves // 2) + half * (halves % 2)


def _writes(letters: str) -> bool:
    """Whether standard output knows them."""
    try:
        letters.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _number(value: float) -> str:
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _verdict(report: CheckReport) -> str:
    counts = {
        severity: sum(problem.count for problem in report.problems if problem.severity == severity)
        for severity in HEADS
    }
    if report.fine():
        return "Nothing is wrong." if not counts["note"] else "Nothing is wrong; there are notes."
    errors, warnings = counts["error"], counts["warning"]
    return f"{errors:,} error{'' if errors == 1 else 's'}, {warnings:,} warning{'' if warnings == 1 else 's'}."
