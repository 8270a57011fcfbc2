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


Column = Literal[
    "messages", "conversations", "image", "images", "audio", "audios", "video", "videos", "question", "answer",
    "history", "system", "task", "id", "set",
]  # fmt: skip
"""What a column of somebody else's rows may be."""


class DataConfig(Settings):
    """The rows a run learns from and is measured on."""

    train: str | None = None
    """Rows in any of the forms of docs/data.md: a file, a folder, a pattern of files; ``PATH:NAME`` is a part of it."""
    eval: str | None = None
    """Held-out rows."""
    folder: str | None = None
    """What media paths are relative to; default: the data file's own folder."""
    sets: dict[str, str | DataSet] = {}
    """For rows that name their `set`: the folder of its media."""
    columns: dict[Column, str] = {}
    """What the columns of the rows are, where they have other names: ``{image: jpg, question: q, answer: json[a]}``."""
    run_code: bool = False
    """Run Python that lies in a dataset (an Energon dataset's `sample_loader`)."""
    spool: str | None = None
    """Folder that rows which can only be read in their order are written to once, to be read in any."""
    system: SystemPrompts | None = None
    """System prompts by modality; default: those that the model directory carries, or none."""
    too_long: Literal["refuse", "drop"] = "refuse"
    """What happens to a sample longer than a row."""
    max_bad: float = Field(0.05, ge=0, le=1)
    """The run stops when more than this share of the samples it read was bad."""
    cache_mb: int = Field(512, ge=0)
    """Memory for decoded small media, so that a second epoch decodes nothing."""
    workers: int = Field(1, ge=0)
    """Processes that prepare the next steps while this one runs."""
