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
    too_long: Literal["refuse", "drop"] = "refuse"
    """What happens to a sample longer than a row."""
    max_bad: float = Field(0.05, ge=0, le=1)
    """The run stops when more than this share of the samples it read was bad."""
    max_bad_run: int = Field(100, ge=1)
    """The run stops when so many samples one after the other were bad."""
    cache_mb: int = Field(512, ge=0)
    """Memory for decoded small media, in each process, so that a second epoch decodes nothing."""
    workers: int = Field(1, ge=0)
    """Processes that prepare the next steps while this one runs; 0 prepares them here, where nothing can be killed."""
    worker_mb: int = Field(4096, ge=256)
    """Memory of one such process beside `cache_mb`. A sample that needs more is bad."""
    stall_s: float | None = Field(None, gt=0)
    """Time that one sample may take before its process is killed and it is bad; default: a fifth more than the time
    that decoding one video may take."""
