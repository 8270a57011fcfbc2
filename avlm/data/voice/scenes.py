"""What is seen while somebody speaks. It tells what the answer is, and nothing about whether an answer is wanted.

If pictures of digits came with questions about digits only, a model would learn that such a question beside any other
picture is no question. So a picture is drawn by the words that are said, which a question and the statement of the same
words share, and never by who was meant.
"""

from __future__ import annotations

from pathlib import Path

from numpy.random import Generator
from PIL import Image

from avlm.data.voice.drawing import Draft, Said
from avlm.data.world.pictures import Pair, draw_scene
from avlm.data.world.tasks import FAMILIES, Deck, Picture, Speech, plan
from avlm.data.world.words import COLOURS, NUMBERS, SHAPES, Split, plural

ROWS = 400
"""Of so many rows of the world's spoken questions the pictures are drawn; fewer leave some question without one."""
FITTING = 0.7
"""So often a picture is one that somebody asks about in these words."""

_TELLING = frozenset((*COLOURS, *SHAPES, *map(plural, SHAPES), *NUMBERS))


class Scenes:
    """Pictures of a split, with the answers to what is asked about them.

    Args:
        folder: Where they are written, in `img/`.
        rng: All its chance.
    """

    def __init__(self, folder: Path, split: Split, rng: Generator) -> None:
        self.rng = rng
        self._answers: dict[tuple[str, str], str] = {}
        self._by_word: dict[str, list[str]] = {}
        drawn: dict[Picture, str] = {}
        for draft in plan(FAMILIES["voice"], ROWS, Deck(rng, split)):
            picture, words = draft.media
            assert isinstance(picture, Picture) and isinstance(words, Speech)
            if picture not in drawn:
                drawn[picture] = f"img/{split}-{len(drawn):04d}.png"
                Image.fromarray(draw_scene(picture.scene, split, rng)).save(folder / drawn[picture], format="PNG")
            self._answers[drawn[picture], words.text] = draft.answer
            for word in _telling(words.text):
                self._by_word.setdefault(word, []).append(drawn[picture])
        self.paths = tuple(drawn.values())
        self.pairs = tuple(path for picture, path in drawn.items() if isinstance(picture.scene, Pair))
        """Those of two things, which take longest to describe."""

    def beside(self, draft: Draft) -> str:
        """A picture for a sound: mostly one that is asked about in its words, else any."""
        said = draft.front.text if isinstance(draft.front, Said) else ""
        fitting = [path for word in _telling(said) for path in self._by_word.get(word, ())]
        pool = fitting if self.rng.random() < FITTING and fitting else self.paths
        return pool[int(self.rng.integers(len(pool)))]

    def answer(self, path: str, question: str) -> str:
        """The answer to a question about a picture; empty where the world does not ask it about this one."""
        return self._answers.get((path, question), "")


def _telling(text: str) -> list[str]:
    """The words of a text that something in a picture may be called by, in their order."""
    return [word for word in text.split() if word in _TELLING]
