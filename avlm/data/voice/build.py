"""Make a folder of voice data: rows to learn from, held-out rows, and held-out timelines.

    voice.json         the settings it was made with, and how many rows of each kind
    train.jsonl        rows whose answers have a `state`: a question, or noise
    eval.jsonl         the same with other voices, other noises and other talk
    recordings.jsonl   who said what
    wav/ img/          the media
    timelines/         minutes of sounds and typed texts at their times, with what is true of each (`timeline.py`)

The same settings give the same bytes on the same machine and libraries.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.random import Generator

from avlm.data.voice.drawing import OWN_VOICE, Draft, Drawer, Said, Source, Texts, draw_all
from avlm.data.voice.mixing import NOISES, beside, draw_noise, in_room, let_through
from avlm.data.voice.scenes import Scenes
from avlm.data.voice.texts import asked, held_out, read_lines, read_questions, world_questions
from avlm.data.voice.timeline import Moment, draw_timeline, write_timeline
from avlm.data.world import speech
from avlm.data.world.sounds import SAMPLE_RATE_HZ, draw_sound, write_wav
from avlm.data.world.tasks import Deck
from avlm.data.world.words import SPLITS, Split
from avlm.errors import ConfigError

VERSION = 2
"""Raise this when the same settings come to mean other data."""
ASK = "Answer the spoken question."
"""Words beside a sound, as the demo's model was trained with."""
NOTHING_SEEN = "no"
"""Whether there is a circle, where there is no picture."""
SOUNDS_A_TIMELINE = 12
ROOM_S = 2.0
"""So much of a room a gate hears around a row's sound, most of it before, to know what a room it is."""

Progress = Callable[[str, int, int], None]
_WORDS, _VOICES, _MIX, _SCENES, _TIMELINES, _ROWS = range(6)


@dataclass(frozen=True, kw_only=True, slots=True)
class VoiceSettings:
    """What is made."""

    seed: int = 0
    train_rows: int = 4000
    eval_rows: int = 400
    timelines: int = 40
    ask: str = ASK
    """Words beside each sound; the model is to be spoken to with the same."""
    questions: str | None = None
    """File of questions, one a line, an answer behind a tab; without it those of the demo's world, with pictures."""
    others: str | None = None
    """File of what is not meant for the model, one text a line."""

    def __post_init__(self) -> None:
        for name, least in (("train_rows", 20), ("eval_rows", 20), ("timelines", 0)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"{name}={getattr(self, name)} leaves some kind of sound out; the least is {least}. "
                    f"Use {name}={least} or more"
                )


