"""What is wrong with a data set, in groups: how bad, how often, where, and one example each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Severity = Literal["error", "warning", "note"]
"""`error`: training leaves the row out or refuses it. `warning`: it is read, hardly meant so. `note`: to be known."""

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")

KEPT = 1000
"""Places of one problem that are named; the rest is counted."""
KINDS = 100
"""Kinds of problems that are told apart; more are counted together."""
OTHERS = "other problems, of kinds too many to name"

_SENTENCE = re.compile(r"[.:;] (?=[A-Z])")
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
_WORD = re.compile(r'"[a-z_]{1,24}"')
_PATH = re.compile(r"(?<![\w<])[^\s\"(]*/[^\s\")]*")
_NUMBER = re.compile(r"(?<![\w<])-?\d[\d,._]*(?<=\d)")
_PLURAL = re.compile(r"(?<=\w)s\b")


@dataclass(slots=True)
class Problem:
    """One kind of problem."""

    severity: Severity
    title: str
    count: int = 0
    """How many rows have it, or media, or pairs: the title says."""
    places: list[str] = field(default_factory=list)
    """Where, the first of them: a row's place, or those of two rows with a word between them."""
    example: str = ""
    """The first one in full."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Findings:
    """Problems as they are found, grouped by their kind.

    Args:
        base: A folder; what lies in it is named from there.
    """

    def __init__(self, base: str = "") -> None:
        self._base = f"{base}/" if base else "\0"
        """What paths lie in: it is not said each time."""
        self._found: dict[tuple[Severity, str], Problem] = {}

    def add(self, severity: Severity, title: str, place: str, example: str, count: int = 1) -> None:
        """Count a problem.

        Args:
            title: Its kind, in words that every one of the kind shares.
            place: Where it is.
            example: What is so, why that cannot work, what to do.
        """
        self._take(_key(title), severity, title, place, example, count)

    def add_message(self, place: str, reason: str, name: str = "", severity: Severity = "error") -> None:
        """Count what an error says, among others that say the same of other rows.

        Args:
            reason: An error's message without its place.
            name: What the message is about, if it begins with that.
        """
        title = title_of(reason, name)
        self._take(_key(title), severity, title, place, reason, 1)

    def _take(self, key: str, severity: Severity, title: str, place: str, example: str, count: int) -> None:
        if (severity, key) not in self._found and len(self._found) >= KINDS:
            key = title = OTHERS
        place, example = place.replace(self._base, ""), example.replace(self._base, "")
        problem = self._found.setdefault((severity, key), Problem(severity, title))
        problem.count += count
        problem.example = problem.example or example
        if place and len(problem.places) < KEPT:
            problem.places.append(place)

    def problems(self) -> list[Problem]:
        """The worst first, of equals the most frequent."""
        return sorted(self._found.values(), key=lambda p: (SEVERITIES.index(p.severity), -p.count, p.title))


def title_of(reason: str, name: str = "") -> str:
    """What a message has in common with others of its kind: its first beat, without names and numbers.

    >>> title_of('a.png: has 700 bytes, and at most 512 are read. Cut or compress it', "a.png")
    'has N bytes, and at most N are read'
    """
    text = reason.removeprefix(f"{name}: ") if name else reason
    if "codec can't decode" in text:
        return "is not text in UTF-8"
    quoted: list[str] = []

    def keep(match: re.Match[str]) -> str:
        quoted.append(match[0] if _WORD.fullmatch(match[0]) else '"\u2026"')
        return f"\0{len(quoted) - 1}\0"

    text = _SENTENCE.split(_QUOTED.sub(keep, text))[0]
    text = _PATH.sub("\u2026", text)
    text = re.sub("\0(\\d+)\0", lambda match: f"\1{match[1]}\1", text)
    text = "".join(part if i % 2 else _NUMBER.sub("N", part) for i, part in enumerate(re.split("(\1\\d+\1)", text)))
    text = re.sub("\1(\\d+)\1", lambda match: quoted[int(match[1])], text)
    return text.rstrip(".")[:200]


def _key(title: str) -> str:
    """One mark and two marks are the same kind of problem."""
    return _PLURAL.sub("", title)


def listed(places: Sequence[str], most: int, count: int | None = None) -> str:
    """Places in words, what they begin with said once: ``train.jsonl line 3, 17, 254 and 9 more``."""
    total = len(places) if count is None else count
    shown = list(places[:most])
    first = [place.rpartition(" ")[0] for place in shown]
    words = [
        place.rpartition(" ")[2] if i and first[i] == first[i - 1] and first[i] else place
        for i, place in enumerate(shown)
    ]
    text = ", ".join(words)
    return f"{text} and {total - len(shown):,} more" if total > len(shown) else text


def worst(problems: Iterable[Problem]) -> Severity | None:
    """The worst there is; None without any."""
    there = {problem.severity for problem in problems}
    return next((severity for severity in SEVERITIES if severity in there), None)
