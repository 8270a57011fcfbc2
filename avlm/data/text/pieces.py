"""What a rendered conversation is made of, and the marks that stand in a text while it is rendered.

The marks are Unicode's noncharacters, which are for a program's own use. They are taken out of what people write.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

CUT = "\ufdd0"
"""Between characters that are to be turned into tokens apart from each other. Removed when that is done."""
ANSWER = "\ufdd1"
"""Stands for an answer while a template is rendered."""
MARK = "\ufdd2{}\ufdd3"
"""Stands for a media item while a template is rendered."""
MARKS = re.compile("\ufdd2([0-9]+)\ufdd3")
SLOT = "\ufdd4{}\ufdd5"
"""Stands for what is said while a template is rendered."""
SLOTS = re.compile("\ufdd4([0-9]+)\ufdd5")
RESERVED = re.compile("[\ufdd0-\ufdef]")
"""They mean nothing in a text and are left out of it."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a rendered conversation: words, or the place of a media item."""

    text: str = ""
    media: int | None = None
    """Number of the media item in its sample."""
    answer: bool = False
    """Learned: the assistant's words with the end token."""


def split(text: str) -> list[Piece]:
    """Prompt text and media in reading order."""
    found: list[Piece] = []
    for i, chunk in enumerate(MARKS.split(text)):
        if i % 2:
            found.append(Piece(media=int(chunk)))
        elif chunk:
            found.append(Piece(chunk))
    return found


@dataclass(frozen=True, slots=True)
class Shape:
    """How a template writes every conversation of one shape: its pieces, with slots for what is said.

    Args:
        pieces: Each with its text cut up: words, number of a slot, words, number of a slot, ..., words.
        rest: What the template writes behind the last piece, cut up too.
        stripped: Slots that the template writes without the white space around them, where it is proven that every
            conversation of the shape is written like this; None where it is to be compared each time.
    """

    pieces: tuple[tuple[Piece, tuple[str, ...]], ...]
    rest: tuple[str, ...]
    stripped: frozenset[str] | None = None

    @classmethod
    def of(cls, pieces: list[Piece], rest: str, stripped: frozenset[str] | None) -> Shape:
        """A rendered conversation with slots in it."""
        return cls(tuple((piece, _cut_up(piece.text)) for piece in pieces), _cut_up(rest), stripped)

    def filled(self, said: dict[str, str]) -> tuple[list[Piece], str, str]:
        """The pieces of a conversation, the text that they make up (a mark for each medium), and what is behind them.

        Args:
            said: What goes into each slot, by its number.
        """
        found: list[Piece] = []
        texts: list[str] = []
        for piece, parts in self.pieces:
            if piece.media is not None:
                found.append(piece)
                texts.append(MARK.format(piece.media))
                continue
            texts.append(_filled(parts, said))
            found += [Piece(texts[-1], answer=True)] if piece.answer else split(texts[-1])
        return found, "".join(texts), _filled(self.rest, said)


def stripped_slots(plain: str, padded: str) -> frozenset[str] | None:
    """Slots that lose a space on either side when they are written; None if that is not all that happens to them.

    Args:
        plain: A rendered conversation with slots.
        padded: The same, rendered with a space on both sides of each slot.
    """
    words, numbers = _cut_up(plain)[::2], _cut_up(plain)[1::2]
    kept: set[str] = set()
    lost: set[str] = set()
    built = words[0]
    for number, word in zip(numbers, words[1:], strict=True):
        slot = SLOT.format(number)
        loses = padded.startswith(built + slot)
        (lost if loses else kept).add(number)
        built += (slot if loses else f" {slot} ") + word
    return frozenset(lost) if built == padded and not lost & kept else None


def _cut_up(text: str) -> tuple[str, ...]:
    return tuple(SLOTS.split(text))


def _filled(parts: tuple[str, ...], said: dict[str, str]) -> str:
    return "".join([said[part] if i % 2 else part for i, part in enumerate(parts)])
