"""The data of a run: where its rows and their media are, and what is done about bad ones."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from avlm.config.base import Settings
from avlm.config.hosts import pattern_of


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


class Weighted(Settings):
    """One source of several."""

    path: str
    weight: float | None = Field(None, gt=0)
    """How many of all samples it gives, in proportion to the others' weights."""


TrainData = str | tuple[Weighted, ...]
"""One source; or several, each by its path, and all with a weight or none. Without weights all their rows are one set
and each epoch reads every row once. With weights each source goes through its own epochs, and the run's epochs are as
long as all of them together."""


def whole_blend(given: Any) -> Any:
    """Paths by themselves stand for sources without a weight.

    Raises:
        ValueError: The list is empty, names a source twice, or some have weights and some not.
    """
    if not isinstance(given, (list, tuple)):
        return given
    if not given:
        raise ValueError("the list of sources is empty. Name at least one")
    parts = [{"path": one} if isinstance(one, str) else one for one in given]
    named = [dict(one) for one in parts if isinstance(one, (dict, Weighted))]
    paths = [one.get("path") for one in named]
    for path in paths:
        if paths.count(path) > 1:
            raise ValueError(f"{path} is named twice. Give it once, with twice the weight")
    without = [one.get("path") for one in named if one.get("weight") is None]
    if 0 < len(without) < len(named):
        raise ValueError(
            f"{without[0]} has no weight and others have one, so its share is not known. Give all of them a weight, "
            "or none, for shares by size"
        )
    return parts


def paths_of(data: TrainData | None) -> list[str]:
    """The sources by their paths."""
    if data is None or isinstance(data, str):
        return [] if data is None else [data]
    return [one.path for one in data]


Order = Literal["shuffled", "as_is", "by_length", "curriculum"]


Scheme = Literal["http", "https", "s3", "gs", "az", "hf"]


