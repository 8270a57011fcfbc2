"""Make the world: plan the rows, make their media, publish the folder in one rename.

    world.json         the settings it was made with, and how many rows of each task
    train.jsonl        the rows to learn from, shuffled
    eval.jsonl         the rows to be asked about, shuffled
    recordings.jsonl   who said what, for every spoken recording
    img/ wav/ vid/     the media, which no two splits share

The same settings give the same bytes on the same machine and libraries.
"""

import glob
import hashlib
import itertools
import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.random import Generator
from PIL import Image

from avlm.data.world import speech
from avlm.data.world.pictures import draw_frames, draw_scene
from avlm.data.world.sounds import draw_sound, write_wav
from avlm.data.world.tasks import (
    FAMILIES,
    Deck,
    Draft,
    Film,
    Media,
    Noise,
    Picture,
    Speech,
    Task,
    Track,
    Video,
    follow_ups,
    in_words,
    plan,
    tells_apart,
)
from avlm.data.world.video import NUM_FRAMES, write_clip
from avlm.data.world.words import SPLITS, Split
from avlm.errors import ConfigError

VERSION = 5
"""Raise this when the same settings come to mean another world."""

MIN_TRAIN_SAMPLES = 200
MIN_EVAL_SAMPLES = 10
"""Below these some task would have no whole group of rows."""

TRAIN_SHARES: dict[Task, float] = {
    "vqa": 0.28,
    "transcribe": 0.11,
    "sound": 0.09,
    "match": 0.16,
    "voice": 0.18,
    "video": 0.08,
}
"""Captions, which need no groups, fill what remains: 10 % and the odd rows."""

TELLING_APART = "telling-apart"
"""The `set` of training rows that ask which of two things in a picture is where, or is what: the hardest to learn
among others (`stages.language.first` of the recipe `tiny`)."""

Progress = Callable[[str, int, int], None]
Paths = dict[Split, dict[Media, str]]
Kind = TypeVar("Kind", bound=Media)

_PROGRESS_EVERY = 50
_FOLDERS: dict[type, tuple[str, str]] = {
    Picture: ("img", "png"),
    Speech: ("wav", "wav"),
    Noise: ("wav", "wav"),
    Video: ("vid", "mp4"),
}
_KINDS: dict[type, str] = {Picture: "image", Speech: "audio", Noise: "audio", Video: "video"}
# First number of each seed sequence, so that no two uses of the seed share their chance.
_PLAN, _SHUFFLE, _DRAW, _VOICE, _FILM, _TRACK, _TURNS = range(7)


def make_world(
    out: Path,
    *,
    seed: int = 0,
    train_samples: int = 12000,
    eval_samples_per_task: int = 100,
    progress: Progress | None = None,
) -> None:
    """Make a world of training and held-out samples in a folder.

    The folder appears when everything in it is done; a run that is stopped leaves no
    world. If the folder holds the world of these settings already, nothing is done.

    Args:
        out: The folder to make. May exist if it is empty.
        seed: Another seed gives other samples; voices and handwriting are split alike.
        train_samples: Rows of ``train.jsonl``, exactly.
        eval_samples_per_task: Rows of each task in ``eval.jsonl``, less what does not
            fill a balanced group (at most 7).
        progress: Told ``(what, done, total)`` as the work goes on.

    Raises:
        ConfigError: A count is too small, or the folder holds something else.
        MissingExtraError: espeakng-loader or scikit-learn is not installed.
    """
    settings = {
        "version": VERSION,
        "seed": seed,
        "train_samples": train_samples,
        "eval_samples_per_task": eval_samples_per_task,
    }
    _refuse_too_few(train_samples, eval_samples_per_task)
    out = Path(out).absolute()
    if _is_made(out, settings):
        return
    speech.require_speech()
    with _aside(out) as aside:
        _make(aside, settings, progress or _tell_nobody)
        if not _is_made(out, settings):  # another process may have been quicker
            if out.exists():
                out.rmdir()  # empty, and not every system renames onto a folder
            os.replace(aside, out)


