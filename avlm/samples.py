"""The forms of one example on its way through the house.

    Sample   as it lies in a source: turns of typed parts, media by path or as data
    Media    its media decoded: pixels and waveforms, before any model's wishes
    Encoded  tokens, labels, reserved places, and the tensors an encoder wants
    Row      several Encoded end to end; what goes through the model in one piece

Shapes in this file:
    T  tokens in a row     N  pictures, or tiles of them     F  frames of video     A  clips of sound
    B  mel bins            M  mel frames   S  samples of sound   P  patches of a picture, of side p
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from avlm.layout import Kind, Segment, Size

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

Role = Literal["system", "user", "assistant"]
MediaKind = Literal["image", "audio", "video"]


@dataclass(frozen=True, slots=True)
class Text:
    """Words."""

    text: str


@dataclass(frozen=True, slots=True)
class MediaItem:
    """One image, sound or video: a file, its bytes, or data already decoded."""

    kind: MediaKind
    path: Path | None = None
    data: bytes | None = None
    decoded: Any = None
    """A `Picture`, `Sound` or `Clip`, when the caller has it at hand."""
    alt: str = ""
    """What it shows or says, in words, where that is known: what a language model reads in its place."""

    def name(self) -> str:
        """What to call it in a message."""
        return str(self.path) if self.path is not None else f"the {self.kind} given as data"


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says."""

    role: Role
    parts: tuple[Text | MediaItem, ...]

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
class Place:
    """Places reserved for one media item of one sample, for counting and for messages."""

    sample_id: str
    item: int
    segments: tuple[Segment, ...]

    def count(self, kind: Kind) -> int:
        return sum(s.count for s in self.segments if s.kind == kind)


@dataclass(slots=True)
class Encoded:
    """One sample as the model will read it."""

    id: str
    ids: list[int]
    labels: list[int]
    """Same length as ``ids``; -100 where nothing is to be learned."""
    places: list[Place] = field(default_factory=list)
    images: list[Tensor] = field(default_factory=list)
    """Tiles of its pictures end to end, each float [3, height, width], or patches [P, p * p * 3]."""
    image_sizes: list[Size] = field(default_factory=list)
    """Height and width of each picture as decoded, where its layout depends on them."""
    frames: list[Tensor] = field(default_factory=list)
    """Frames of its videos, as `images`."""
    mels: list[Tensor] = field(default_factory=list)
    """Each float [B, M]."""
    words: list[list[int]] = field(default_factory=list)
    """Tokens of what each of its media shows or says, where an encoder is to learn that by itself."""

    def __len__(self) -> int:
        return len(self.ids)

    def num_targets(self) -> int:
        return sum(label != IGNORE for label in self.labels[1:]) + sum(map(len, self.words))


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
    """float [A, B, longest M], zero beyond each clip's end."""
    input_features_mask: Tensor | None = None
    """bool [A, longest M]; True where there is sound."""
    words: list[list[int]] = field(default_factory=list)
    """As in `Encoded`, of all media in reading order."""

    def num_targets(self) -> int:
        return int((self.labels[0, 1:] != IGNORE).sum()) + sum(map(len, self.words))
