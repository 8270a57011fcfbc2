"""Paths in a line as terminals paste them: quoted, escaped, as file:// addresses, or bare; the rest is words."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

_QUOTE = r"""'[^']*'|"(?:\\.|[^"\\])*\""""
_PIECE = re.compile(
    rf"(?P<quoted>(?:{_QUOTE})(?:{_QUOTE}|\\.)*(?!\w))|(?P<bare>(?:\\.|[^\s\\])+|\\)|(?P<space>\s+)", re.DOTALL
)
"""A quote opens a path where a piece begins, so that of "what's" is none."""
_BEHIND = ".,;:!?)"
"""What a sentence may put right behind a path."""


class Dragged(NamedTuple):
    """What a line was understood as."""

    paths: tuple[Path, ...]
    words: str
    """What is left of it."""


def dragged(line: str) -> Dragged:
    """Part a line into files that are there and whose name says that they are media, and words."""
    whole = _file(line.strip())
    if whole is not None:
        return Dragged((whole,), "")
    paths: list[Path] = []
    words: list[str] = []
    for piece in _PIECE.finditer(line):
        found, behind = _found(piece)
        if found is None:
            words.append(piece.group())
        else:
            paths.append(found)
            words.append(behind)
    return Dragged(tuple(paths), _sentence("".join(words)) if paths else line.strip())


def path_in(text: str) -> Path:
    """The one path that a command is given, however it was pasted; it need not be there."""
    text = text.strip()
    if os.path.isfile(text):
        return Path(text)
    piece = _PIECE.fullmatch(text)
    return _home(Path(next(_readings(piece)) if piece else text))


def _found(piece: re.Match[str]) -> tuple[Path | None, str]:
    """The file that a piece of a line is, and the marks behind it."""
    if piece["space"]:
        return None, ""
    for text in _readings(piece):
        bare = text.rstrip(_BEHIND) if piece["bare"] else text
        for given, behind in ((text, ""), (bare, text[len(bare) :])):
            path = _file(given)
            if path is not None:
                return path, behind
    return None, ""


def _readings(piece: re.Match[str]) -> Iterator[str]:
    """What a piece may stand for, the likeliest first."""
    text = piece.group()
    if piece["quoted"]:
        yield "".join(shlex.split(text))
        text = text[1:-1]
    if text.startswith("file://"):
        host, slash, path = text.removeprefix("file://").partition("/")
        if host in ("", "localhost"):
            yield unquote(slash + path)
    elif not piece["quoted"] and os.sep == "/":
        yield re.sub(r"\\(.)", r"\1", text)
    yield text


def _file(text: str) -> Path | None:
    """The medium that is there by this name."""
    from avlm.data.readers.endings import kind_by

    if not text or "\0" in text or kind_by(text) is None or "." not in text:
        return None
    path = Path(text)
    try:
        return next((p for p in (path, _home(path)) if p.is_file()), None)
    except (OSError, ValueError):  # longer than a name may be, say, or no text
        return None


def _home(path: Path) -> Path:
    try:
        return path.expanduser()
    except (RuntimeError, ValueError):  # there is no such user, or no such name
        return path


def _sentence(text: str) -> str:
    """The words of a line without its paths: no holes, and nothing left that is only marks."""
    text = re.sub(r"\s+([.,;:!?)])", r"\1", " ".join(text.split()))
    return text if any(c.isalnum() for c in text) else ""