@contextmanager
def _aside(out: Path) -> Iterator[Path]:
    """An empty folder beside a world's final place, because a rename is atomic only within one file system.

    It is locked as long as its maker lives. Those that killed makers left behind are not, and go away.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    for left in out.parent.glob(f".{glob.escape(out.name)}.partial-*"):
        with _locked(left) as alone:
            if alone:
                shutil.rmtree(left, ignore_errors=True)
    aside = out.with_name(f".{out.name}.partial-{uuid.uuid4().hex[:8]}")
    aside.mkdir()
    try:
        with _locked(aside):
            yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Whether a folder could be locked while the block runs; false where the system has no such locks."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield False
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        alone = True
    except OSError:
        alone = False
    try:
        yield alone
    finally:
        os.close(handle)


def plan_rows(split: Split, *, seed: int, train_samples: int, eval_samples_per_task: int) -> list[Draft]:
    """Plan all rows of a split, task after task and group after group."""
    deck = Deck(_chance(_PLAN, seed, split), split)
    if split == "eval":
        counts = dict.fromkeys(FAMILIES, eval_samples_per_task)
        return [draft for task in FAMILIES for draft in plan(FAMILIES[task], counts[task], deck)]
    drafts = [
        draft
        for task, share in TRAIN_SHARES.items()
        for draft in plan(FAMILIES[task], round(share * train_samples), deck)
    ]
    return drafts + plan(FAMILIES["caption"], train_samples - len(drafts), deck)


def _refuse_too_few(train_samples: int, eval_samples_per_task: int) -> None:
    for name, value, least in (
        ("train_samples", train_samples, MIN_TRAIN_SAMPLES),
        ("eval_samples_per_task", eval_samples_per_task, MIN_EVAL_SAMPLES),
    ):
        if value < least:
            raise ConfigError(
                f"{name}={value} leaves some task without one balanced group of rows; "
                f"the least is {least}. Use {name}={least} or more."
            )


def _is_made(out: Path, settings: dict[str, int]) -> bool:
    """Whether the folder holds this very world; refuses one that holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        found = json.loads((out / "world.json").read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        found = None
    if found == settings and (out / "train.jsonl").is_file():
        return True
    holds = "something that is not a world" if found is None else f"a world made with {found}"
    raise ConfigError(
        f"{out} holds {holds}; making one with {settings} would mix the two. Remove that folder or name another."
    )


def _make(folder: Path, settings: dict[str, int], progress: Progress) -> None:
    """Make the whole world in a new folder."""
    seed = settings["seed"]
    sizes = {name: settings[name] for name in ("train_samples", "eval_samples_per_task")}
    plans = {split: plan_rows(split, seed=seed, **sizes) for split in SPLITS}
    for name in ("img", "wav", "vid"):
        (folder / name).mkdir(parents=True)
    paths = {split: _name_media(split, plans[split]) for split in SPLITS}
    said = _utterances(paths, seed)
    with speech.recording(said, folder / "recordings.jsonl") as wait_for_speech:
        _draw_pictures(folder, paths, seed, progress)
        _make_sounds(folder, paths, seed, progress)
        _make_videos(folder, paths, seed, progress)
        wait_for_speech(lambda done, total: progress("speech", done, total))
    counts: dict[str, dict[str, int]] = {}
    for split in SPLITS:
        rows = _rows(split, plans[split], paths[split], _chance(_TURNS, seed, split))
        counts[split] = dict(sorted(Counter(str(row["task"]) for row in rows).items()))
        order = _chance(_SHUFFLE, seed, split).permutation(len(rows))
        _write_lines(folder / f"{split}.jsonl", [rows[index] for index in order])
    about = json.dumps({"settings": settings, "rows": counts}, indent=2) + "\n"
    (folder / "world.json").write_text(about, encoding="utf-8", newline="\n")


def _chance(use: int, seed: int, split: Split, number: int = 0) -> Generator:
    """The generator of one use: what one medium draws never moves what another draws."""
    return np.random.default_rng([use, seed, SPLITS.index(split), number])


def _name_media(split: Split, drafts: list[Draft]) -> dict[Media, str]:
    """Give each medium of a split its path, in the order of the plan."""
    paths: dict[Media, str] = {}
    for media in itertools.chain.from_iterable(draft.media for draft in drafts):
        folder, suffix = _FOLDERS[type(media)]
        paths.setdefault(media, f"{folder}/{split}-{len(paths):06d}.{suffix}")
    return paths


def _utterances(paths: Paths, seed: int) -> list[speech.Utterance]:
    """Choose who says each recording and how; voices take turns and keep to their split."""
    utterances = []
    for split in SPLITS:
        rng = _chance(_VOICE, seed, split)
        deck = Deck(rng, split)
        for media, path in paths[split].items():
            if isinstance(media, Speech):
                # Whole questions are not spoken slowly: every second of sound costs tokens.
                slowest_wpm = 130 if len(media.text.split()) <= 3 else 165
                utterances.append(
                    speech.Utterance(
                        path=path,
                        text=media.text,
                        voice=deck.deal("voice", speech.VOICES[split]),
                        rate_wpm=int(rng.integers(slowest_wpm, 191)),
                        pitch=int(rng.integers(30, 71)),
                        loudness=round(float(rng.uniform(0.3, 0.9)), 3),
                        seed=int(rng.integers(2**31)),
                    )
                )
    return utterances


def _draw_pictures(folder: Path, paths: Paths, seed: int, progress: Progress) -> None:
    """Draw every picture, no two with the same pixels, so none of them is in both splits."""
    seen: set[bytes] = set()
    for split, number, media, path in _each(paths, Picture, "pictures", progress):
        rng = _chance(_DRAW, seed, split, number)
        pixels = draw_scene(media.scene, split, rng)
        while (digest := hashlib.sha256(pixels.tobytes()).digest()) in seen:
            pixels = draw_scene(media.scene, split, rng)
        seen.add(digest)
        Image.fromarray(pixels).save(folder / path, format="PNG")


def _make_sounds(folder: Path, paths: Paths, seed: int, progress: Progress) -> None:
    for split, number, media, path in _each(paths, Noise, "sounds", progress):
        rng = _chance(_DRAW, seed, split, number)
        write_wav(folder / path, np.concatenate([draw_sound(name, rng.uniform(0.7, 1.2), rng) for name in media.names]))


def _make_videos(folder: Path, paths: Paths, seed: int, progress: Progress) -> None:
    """Make every video; each film and each track is made once and used in two of them."""
    films: dict[Film, np.ndarray] = {}
    tracks: dict[Track, np.ndarray] = {}
    for split, number, media, path in _each(paths, Video, "videos", progress):
        film, track = media.film, media.track
        if film not in films:
            rng = _chance(_FILM, seed, split, number)
            films[film] = draw_frames(film.first, film.second, rng, NUM_FRAMES)
        if track not in tracks:
            rng = _chance(_TRACK, seed, split, number)
            halves = [draw_sound(name, 1.0, rng) for name in (track.first, track.second)]
            tracks[track] = np.concatenate(halves)
        write_clip(folder / path, films[film], tracks[track])


def _each(paths: Paths, kind: type[Kind], what: str, progress: Progress) -> Iterator[tuple[Split, int, Kind, str]]:
    """Go through all media of a kind, numbered within their split, telling the progress."""
    found = [
        (split, number, media, path)
        for split in SPLITS
        for number, (media, path) in enumerate(paths[split].items())
        if isinstance(media, kind)
    ]
    for done, item in enumerate(found, start=1):
        yield item
        if done % _PROGRESS_EVERY == 0 or done == len(found):
            progress(what, done, len(found))


def _rows(split: Split, drafts: list[Draft], paths: dict[Media, str], rng: Generator) -> list[dict[str, object]]:
    """Write the drafts as rows of avlm's own format; training rows go on asking about what they show."""
    rows: list[dict[str, object]] = []
    numbers = Counter[str]()
    for draft in drafts:
        content: list[dict[str, str]] = [{"type": _KINDS[type(media)], "path": paths[media]} for media in draft.media]
        if split == "train":
            for part, media in zip(content, draft.media, strict=True):
                part["alt"] = in_words(media)
        content.append({"type": "text", "text": draft.question})
        messages: list[dict[str, object]] = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": draft.answer},
        ]
        for question, answer in follow_ups(draft, rng) if split == "train" else []:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        row: dict[str, object] = {"id": f"{draft.task}-{split}-{numbers[draft.task]:06d}", "task": draft.task}
        if split == "train" and tells_apart(draft):
            row["set"] = TELLING_APART
        rows.append({**row, "messages": messages})
        numbers[draft.task] += 1
    return rows


def _write_lines(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", newline="\n")


def _tell_nobody(what: str, done: int, total: int) -> None:
    """The progress nobody asked about."""
