"""The forms of one example on its way through the house.

    Sample   as it lies in a source: turns of typed parts, media by path or as data
    Media    its media decoded: pixels and waveforms, before any model's wishes
    Encoded  tokens, labels, reserved places, and the tensors an encoder wants
    Row      several Encoded end to end; what goes through the model in one piece

Shapes in this file:
    T  tokens in a row    N  pictures, or tiles of them    F  frames of video    A  chunks of sound
    B  bins    M  frames of sound features    S  samples of sound    P  patches of a picture, of side p
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from avlm.errors import DataError
from avlm.layout import Kind, Load, Segment, Size

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

Role = Literal["system", "user", "assistant"]
MediaKind = Literal["image", "audio", "video"]
State = Literal["", "question", "noise"]


@dataclass(frozen=True, slots=True)
class Text:
    """Words."""

    text: str


@dataclass(frozen=True, slots=True)
class MediaItem:
    """One image, sound or video: a file, its bytes, or data already decoded.

    Raises:
        DataError: A picture is cut, or a cut has nothing in it.
    """

    kind: MediaKind
    path: Path | None = None
    span: tuple[int, int] | None = None
    """First byte and number of bytes of the medium in its file, where that holds others too (a tar)."""
    data: bytes | None = None
    decoded: Any = None
    """A `Picture`, `Sound` or `Clip`, when the caller has it at hand."""
    url: str = ""
    """Where it is fetched from, if the user allows that."""
    title: str = ""
    """What to call it, where it has no path or shares one; of a member of a tar its name."""
    alt: str = ""
    """What it shows or says, in words, where that is known: what a language model reads in its place."""
    start_s: float = 0.0
    """Where a cut of a sound or a video begins. It is taken as if it were a file by itself: its time begins at 0."""
    end_s: float | None = None
    """Where the cut ends; None, and what is beyond the end, is the end."""

    def __post_init__(self) -> None:
        if not self.is_cut():
            return
        if self.kind == "image":
            raise DataError(
                f"{self.name()}: is a picture with a start or an end, and pictures have no time. Remove them"
            )
        if not (math.isfinite(self.start_s) and self.start_s >= 0):
            raise DataError(
                f"{self.name()}: begins at {self.start_s:g} s, which is no time in it. Give 0 or more seconds"
            )
        if self.end_s is not None and not (math.isfinite(self.end_s) and self.end_s > self.start_s):
            raise DataError(
                f"{self.name()}: ends at {self.end_s:g} s and begins at {self.start_s:g} s, so there is nothing in it. "
                "Give an end behind its start"
            )

    def is_cut(self) -> bool:
        """Whether it is a part of what the file holds."""
        return self.start_s != 0 or self.end_s is not None

    def name(self) -> str:
        """What to call it in a message."""
        if self.path is None:
            return self.title or shown_url(self.url) or f"the {self.kind} given as data"
        return f"{self.path} {self.title}" if self.title else str(self.path)


def shown_url(url: str) -> str:
    """A URL as messages and records show it: without what people hide secrets in, its query, user and password.

    Returns:
        At most 200 characters that can be printed; nothing for a data URL.
    """
    if url[:5].lower() == "data:":
        return ""
    shown = re.sub(r"^([\w+.-]*:[/\\]*)[^/?#]*@", r"\1", re.sub(r"[?#].*", "", url, flags=re.DOTALL))
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in shown[:200])


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says."""

    role: Role
    parts: tuple[Text | MediaItem, ...]
    verbatim: bool = False
    """The parts stand end to end as they are; otherwise texts are parted by line breaks."""
    state: State = ""
    """Of an answer: whether what came before it was meant for the model, where the row says so."""
    ended: bool = True
    """Of an answer: whether it is learned that it ends here."""
    learned: bool = True
    """Of an answer: whether it is learned at all, or what was said before."""

    def text(self) -> str:
        return "".join(part.text for part in self.parts if isinstance(part, Text))


@dataclass(frozen=True, slots=True)
class Sample:
    """One training example, or one question."""

    id: str
    turns: tuple[Turn, ...]
    task: str = ""
    where: str = ""
    """Source and place, for messages."""
    rejected: Turn | None = None
    """An answer that is worse than the last turn, where the row has a pair of them."""

    def media(self) -> list[MediaItem]:
        return [part for turn in self.turns for part in turn.parts if isinstance(part, MediaItem)]

    def kinds(self) -> frozenset[MediaKind]:
        return frozenset(item.kind for item in self.media())

    def told(self) -> frozenset[MediaKind]:
        """Kinds of media that could all be given in words instead."""
        return self.kinds() - {item.kind for item in self.media() if not item.alt}


@dataclass(frozen=True, slots=True)
class Picture:
    """A decoded image."""

    pixels: np.ndarray
    """uint8 [height, width, 3], RGB."""


@dataclass(frozen=True, slots=True)
class Sound:
    """A decoded sound, already at the model's rate."""

    waveform: np.ndarray
    """float32 [S], mono, nominally -1..1."""
    sample_rate_hz: int


@dataclass(frozen=True, slots=True)
class Clip:
    """A decoded video: the frames that will be looked at, and its sound track."""

    frames: tuple[Picture, ...]
    duration_s: float
    sound: Sound | None


Decoded = Picture | Sound | Clip


@dataclass(frozen=True, slots=True)
class Heard:
    """One chunk of a sound, as an audio encoder takes it."""

    features: Tensor
    """float32 [B, M]."""
    frames: int
    """How many of its M frames make embeddings; what follows is padding."""
    beside: Heard | None = None
    """The same chunk, as a second encoder takes it."""


