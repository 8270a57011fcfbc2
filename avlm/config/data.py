"""The data of a run: where its rows and their media are, and what is done about bad ones."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from avlm.config.base import Settings


class DataSet(Settings):
    """Where the media of a set lie, for rows that name their `set` (VITA's)."""

    folder: str | None = None
    """Of pictures and videos, and of sounds where they have none of their own; default: as for rows without a set."""
    sounds: str | None = None
    ratio: float = Field(1.0, gt=0, le=1)
    """Share of the set's rows that is read; always the same ones."""


class SystemPrompts(Settings):
    """What a conversation without a system turn begins with, by what it holds; `text` where a kind has none of its own.

    A model directory carries them, so that a model is asked as it was trained. A conversation with pictures and videos
    takes `text`.
    """

    text: str | None = None
    image: str | None = None
    video: str | None = None
    audio: str | None = None


class Limits(Settings):
    """What a medium may be before it is refused: unread, from its header, or half read."""

    max_bytes: int = Field(512 * 2**20, ge=1)
    """Of a file that is taken whole. A cut of a sound or a video is read where it lies, so its file may be larger."""
    max_pixels: int = Field(100_000_000, ge=1, le=178_956_970)
    """Of one picture, and of each frame of a video. Pillow itself decodes no more than the most that can be set."""
    max_frames: int = Field(500_000, ge=1)
    """Frames of a video that are passed on the way through what is wanted of it; far fewer are kept."""
    max_samples: int = Field(3600 * 48_000, ge=1)
    """Of one channel of a recording, at its own rate."""
    max_seconds: float = Field(3600.0, gt=0)
    """Of a sound or a video."""
    max_decode_s: float = Field(300.0, ge=0)
    """Time that decoding one sound or video may take."""


class DataConfig(Settings):
    """The rows a run learns from and is measured on."""

    train: str | None = None
    """JSON lines, or a JSON list in the form of LLaVA, VITA or ShareGPT."""
    eval: str | None = None
    """Held-out rows."""
    folder: str | None = None
    """What media paths are relative to; default: the data file's own folder."""
    sets: dict[str, str | DataSet] = {}
    """For rows that name their `set`: the folder of its media."""
    system: SystemPrompts | None = None
    """System prompts by modality; default: those that the model directory carries, or none."""
    index: str | None = None
    """Folder of indexes: what every row takes of a row and of the encoders, counted once without decoding."""
    too_long: Literal["refuse", "drop", "cut"] = "refuse"
    """What happens to a sample longer than a row: the run stops, it is left out, or its end is cut off (never inside a
    medium; where nothing that is learned would be left, it is left out)."""
    max_bad: float = Field(0.05, ge=0, le=1)
    """The run stops when more than this share of the samples it read was bad."""
    cache_mb: int = Field(512, ge=0)
    """Memory for decoded small media, so that a second epoch decodes nothing."""
    limits: Limits = Limits()
    """What a picture, a sound or a video may be before it is refused."""
    workers: int = Field(1, ge=0)
    """Processes that prepare the next steps while this one runs."""