class Fetch(Settings):
    """What may be fetched for media that are given by URL. Without it nothing is.

    A host is asked only at public addresses, which are checked after its name is resolved, and again after each
    redirect. What was fetched once is kept in a folder and not asked for again.
    """

    schemes: tuple[Scheme, ...] = Field(("https",), min_length=1)
    """`http` and `https` are fetched by avlm itself; the others by fsspec, with a library for each."""
    hosts: tuple[str, ...] = ()
    """Hosts that may be asked: a name, `*.example.org` for every name below that one, `*` for every host. Of
    `s3://bucket/key` and its kin the first part is meant: the bucket."""
    private_hosts: tuple[str, ...] = ()
    """Hosts that may be asked at addresses of the own network and machine too. They need not stand in `hosts`."""
    ports: tuple[int, ...] = ()
    """Ports that may be asked besides 80 of http and 443 of https."""
    options: dict[Scheme, dict[str, str | int | float | bool]] = {}
    """By scheme, what is handed to its library, such as `{s3: {anon: true}}`. Keys and passwords are better left where
    that library looks for them by itself, as settings are written down."""

    folder: str | None = None
    """Where what was fetched is kept; default: `avlm/media` in the user's folder for caches (`XDG_CACHE_HOME`)."""
    cache_mb: int = Field(10_240, ge=0)
    """What may be kept there. What was longest not used goes first; 0 keeps nothing."""

    max_bytes: int = Field(512 * 2**20, ge=1)
    """Of one file."""
    connect_s: float = Field(10.0, gt=0)
    """Time that a connection may take."""
    read_s: float = Field(30.0, gt=0)
    """Time that a host may be silent."""
    total_s: float = Field(300.0, gt=0)
    """Time for one file, with its redirects, tries and waits."""
    retries: int = Field(3, ge=0)
    """Further tries after what may pass: too many requests, a fault of the server, a broken connection, no answer."""
    wait_s: float = Field(1.0, ge=0)
    """Before the first further try, twice as long before each one after it; a host may ask for longer."""
    max_wait_s: float = Field(60.0, ge=0)
    """A host that asks for a longer wait is not waited for."""
    redirects: int = Field(5, ge=0)
    """How many are followed, one after another."""
    at_once: int = Field(8, ge=1)
    """Downloads that one process has under way at the same time."""

    @field_validator("hosts", "private_hosts")
    @classmethod
    def _are_hosts(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(pattern_of, patterns))

    @field_validator("private_hosts")
    @classmethod
    def _are_named(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        if "*" in patterns:
            raise ValueError("'*' would open the whole own network. Name its hosts (files.intern, *.intern)")
        return patterns

    @field_validator("ports")
    @classmethod
    def _are_ports(cls, ports: tuple[int, ...]) -> tuple[int, ...]:
        if not all(0 < port < 65536 for port in ports):
            raise ValueError("has a number that is no port. Give numbers from 1 to 65535")
        return ports


Column = Literal[
    "messages", "conversations", "image", "images", "audio", "audios", "video", "videos", "question", "answer",
    "history", "system", "task", "id", "set", "chosen", "rejected",
]  # fmt: skip
"""What a column of somebody else's rows may be."""


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

    train: TrainData | None = None
    """Rows in any of the forms of docs/data.md: a file, a folder, a pattern of files; ``PATH:NAME`` is a part of it. Or
    a list of such, each with `path` and, for a blend, `weight`."""
    eval: str | None = None
    """Held-out rows."""
    folder: str | None = None
    """What media paths are relative to; default: the data file's own folder."""
    sets: dict[str, str | DataSet] = {}
    """For rows that name their `set`: the folder of its media."""
    roots: tuple[str, ...] = ()
    """Further folders that media may lie in. The folders of the data files, `folder` and those of `sets` are open."""
    fetch: Fetch | None = None
    """What may be fetched for media that are given by URL; default: nothing."""
    columns: dict[Column, str] = {}
    """What the columns of the rows are, where they have other names: ``{image: jpg, question: q, answer: json[a]}``."""
    run_code: bool = False
    """Run Python that lies in a dataset (an Energon dataset's `sample_loader`)."""
    spool: str | None = None
    """Folder that rows which can only be read in their order are written to once, to be read in any."""
    system: SystemPrompts | None = None
    """System prompts by modality; default: those that the model directory carries, or none."""
    order: Order = "shuffled"
    """`as_is` takes rows as they lie in their sources. `by_length` lays samples of like length next to each other, and
    `curriculum` goes from short samples to long ones over the stage; both need an index."""
    index: str | None = None
    """Folder of indexes: what every row takes of a row and of the encoders, counted once without decoding. Default: in
    the run's directory."""
    too_long: Literal["refuse", "drop", "cut"] = "refuse"
    """What happens to a sample longer than a row: the run stops, it is left out, or its end is cut off (never inside a
    medium; where nothing that is learned would be left, it is left out)."""
    max_bad: float = Field(0.05, ge=0, le=1)
    """The run stops when more than this share of the samples it read was bad."""
    max_bad_run: int = Field(100, ge=1)
    """The run stops when so many samples one after the other were bad."""
    cache_mb: int = Field(512, ge=0)
    """Memory for decoded small media, in each process, so that a second epoch decodes nothing."""
    limits: Limits = Limits()
    """What a picture, a sound or a video may be before it is refused."""
    workers: int = Field(1, ge=0)
    """Processes that prepare the next steps while this one runs; 0 prepares them here, where nothing can be killed."""
    worker_mb: int = Field(4096, ge=256)
    """Memory of one such process beside `cache_mb`. A sample that needs more is bad."""
    stall_s: float | None = Field(None, gt=0)
    """Time that one sample may take before its process is killed and it is bad; default: a fifth more than the time
    that decoding one video may take."""

    @field_validator("train", mode="before")
    @classmethod
    def _is_blend(cls, given: Any) -> Any:
        return whole_blend(given)
