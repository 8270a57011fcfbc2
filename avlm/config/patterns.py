"""Patterns over module names, which are paths with dots: whole components or nothing.

    q_proj                the module's last component
    mlp.*_proj            `*` is any part of one component
    layers.1.**           `**` is any number of components; never layers.11

A pattern need not begin where the path begins, but it ends where the path ends.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from functools import lru_cache

ALL_LINEAR = "all-linear"
"""Every linear projection that the part has, whatever its family calls them."""


def pattern_problem(pattern: str) -> str | None:
    """What keeps a text from being a pattern, in one sentence; None if nothing does."""
    if pattern == ALL_LINEAR or re.fullmatch(r"[\w*]+(\.[\w*]+)*", pattern):
        return None
    return (
        f"{pattern!r} is not a pattern of module names: components of letters, digits, _ and *, with dots between "
        "them. Write it like q_proj, mlp.*_proj, or layers.1.** for all that is inside"
    )


def matches(pattern: str, path: str) -> bool:
    """Whether a pattern is about the module of this path."""
    return _compiled(pattern).fullmatch(f"{path}.") is not None


@lru_cache(maxsize=256)
def _compiled(pattern: str) -> re.Pattern[str]:
    """The pattern over a path with a dot behind every component, so that none is cut."""
    parts = ["**", *pattern.split(".")]
    return re.compile("".join(r"(?:[^.]+\.)*" if part == "**" else _component(part) + r"\." for part in parts))


def _component(part: str) -> str:
    return "[^.]*".join(re.escape(piece) for piece in part.split("*"))


def nearest(pattern: str, paths: Iterable[str], count: int = 3) -> list[str]:
    """Names that the pattern may have meant, each as long as the pattern, the likeliest first."""
    length = pattern.count(".") + 1
    ends = dict.fromkeys(".".join(path.split(".")[-length:]) for path in paths)
    return difflib.get_close_matches(pattern, ends, count, cutoff=0.0)