def make_voice(out: Path, settings: VoiceSettings, progress: Progress | None = None) -> None:
    """Make voice data in a folder, which appears when everything in it is done.

    Raises:
        ConfigError: The folder holds something, or a setting is too small.
        DataError: A file of texts cannot be read.
        MissingExtraError: espeakng-loader, or scikit-learn for the world's pictures, is not installed.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} holds something already, and two sets of rows would mix. Name a new folder")
    speech.require_speech()
    texts = {split: _texts(settings, split) for split in SPLITS}
    aside = out.with_name(f".{out.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        for name in ("wav", "img", "said", "timelines"):
            (aside / name).mkdir(parents=True)
        _make(aside, settings, texts, progress or (lambda what, done, total: None))
        shutil.rmtree(aside / "said")
        if out.exists():
            out.rmdir()
        os.replace(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _texts(settings: VoiceSettings, split: Split) -> Texts:
    questions = world_questions() if settings.questions is None else read_questions(Path(settings.questions))
    others = () if settings.others is None else tuple(read_lines(Path(settings.others)))
    return Texts(asked(questions, split), held_out(others, split))


@dataclass(frozen=True, slots=True)
class _Sound:
    """A sound to be made: what it is, where it goes, and whether a room is around it."""

    draft: Draft
    path: str
    split: Split
    alone: bool


def _make(folder: Path, settings: VoiceSettings, texts: dict[Split, Texts], progress: Progress) -> None:
    counts = {"train": settings.train_rows, "eval": settings.eval_rows}
    rows: dict[Split, list[_Sound]] = {}
    for split in SPLITS:
        drawer = Drawer(split, texts[split], _chance(_WORDS, settings.seed, split))
        drafts = draw_all(drawer, counts[split])
        rows[split] = [_Sound(draft, f"wav/{split}-{i:05d}.wav", split, False) for i, draft in enumerate(drafts)]
    drawer = Drawer("eval", texts["eval"], _chance(_TIMELINES, settings.seed, "eval"))
    plans = [draw_timeline(drawer, SOUNDS_A_TIMELINE) for _ in range(settings.timelines)]
    placed = [
        [
            (
                pause,
                what if isinstance(what, str) else _Sound(what, f"wav/timeline-{n:03d}-{i:02d}.wav", "eval", True),
            )
            for i, (pause, what) in enumerate(plan_)
        ]
        for n, plan_ in enumerate(plans)
    ]
    alone = [what for plan_ in placed for _, what in plan_ if isinstance(what, _Sound)]
    sounds = [*rows["train"], *rows["eval"], *alone]
    said, utterances = _utterances(sounds, settings.seed)
    with speech.recording(utterances, folder / "recordings.jsonl") as wait:
        wait(lambda done, total: progress("speech", done, total))
    lengths = _mix_all(folder, sounds, said, settings.seed, progress)
    scenes: dict[Split, Scenes | None] = dict.fromkeys(SPLITS)
    if settings.questions is None:
        scenes = {split: Scenes(folder, split, _chance(_SCENES, settings.seed, split)) for split in SPLITS}
    for split in SPLITS:
        rng = _chance(_ROWS, settings.seed, split)
        lines = [_row(sound, i, scenes[split], rng, settings) for i, sound in enumerate(rows[split])]
        _write_lines(folder / f"{split}.jsonl", lines)
    for number, plan_ in enumerate(placed):
        _write_timeline(folder, number, plan_, lengths, scenes["eval"], settings.seed)
    kinds = {split: dict(sorted(Counter(sound.draft.kind for sound in rows[split]).items())) for split in SPLITS}
    about = {"settings": {"version": VERSION, **asdict(settings)}, "rows": kinds}
    (folder / "voice.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8", newline="\n")


def _chance(use: int, seed: int, split: Split, number: int = 0) -> Generator:
    """The generator of one use: what one sound draws never moves what another draws."""
    return np.random.default_rng([use, seed, SPLITS.index(split), number])


def _utterances(sounds: list[_Sound], seed: int) -> tuple[dict[tuple[str, int], str], list[speech.Utterance]]:
    """Who says what: a path for each spoken source of each sound, and the recordings to be made."""
    paths: dict[tuple[str, int], str] = {}
    found: list[speech.Utterance] = []
    rng = {split: _chance(_VOICES, seed, split) for split in SPLITS}
    decks = {split: Deck(rng[split], split) for split in SPLITS}
    for sound in sounds:
        for place, source in enumerate(sound.draft.spoken()):
            path = f"said/{len(found):06d}.wav"
            paths[sound.path, place] = path
            chance = rng[sound.split]
            slowest_wpm = 130 if len(source.text.split()) <= 3 else 160
            drawn = decks[sound.split].deal("voice", speech.VOICES[sound.split])
            found.append(
                speech.Utterance(
                    path=path,
                    text=source.text,
                    voice=OWN_VOICE if source.own else drawn,
                    rate_wpm=170 if source.own else int(chance.integers(slowest_wpm, 195)),
                    pitch=50 if source.own else int(chance.integers(30, 71)),
                    loudness=0.9,
                    seed=int(chance.integers(2**31)),
                )
            )
    return paths, found


def _mix_all(
    folder: Path, sounds: list[_Sound], said: dict[tuple[str, int], str], seed: int, progress: Progress
) -> dict[str, float]:
    """Make every sound; how many seconds each has."""
    import soundfile

    lengths: dict[str, float] = {}
    for number, sound in enumerate(sounds, start=1):
        rng = _chance(_MIX, seed, sound.split, number)
        recorded = [
            soundfile.read(folder / said[sound.path, place], dtype="float32")[0]
            for place in range(len(sound.draft.spoken()))
        ]
        wave = _mixed(sound.draft, sound.split, recorded, rng)
        wave = _levelled(wave, rng) if sound.alone else _gated(wave, sound.split, rng)
        write_wav(folder / sound.path, wave)
        lengths[sound.path] = len(wave) / SAMPLE_RATE_HZ
        if number % 50 == 0 or number == len(sounds):
            progress("sounds", number, len(sounds))
    return lengths


def _mixed(draft: Draft, split: Split, recorded: list[np.ndarray], rng: Generator) -> np.ndarray:
    """The source in front and, if there is one, the other behind it."""
    waves = iter(recorded)
    front = _wave(draft.front, split, waves, rng)
    return front if draft.behind is None else beside(front, _wave(draft.behind, split, waves, rng), draft.snr_db)


def _wave(source: Source, split: Split, recorded: Iterator[np.ndarray], rng: Generator) -> np.ndarray:
    if isinstance(source, Said):
        return next(recorded)
    if source.names[0] in NOISES[split]:
        return draw_noise(source.names[0], split, int(rng.uniform(0.5, 1.6) * SAMPLE_RATE_HZ), rng)
    return np.concatenate([draw_sound(name, rng.uniform(0.6, 1.2), rng) for name in source.names])  # type: ignore[arg-type]


def _levelled(wave: np.ndarray, rng: Generator) -> np.ndarray:
    return (wave / max(float(np.abs(wave).max()), 1e-9) * rng.uniform(0.25, 0.9)).astype(np.float32)


def _gated(wave: np.ndarray, split: Split, rng: Generator) -> np.ndarray:
    """A sound in a room, as a gate hands it over."""
    room = draw_noise(str(rng.choice(list(NOISES[split]))), split, len(wave) + int(ROOM_S * SAMPLE_RATE_HZ), rng)
    before_s = float(rng.uniform(0.6, 0.8)) * ROOM_S
    heard = in_room(wave, room, before_s=before_s, snr_db=rng.uniform(18, 65), loudness=rng.uniform(0.2, 0.9))
    return let_through(heard, int(before_s * SAMPLE_RATE_HZ), len(wave))


def _row(
    sound: _Sound, number: int, scenes: Scenes | None, rng: Generator, settings: VoiceSettings
) -> dict[str, object]:
    """A row of avlm's own format; what is not meant for the model is answered by nothing."""
    draft = sound.draft
    seen = scenes.beside(draft) if scenes is not None and rng.random() < 0.7 else ""
    content: list[dict[str, str]] = [{"type": "image", "path": seen}] if seen else []
    content += [{"type": "audio", "path": sound.path}, {"type": "text", "text": settings.ask}]
    message: dict[str, object] = {"role": "assistant", "content": "", "state": draft.state}
    if draft.state == "question":
        message["content"] = draft.answer or _world_answer(draft, seen, scenes)
        if not message["content"]:
            message["ended"] = False  # nobody knows the answer, and that there is none must not be learned
    return {
        "id": f"{draft.kind}-{sound.split}-{number:05d}",
        "task": draft.kind,
        "messages": [
            {"role": "user", "content": content},
            message,
        ],
    }


