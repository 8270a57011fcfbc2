"""What is said: questions that are meant for the model, and what people say that is not.

Questions are those of the made-up world, or a file of the user's own. Of what is not meant
for the model the most telling is near at hand: the same words as a statement ("it is red"
beside "is it red"), single words, and talk about other things. Talk is put together from
clauses; no clause of the training split is in the held-out one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from numpy.random import Generator

from avlm.data.world.tasks import SPOKEN_QUESTIONS
from avlm.data.world.words import COLOURS, MAX_COUNT, NUMBERS, SHAPES, Split, count_phrase, plural
from avlm.errors import DataError

Line = TypeVar("Line")

HELD_OUT_EVERY = 5
"""Of a user's own lines every so many-th is held out."""
FEW = 100
"""So few questions are all in both splits: they are what the model is for, and voices and noises differ."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question by voice."""

    text: str
    answer: str = ""


STATEMENTS: tuple[str, ...] = (
    *(f"it is {colour}" for colour in COLOURS),
    *(f"there is a {shape}" for shape in SHAPES),
    *(f"there are {NUMBERS[count]}" for count in range(2, MAX_COUNT + 1)),
    *(f"it is the digit {number}" for number in NUMBERS),
    *(f"the {shape} is {colour}" for shape in SHAPES for colour in COLOURS),
    *(f"i see {NUMBERS[count]} {plural(shape)}" for count in range(2, MAX_COUNT + 1) for shape in SHAPES),
    *(f"this is a {colour} {shape}" for colour in COLOURS for shape in SHAPES),
)
"""The world's words, told and not asked."""

_TURNS = frozenset(("is", "are", "was", "were", "has", "have", "can", "could", "do", "does", "did", "will", "would"))


def told(question: str) -> str:
    """The words of a question as a statement: "is it red", told, is "it is red". Empty for what begins otherwise."""
    first, *rest = question.split()
    return " ".join((rest[0], first, *rest[1:])) if first in _TURNS and rest else ""


WORDS: tuple[str, ...] = (
    *NUMBERS,
    *COLOURS,
    *SHAPES,
    *(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES),
    *(count_phrase(count, colour, shape) for count in (2, 3, 4) for colour in COLOURS for shape in SHAPES),
)

NODS: dict[Split, tuple[str, ...]] = {
    "train": (
        "okay", "right", "uh huh", "i see", "good", "yes yes", "mm hmm", "fine", "all right then", "oh really",
        "no way", "very good", "of course", "oh dear", "i know", "exactly", "so it is", "that is right", "never mind",
        "thank you",
    ),
    "eval": ("ah okay", "sure", "oh nice", "got it", "hmm", "well well"),
}  # fmt: skip
"""What somebody says who listens and does not ask."""

_WHO: dict[Split, tuple[str, ...]] = {
    "train": (
        "my sister", "the neighbour", "our teacher", "he", "they", "the doctor", "my cousin", "the children", "we",
        "that man over there", "her brother", "the new driver", "you", "everybody",
    ),
    "eval": ("my uncle", "the baker", "our boss", "she", "his friends", "the nurse", "the old lady", "i"),
}  # fmt: skip
_DID: dict[Split, tuple[str, ...]] = {
    "train": (
        "bought new shoes", "went to the station", "never liked the soup", "called me", "painted the kitchen",
        "forgot the keys", "wanted to sleep", "lost the ticket", "took the early train", "cooked some rice",
        "walked the dog", "played football", "read the paper", "missed the meeting", "cleaned the windows",
        "laughed a lot", "waited for the bus", "sold the old car",
    ),
    "eval": (
        "baked a cake", "moved to the coast", "fixed the roof", "told a long story", "drove to work",
        "wrote a letter", "watered the plants", "broke a glass", "fed the cat", "carried the boxes",
    ),
}  # fmt: skip
_WHEN: dict[Split, tuple[str, ...]] = {
    "train": ("yesterday", "this morning", "last week", "again", "after lunch", "in the rain", "on monday", ""),
    "eval": ("today", "at noon", "last summer", "before dinner", "once more", ""),
}
_TO_OTHERS: dict[Split, tuple[str, ...]] = {
    "train": (
        "close the door please", "come over here", "put it on the table", "pass me the salt", "wait for me outside",
        "good morning everybody", "see you tomorrow", "where did you leave the keys", "what time do we eat",
        "how was your day", "do not worry about that", "who wants some coffee", "thank you very much",
        "turn the music down", "why is she so late",
    ),
    "eval": (
        "open the window please", "hand me that book", "good night everyone", "when does the shop close",
        "how much did you pay", "please sit down", "where have you been", "have a nice weekend", "bring your coat",
    ),
}  # fmt: skip


def talk(split: Split, rng: Generator) -> str:
    """Something that somebody says to somebody else."""
    if rng.random() < 0.3:
        return str(rng.choice(_TO_OTHERS[split]))
    clauses = (rng.choice(part[split]) for part in (_WHO, _DID, _WHEN))
    return " ".join(str(clause) for clause in clauses if clause)


def world_questions() -> tuple[Question, ...]:
    """The spoken questions of the demo's world. Their answers depend on a picture."""
    return tuple(Question(text) for text in SPOKEN_QUESTIONS)


def read_questions(path: Path) -> tuple[Question, ...]:
    """Questions of the user's own, one a line, with the answer behind a tab if there is one.

    Raises:
        DataError: There is none in it, or it is not text in UTF-8.
    """
    pairs = (line.partition("\t") for line in read_lines(path))
    return tuple(Question(text.strip(), answer.strip()) for text, _, answer in pairs)


def read_lines(path: Path) -> list[str]:
    """The lines of a text that have something in them.

    Raises:
        DataError: There are none, or it is not text in UTF-8.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise DataError(f"{path} is not text in UTF-8, so it cannot be spoken. Save it as UTF-8") from None
    if not lines:
        raise DataError(f"{path} has no line with a text, so there is nothing to say. Write one text a line")
    return lines


def held_out(lines: tuple[Line, ...], split: Split) -> tuple[Line, ...]:
    """The share of a user's lines that a split has."""
    return tuple(line for i, line in enumerate(lines) if (i % HELD_OUT_EVERY == 0) == (split == "eval"))


def asked(questions: tuple[Question, ...], split: Split) -> tuple[Question, ...]:
    """The questions that a split has."""
    return questions if len(questions) <= FEW else held_out(questions, split)