@dataclass(frozen=True, slots=True)
class Place:
    """Places reserved for one media item of one sample, for counting and for messages."""

    sample_id: str
    item: int
    segments: tuple[Segment, ...]

    def count(self, kind: Kind) -> int:
        return sum(s.count for s in self.segments if s.kind == kind)


Colours = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of each channel, of colours from 0 to 1."""


@dataclass(slots=True)
class Encoded:
    """One sample as the model will read it."""

    id: str
    ids: list[int]
    labels: list[int]
    """Same length as ``ids``; -100 where nothing is to be learned."""
    places: list[Place] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)
    """First position and end of each of `places`, with the words between them and the tokens around them."""
    images: list[Tensor] = field(default_factory=list)
    """Tiles of its pictures end to end, each float [3, height, width], or patches [P, p * p * 3]."""
    tiles: list[int] = field(default_factory=list)
    """How many tiles each of its pictures has."""
    image_sizes: list[Size] = field(default_factory=list)
    """Height and width of each picture as decoded, where its layout depends on them."""
    frames: list[Tensor] = field(default_factory=list)
    """Frames of its videos, as `images`."""
    colours: Colours | None = None
    """Where its pictures and frames are still uint8: what they are to be normalised by."""
    sounds: list[Heard] = field(default_factory=list)
    """The chunks of all its sounds, in reading order."""
    chunks: list[int] = field(default_factory=list)
    """How many chunks each of its sounds has."""
    words: list[list[int]] = field(default_factory=list)
    """Tokens of what each of its media shows or says, where an encoder is to learn that by itself."""
    states: list[tuple[int, int]] = field(default_factory=list)
    """For each answer the last position before it, and the class of its state: 0 a question, 1 noise."""
    teacher: Encoded | None = None
    """The same conversation with its media in words, for `loss=distill`; its targets are the same tokens."""
    rejected: Encoded | None = None
    """The same conversation with the worse answer, for `loss=dpo`; it stands behind this one in its row."""
    cut: int = 0
    """Tokens that were cut off its end, because it was longer than a row."""

    def room(self) -> int:
        """Tokens that it takes of a row's budget."""
        return max(len(self) + len(self.rejected or ()), len(self.teacher or ()))

    def __len__(self) -> int:
        return len(self.ids)

    def num_targets(self) -> int:
        behind = self.labels[1:]
        worse = 0 if self.rejected is None else self.rejected.num_targets()
        return len(behind) - behind.count(IGNORE) + sum(map(len, self.words)) + worse


@dataclass(frozen=True, slots=True)
class Counts:
    """What one sample takes of a row and of the encoders, without a token of it."""

    tokens: int
    """Its room in a row."""
    targets: int
    """Tokens that are learned."""
    load: Load = field(default_factory=Load)
    """Of all its media."""
    cut: int = 0
    """Tokens that were cut off its end, where it was longer than a row."""

    def most(self, other: Counts) -> Counts:
        """The larger of the two in everything."""
        a, b = self.load, other.load
        load = Load(max(a.tiles, b.tiles), max(a.patches, b.patches), max(a.frames, b.frames), max(a.cost, b.cost))
        return Counts(max(self.tokens, other.tokens), max(self.targets, other.targets), load, max(self.cut, other.cut))


IGNORE = -100
"""Label of a position that is not learned (the field's standard)."""


@dataclass(slots=True)
class Row:
    """Samples packed end to end. Attention, positions and the loss stop at each border."""

    input_ids: Tensor
    """int64 [1, T]."""
    labels: Tensor
    """int64 [1, T]; ``labels[t]`` is the token at t, or -100."""
    position_ids: Tensor
    """int64 [1, T]; starts again at 0 with each sample."""
    lengths: list[int]
    """Tokens of each sample."""
    ids: list[str]
    places: list[Place]
    pixel_values: Tensor | None = None
    """float [N, 3, height, width], the tiles of all pictures end to end; or [N, P, p * p * 3], zero beyond each
    picture's patches."""
    image_sizes: Tensor | None = None
    """int64 [pictures, 2], height and width of each as decoded, where the layout depends on them."""
    pixel_values_videos: Tensor | None = None
    """float [F, 3, height, width], or [F, P, p * p * 3]."""
    input_features: Tensor | None = None
    """float [A, B, longest M], zero beyond each chunk's end."""
    input_features_mask: Tensor | None = None
    """bool [A, longest M]; True where there is sound."""
    input_features_beside: Tensor | None = None
    input_features_beside_mask: Tensor | None = None
    """The same chunks for a second encoder."""
    chunks: list[int] = field(default_factory=list)
    """As in `Encoded`, of all samples."""
    words: list[list[int]] = field(default_factory=list)
    """As in `Encoded`, of all media in reading order."""
    states: list[tuple[int, int]] = field(default_factory=list)
    """As in `Encoded`; positions are the row's."""
    teacher: Row | None = None
    """The samples' teachers, packed in the same order."""

    def inputs(self) -> dict[str, Any]:
        """What the model's forward pass takes of the row, by name; labels are left to the caller."""
        names = (
            "input_ids", "position_ids", "places", "pixel_values", "image_sizes", "pixel_values_videos",
            "input_features", "input_features_mask", "input_features_beside", "input_features_beside_mask",
        )  # fmt: skip
        return {"row_lengths": self.lengths, **{name: getattr(self, name) for name in names}}

    def num_targets(self) -> int:
        return int((self.labels[0, 1:] != IGNORE).sum()) + sum(map(len, self.words))
