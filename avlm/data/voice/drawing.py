"""What each sound of a split is: which words, which voice, what is heard beside them. Nothing is spoken here yet.

addressed      a question
noise          anything else: statements, words, talk among others, the world's sounds, noises
overlap        two at once: a question over quieter talk, or talk over talk
interruption   while the model speaks, and is heard: a question, a nod, or nothing else
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from numpy.random import Generator

from avlm.data.voice.mixing import NOISES
from avlm.data.voice.texts import NODS, STATEMENTS, WORDS, Question, talk, told
from avlm.data.world.words import SOUNDS, Split
from avlm.samples import State

Kind = Literal["addressed", "noise", "overlap", "interruption"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SHARES: dict[Kind, float] = {"addressed": 0.35, "noise": 0.35, "overlap": 0.15, "interruption": 0.15}

OWN_VOICE = "en-us-nyc"
"""The voice that the model speaks with; nobody else has it."""

_BACKGROUND = ("statement", "word", "talk", "sound", "noise")
_BACKGROUND_SHARES: dict[Split, tuple[float, ...]] = {
    "train": (0.42, 0.14, 0.24, 0.12, 0.08),
    "eval": (0.25, 0.15, 0.35, 0.15, 0.10),
}
"""What is hardest to tell is learned from most."""
_TOLD: dict[Split, float] = {"train": 0.6, "eval": 0.0}
"""So many statements are a question's own words, told; among all the others some are, too."""


@dataclass(frozen=True, slots=True)
class Said:
    """Somebody speaks."""

    text: str
    own: bool = False
    """It is the model's own voice, out of a loudspeaker."""


@dataclass(frozen=True, slots=True)
class Heard:
    """A sound of the world, or a noise of the split."""

    names: tuple[str, ...]


Source = Said | Heard


@dataclass(frozen=True, slots=True)
class Draft:
    """One sound before it is made."""

    kind: Kind
    state: State
    front: Source
    behind: Source | None = None
    snr_db: float = 0.0
    """How much louder the one in front is."""
    answer: str = ""

    def spoken(self) -> list[Said]:
        return [source for source in (self.front, self.behind) if isinstance(source, Said)]


@dataclass(frozen=True, slots=True)
class Texts:
    """What is there to be said in one split."""

    questions: Sequence[Question]
    others: Sequence[str] = ()
    """Lines of the user's own that are not meant for the model; without them statements, words and talk are drawn."""


class Drawer:
    """Draws the sounds of a split.

    Args:
        split: Whose voices, noises and talk.
        texts: What is asked, and what else is said.
        rng: All its chance.
    """

    def __init__(self, split: Split, texts: Texts, rng: Generator) -> None:
        self.split, self.texts, self.rng = split, texts, rng
        self._left: list[Question] = []

    def draw(self, kind: Kind) -> Draft:
        """One sound of a kind."""
        return _MAKERS[kind](self)

    def question(self) -> Question:
        """The next question: all come equally often."""
        if not self._left:
            self._left = [self.texts.questions[i] for i in self.rng.permutation(len(self.texts.questions))]
        return self._left.pop()

    def other(self) -> str:
        """Talk that is not meant for the model."""
        if self.texts.others:
            return str(self.rng.choice(self.texts.others))
        return talk(self.split, self.rng)

    def statement(self) -> str:
        """Something told in the words of questions."""
        if self.rng.random() < _TOLD[self.split]:
            question = self.texts.questions[int(self.rng.integers(len(self.texts.questions)))]
            if turned := told(question.text):
                return turned
        return str(self.rng.choice(STATEMENTS))

    def background(self) -> Source:
        """Something that is no question to the model."""
        what = str(self.rng.choice(_BACKGROUND, p=_BACKGROUND_SHARES[self.split]))
        if what == "sound":
            count = int(self.rng.integers(1, 3))
            return Heard(tuple(SOUNDS[i] for i in self.rng.choice(len(SOUNDS), count, replace=False)))
        if what == "noise":
            return Heard((str(self.rng.choice(list(NOISES[self.split]))),))
        if what == "talk" or self.texts.others:
            return Said(self.other())
        return Said(self.statement() if what == "statement" else str(self.rng.choice(WORDS)))

    def addressed(self) -> Draft:
        question = self.question()
        behind, snr_db = None, 0.0
        if self.rng.random() < 0.35:  # the world goes on while one asks
            behind, snr_db = Heard((str(self.rng.choice(SOUNDS)),)), float(self.rng.uniform(12, 25))
        return Draft("addressed", "question", Said(question.text), behind, snr_db, question.answer)

    def noise(self) -> Draft:
        return Draft("noise", "noise", self.background())

    def overlap(self) -> Draft:
        behind, snr_db = Said(self.other()), float(self.rng.uniform(12, 22))
        if self.rng.random() < 0.5:
            question = self.question()
            return Draft("overlap", "question", Said(question.text), behind, snr_db, question.answer)
        return Draft("overlap", "noise", Said(self.other()), behind, float(self.rng.uniform(0, 15)))

    def interruption(self) -> Draft:
        own = Said(str(self.rng.choice(STATEMENTS)), own=True)
        chance = self.rng.random()
        if chance < 0.5:
            question = self.question()
            leak_db = float(self.rng.uniform(15, 30))
            return Draft("interruption", "question", Said(question.text), own, leak_db, question.answer)
        if chance < 0.85:
            nod = Said(str(self.rng.choice(NODS[self.split])))
            return Draft("interruption", "noise", nod, own, float(self.rng.uniform(10, 25)))
        return Draft("interruption", "noise", own)


_MAKERS: dict[Kind, Callable[[Drawer], Draft]] = {
    "addressed": Drawer.addressed,
    "noise": Drawer.noise,
    "overlap": Drawer.overlap,
    "interruption": Drawer.interruption,
}


def draw_all(drawer: Drawer, count: int) -> list[Draft]:
    """So many sounds, the kinds in their shares, in a random order."""
    drafts = [drawer.draw(kind) for kind, share in SHARES.items() for _ in range(max(1, round(share * count)))]
    return [drafts[i] for i in drawer.rng.permutation(len(drafts))][:count]