def _world_answer(draft: Draft, seen: str, scenes: Scenes | None) -> str:
    """The answer to a question of the world, as far as it is known."""
    if scenes is None:
        return ""
    assert isinstance(draft.front, Said)
    return scenes.answer(seen, draft.front.text) if seen else NOTHING_SEEN


def _write_timeline(
    folder: Path,
    number: int,
    planned: list[tuple[float, _Sound | str]],
    lengths: dict[str, float],
    scenes: Scenes | None,
    seed: int,
) -> None:
    """One timeline: the room from its beginning to its end, pictures, and what happens in between."""
    rng = _chance(_TIMELINES, seed, "eval", number + 1)
    at_s, moments = 1.0, [*_shown(0.0, () if scenes is None else scenes.paths, rng)]
    for pause_s, what in planned:
        at_s = round(at_s + pause_s, 3)
        if isinstance(what, str):
            moments += [*_shown(at_s, () if scenes is None else scenes.pairs, rng), Moment(at_s, text=what)]
            continue
        draft = what.draft
        says = draft.front.text if isinstance(draft.front, Said) else ", ".join(draft.front.names)
        moments.append(Moment(at_s, sound=f"../{what.path}", state=draft.state, kind=draft.kind, says=says))
        at_s += lengths[what.path]
        if draft.kind == "interruption":
            moments += _shown(round(at_s, 3), () if scenes is None else scenes.paths, rng)
    name = str(rng.choice(list(NOISES["eval"])))
    bed = draw_noise(name, "eval", int((at_s + 2) * SAMPLE_RATE_HZ), rng) * rng.uniform(0.001, 0.008)
    write_wav(folder / f"wav/room-{number:03d}.wav", bed)
    room = Moment(0.0, sound=f"../wav/room-{number:03d}.wav", kind="room", says=name)
    write_timeline(folder / f"timelines/{number:03d}.jsonl", [room, *moments])


def _shown(at_s: float, paths: Sequence[str], rng: Generator) -> list[Moment]:
    """The camera shows one of these pictures, if there are any."""
    return [Moment(at_s, image=f"../{paths[int(rng.integers(len(paths)))]}")] if paths else []


def _write_lines(path: Path, rows: list[dict[str, object]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8", newline="\n")
