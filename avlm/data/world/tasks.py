"""What is asked in the made-up world, and why guessing does not help.

Rows are planned in groups, and each group is balanced by itself: for one question text
every answer comes equally often, and where two media are needed, each of them alone
goes with every answer equally often. A plan holds only whole groups, so the balance is
exact in any plan, not only on average. Nothing is drawn or spoken here: a plan names
the media by what they show, and two rows that name one object share one file.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from numpy.random import Generator

from avlm.data.world.pictures import Digit, Group, Pair, Relation, Scene, Thing
from avlm.data.world.words import (
    COLOURS,
    MAX_COUNT,
    NUMBERS,
    SHAPES,
    SOUNDS,
    Colour,
    Shape,
    Sound,
    Split,
    count_phrase,
)

Task = Literal["caption", "vqa", "transcribe", "sound", "match", "voice", "video"]
Card = TypeVar("Card")


# Compared by identity: two pictures of one scene are two files.
@dataclass(frozen=True, eq=False, slots=True)
class Picture:
    """An image file to be drawn."""

    scene: Scene


@dataclass(frozen=True, eq=False, slots=True)
class Speech:
    """An audio file of somebody saying something."""

    text: str


@dataclass(frozen=True, eq=False, slots=True)
class Noise:
    """An audio file of one of the eight sounds, or of several one after the other."""

    names: tuple[Sound, ...]

    def __str__(self) -> str:
        return ", then ".join(self.names)


@dataclass(frozen=True, eq=False, slots=True)
class Film:
    """What a video shows: one thing for a second, then another."""

    first: Thing
    second: Thing


@dataclass(frozen=True, eq=False, slots=True)
class Track:
    """What is heard in a video: one sound for a second, then another."""

    first: Sound
    second: Sound


@dataclass(frozen=True, eq=False, slots=True)
class Video:
    """A video file. Videos of one film have the same frames, of one track the same sound."""

    film: Film
    track: Track


Media = Picture | Speech | Noise | Video


@dataclass(frozen=True, slots=True)
class Draft:
    """One row before its media exist."""

    task: Task
    media: tuple[Media, ...]
    question: str
    answer: str


class Deck:
    """Deals evenly: each named pack is shuffled, dealt to its end, then shuffled again."""

    def __init__(self, rng: Generator, split: Split) -> None:
        self.rng = rng
        self.split = split
        self._packs: dict[str, list[object]] = {}

    def deal(self, name: str, cards: Sequence[Card]) -> Card:
        """The next card of the pack of that name, which must always hold the same cards."""
        pack = self._packs.setdefault(name, [])
        if not pack:
            pack.extend(cards[index] for index in self.rng.permutation(len(cards)))
        return pack.pop()  # type: ignore[return-value]

    def pick(self, cards: Sequence[Card]) -> Card:
        """Any card, by chance."""
        return cards[int(self.rng.integers(len(cards)))]

    def other(self, cards: Sequence[Card], *taken: Card) -> Card:
        """Any card but those."""
        return self.pick([card for card in cards if card not in taken])


@dataclass(frozen=True, slots=True)
class Family:
    """One kind of group within a task."""

    weight: float
    """Its share of the task's rows, in proportion to its sisters'."""

    size: int
    """Rows in a group."""

    group: Callable[[Deck], list[Draft]]


def plan(families: Sequence[Family], num_rows: int, deck: Deck) -> list[Draft]:
    """Plan whole groups, the families in proportion, until no group fits any more.

    Returns:
        At most ``num_rows`` drafts, group after group.
    """
    drafts: list[Draft] = []
    planned = [0.0] * len(families)
    while True:
        fitting = [index for index, family in enumerate(families) if family.size <= num_rows - len(drafts)]
        if not fitting:
            return drafts
        behind = min(fitting, key=lambda index: planned[index] / families[index].weight)
        drafts += families[behind].group(deck)
        planned[behind] += families[behind].size


# --- pictures alone -------------------------------------------------------------------

_DESCRIBE = ("Describe the picture.", "What is in the picture?", "What do you see?")
_DIGITS = range(len(NUMBERS))
_RELATIONS: tuple[Relation, ...] = ("left of", "above")
_SIDES = ("left", "right", "top", "bottom")
_ON = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
}


def _any_thing(deck: Deck) -> Thing:
    return Thing(deck.deal("colour", COLOURS), deck.deal("shape", SHAPES))


def _other_thing(deck: Deck, thing: Thing) -> Thing:
    """A thing that differs in colour and in shape."""
    return Thing(deck.other(COLOURS, thing.colour), deck.other(SHAPES, thing.shape))


def _pair_with(thing: Thing, side: str, other: Thing) -> Pair:
    """The pair in which ``thing`` is on that side."""
    relation: Relation = "left of" if side in ("left", "right") else "above"
    if side in ("left", "top"):
        return Pair(thing, relation, other)
    return Pair(other, relation, thing)


def _caption(deck: Deck, scene: Scene) -> list[Draft]:
    question = deck.deal("describe", _DESCRIBE)
    return [Draft("caption", (Picture(scene),), question, scene.caption)]


def _caption_digit(deck: Deck) -> list[Draft]:
    return _caption(deck, Digit(deck.deal("digit", _DIGITS)))


def _caption_group(deck: Deck) -> list[Draft]:
    count = deck.deal("count", range(1, MAX_COUNT + 1))
    return _caption(deck, Group(count, _any_thing(deck)))


def _caption_pair(deck: Deck) -> list[Draft]:
    first = _any_thing(deck)
    return _caption(deck, Pair(first, deck.deal("relation", _RELATIONS), _other_thing(deck, first)))


def _vqa(question: str, scenes: dict[str, Scene]) -> list[Draft]:
    """One question, and for each answer a picture of which it is true."""
    return [Draft("vqa", (Picture(scene),), question, answer) for answer, scene in scenes.items()]


def _ask_colour(deck: Deck) -> list[Draft]:
    shape = deck.deal("shape asked", SHAPES)
    things = {colour: Thing(colour, shape) for colour in COLOURS}
    return _vqa(
        f"What colour is the {shape}?",
        {
            colour: _pair_with(thing, deck.deal("side", _SIDES), _other_thing(deck, thing))
            for colour, thing in things.items()
        },
    )


def _ask_count(deck: Deck) -> list[Draft]:
    return _vqa(
        "How many shapes are there?",
        {NUMBERS[count]: Group(count, _any_thing(deck)) for count in range(1, MAX_COUNT + 1)},
    )


def _ask_shape(deck: Deck) -> list[Draft]:
    side = deck.deal("side asked", _SIDES)
    things = {shape: Thing(deck.deal("colour", COLOURS), shape) for shape in SHAPES}
    return _vqa(
        f"What shape is {_ON[side]}?",
        {shape: _pair_with(thing, side, _other_thing(deck, thing)) for shape, thing in things.items()},
    )


def _ask_side(deck: Deck) -> list[Draft]:
    thing = deck.deal("thing asked", [Thing(colour, shape) for colour in COLOURS for shape in SHAPES])
    return _vqa(
        f"Where is the {thing}?",
        {side: _pair_with(thing, side, _other_thing(deck, thing)) for side in _SIDES},
    )


def _ask_digit(deck: Deck) -> list[Draft]:
    return _vqa("Which digit is this?", {NUMBERS[value]: Digit(value) for value in _DIGITS})


# --- sound alone ----------------------------------------------------------------------

_WRITE = ("Write down what is said.", "What is said?")
_NAME_SOUND = ("What makes this sound?", "Which sound is this?")
_NAME_SOUNDS = ("What is heard?", "Which sounds are these?")


def _transcribe(deck: Deck, text: str) -> list[Draft]:
    return [Draft("transcribe", (Speech(text),), deck.deal("write", _WRITE), text)]


def _say_word(deck: Deck) -> list[Draft]:
    return _transcribe(deck, deck.deal("word", (*NUMBERS, *COLOURS, *SHAPES)))


def _say_thing(deck: Deck) -> list[Draft]:
    return _transcribe(deck, str(_any_thing(deck)))


def _say_count(deck: Deck) -> list[Draft]:
    thing = _any_thing(deck)
    count = deck.deal("count said", range(2, MAX_COUNT + 1))
    return _transcribe(deck, count_phrase(count, thing.colour, thing.shape))


def _say_question(deck: Deck) -> list[Draft]:
    return _transcribe(deck, deck.deal("question", SPOKEN_QUESTIONS))


def _sound(deck: Deck) -> list[Draft]:
    question = deck.deal("name sound", _NAME_SOUND)
    return [Draft("sound", (Noise((name,)),), question, name) for name in SOUNDS]


def _sounds(deck: Deck) -> list[Draft]:
    """Each sound once in front of another and once behind one."""
    question = deck.deal("name sounds", _NAME_SOUNDS)
    circle = [SOUNDS[index] for index in deck.rng.permutation(len(SOUNDS))]
    pairs = [Noise(pair) for pair in zip(circle, [*circle[1:], circle[0]], strict=True)]
    return [Draft("sound", (pair,), question, str(pair)) for pair in pairs]


# --- picture and sound ----------------------------------------------------------------

_MATCH = ("Does the word match the picture?", "Is this the right word for the picture?")
_ANSWER_IT = "Answer the spoken question."


def _cross(task: Task, question: str, scenes: tuple[Scene, Scene], texts: tuple[str, str]) -> list[Draft]:
    """Two pictures, two recordings, all four combinations; "yes" where the numbers agree.

    Each picture and each recording goes once with "yes" and once with "no".
    """
    pictures = [Picture(scene) for scene in scenes]
    recordings = [Speech(text) for text in texts]
    return [
        Draft(task, (pictures[i], recordings[j]), question, "yes" if i == j else "no")
        for i in range(2)
        for j in range(2)
    ]


def _match(deck: Deck, scenes: tuple[Scene, Scene], texts: tuple[str, str]) -> list[Draft]:
    return _cross("match", deck.deal("match", _MATCH), scenes, texts)


def _match_digit(deck: Deck) -> list[Draft]:
    one = deck.deal("digit", _DIGITS)
    two = deck.other(_DIGITS, one)
    return _match(deck, (Digit(one), Digit(two)), (NUMBERS[one], NUMBERS[two]))


def _match_colour(deck: Deck) -> list[Draft]:
    one = deck.deal("colour", COLOURS)
    two = deck.other(COLOURS, one)
    scenes = (Group(1, Thing(one, deck.pick(SHAPES))), Group(1, Thing(two, deck.pick(SHAPES))))
    return _match(deck, scenes, (one, two))


def _match_shape(deck: Deck) -> list[Draft]:
    one = deck.deal("shape", SHAPES)
    two = deck.other(SHAPES, one)
    scenes = (Group(1, Thing(deck.pick(COLOURS), one)), Group(1, Thing(deck.pick(COLOURS), two)))
    return _match(deck, scenes, (one, two))


def _match_thing(deck: Deck) -> list[Draft]:
    """Things that differ in one respect only, so that both words must be heard."""
    one = _any_thing(deck)
    if deck.deal("differs in", ("colour", "shape")) == "colour":
        two = Thing(deck.other(COLOURS, one.colour), one.shape)
    else:
        two = Thing(one.colour, deck.other(SHAPES, one.shape))
    return _match(deck, (Group(1, one), Group(1, two)), (str(one), str(two)))


def is_colour(colour: Colour) -> str:
    return f"is it {colour}"


def is_there(shape: Shape) -> str:
    return f"is there a {shape}"


def are_there(count: int) -> str:
    return f"are there {NUMBERS[count]}"


def is_digit(value: int) -> str:
    return f"is it the digit {NUMBERS[value]}"


SPOKEN_QUESTIONS: tuple[str, ...] = (
    *(is_colour(colour) for colour in COLOURS),
    *(is_there(shape) for shape in SHAPES),
    *(are_there(count) for count in range(2, MAX_COUNT + 1)),
    *(is_digit(value) for value in _DIGITS),
)
"""Every question that is asked by voice; each is answered by yes or no."""


def _voice_colour(deck: Deck) -> list[Draft]:
    one = deck.deal("colour", COLOURS)
    two = deck.other(COLOURS, one)
    scenes = (Group(1, Thing(one, deck.pick(SHAPES))), Group(1, Thing(two, deck.pick(SHAPES))))
    return _cross("voice", _ANSWER_IT, scenes, (is_colour(one), is_colour(two)))


def _voice_shape(deck: Deck) -> list[Draft]:
    """Each picture holds one of the two shapes, beside a third that nobody asks about."""
    one = deck.deal("shape", SHAPES)
    two = deck.other(SHAPES, one)
    scenes = []
    for shape in (one, two):
        thing = Thing(deck.deal("colour", COLOURS), shape)
        third = Thing(deck.other(COLOURS, thing.colour), deck.other(SHAPES, one, two))
        scenes.append(_pair_with(thing, deck.deal("side", _SIDES), third))
    return _cross("voice", _ANSWER_IT, (scenes[0], scenes[1]), (is_there(one), is_there(two)))


def _voice_count(deck: Deck) -> list[Draft]:
    counts = range(2, MAX_COUNT + 1)
    one = deck.deal("count asked", counts)
    two = deck.other(counts, one)
    scenes = (Group(one, _any_thing(deck)), Group(two, _any_thing(deck)))
    return _cross("voice", _ANSWER_IT, scenes, (are_there(one), are_there(two)))


def _voice_digit(deck: Deck) -> list[Draft]:
    one = deck.deal("digit", _DIGITS)
    two = deck.other(_DIGITS, one)
    return _cross("voice", _ANSWER_IT, (Digit(one), Digit(two)), (is_digit(one), is_digit(two)))


# --- video ----------------------------------------------------------------------------

_HAPPENS = ("What happens in the video?", "What happens first?", "What happens last?")


def happening(video: Video, question: str = _HAPPENS[0]) -> str:
    """What is seen and heard at the same time, in the whole video or in one of its halves."""
    first = f"{video.film.first} with {video.track.first}"
    last = f"{video.film.second} with {video.track.second}"
    return {_HAPPENS[1]: first, _HAPPENS[2]: last}.get(question, f"{first}, then {last}")


def _video(deck: Deck) -> list[Draft]:
    """Both orders of two things times both orders of two sounds, and one question.

    Two of the four videos have the same frames and two the same sound track, and no two the same answer.
    """
    one = _any_thing(deck)
    things = one, _other_thing(deck, one)
    sound = deck.deal("sound heard", SOUNDS)
    sounds = sound, deck.other(SOUNDS, sound)
    question = deck.deal("what happens", _HAPPENS)
    films = [Film(*pair) for pair in _orders(things)]
    tracks = [Track(*pair) for pair in _orders(sounds)]
    videos = [Video(film, track) for film in films for track in tracks]
    return [Draft("video", (video,), question, happening(video, question)) for video in videos]


def _orders(pair: tuple[Card, Card]) -> tuple[tuple[Card, Card], tuple[Card, Card]]:
    return pair, (pair[1], pair[0])


FAMILIES: dict[Task, tuple[Family, ...]] = {
    "caption": (
        Family(3, 1, _caption_digit),
        Family(3, 1, _caption_group),
        Family(4, 1, _caption_pair),
    ),
    "vqa": (
        Family(1, len(COLOURS), _ask_colour),
        Family(1, MAX_COUNT, _ask_count),
        Family(1, len(SHAPES), _ask_shape),
        Family(1, len(_SIDES), _ask_side),
        Family(1, len(NUMBERS), _ask_digit),
    ),
    "transcribe": (
        Family(4, 1, _say_word),
        Family(2, 1, _say_thing),
        Family(2, 1, _say_count),
        Family(2, 1, _say_question),
    ),
    "sound": (Family(1, len(SOUNDS), _sound), Family(1, len(SOUNDS), _sounds)),
    "match": (
        Family(4, 4, _match_digit),
        Family(2, 4, _match_colour),
        Family(2, 4, _match_shape),
        Family(2, 4, _match_thing),
    ),
    "voice": (
        Family(2, 4, _voice_colour),
        Family(2, 4, _voice_shape),
        Family(2, 4, _voice_count),
        Family(2, 4, _voice_digit),
    ),
    "video": (Family(1, 4, _video),),
}


# --- more to say about the same media ---------------------------------------------------

MAX_FOLLOW_UPS = 2


def follow_ups(draft: Draft, rng: Generator) -> list[tuple[str, str]]:
    """Further questions about a row's media, with their answers, for several turns on what was decoded once.

    Returns:
        At most two, drawn without repeating what the row asks already.
    """
    known = [pair for media in draft.media for pair in _facts(media) if pair[1] != draft.answer]
    order = rng.permutation(len(known))[:MAX_FOLLOW_UPS]
    return [known[index] for index in order]


def tells_apart(draft: Draft) -> bool:
    """Whether the answer is about one of two things that a picture shows."""
    return draft.task == "vqa" and all(isinstance(m, Picture) and isinstance(m.scene, Pair) for m in draft.media)


def in_words(media: Media) -> str:
    """What a medium shows or says, as somebody who cannot see or hear it would be told."""
    if isinstance(media, Speech):
        return media.text
    if isinstance(media, Noise):
        return str(media)
    if isinstance(media, Video):
        return happening(media)
    return media.scene.caption


def _facts(media: Media) -> list[tuple[str, str]]:
    if isinstance(media, Speech):
        return [(_WRITE[1], media.text)]
    if isinstance(media, Noise):
        return [(_NAME_SOUNDS[0], str(media))]
    if isinstance(media, Video):
        return [
            ("What was on the screen first?", str(media.film.first)),
            ("What was on the screen last?", str(media.film.second)),
            ("What was heard first?", media.track.first),
            ("What was heard last?", media.track.second),
        ]
    return [(_DESCRIBE[0], media.scene.caption), *_scene_facts(media.scene)]


def _scene_facts(scene: Scene) -> list[tuple[str, str]]:
    if isinstance(scene, Digit):
        return [("Which digit is this?", NUMBERS[scene.value])]
    if isinstance(scene, Group):
        return [("How many shapes are there?", NUMBERS[scene.count])]
    sides = ("left", "right") if scene.relation == "left of" else ("top", "bottom")
    facts = [("How many shapes are there?", NUMBERS[2])]
    for side, thing in zip(sides, (scene.first, scene.second), strict=True):
        facts += [
            (f"What colour is the {thing.shape}?", thing.colour),
            (f"What shape is {_ON[side]}?", thing.shape),
            (f"Where is the {thing}?", side),
        ]
    return facts
