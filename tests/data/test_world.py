"""The made-up world: what it holds, that no guess wins, that it repeats and is whole or absent."""

import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

from avlm.data.planning.plan import positions
from avlm.data.selection import left_out, stage_rows, video_senses
from avlm.data.sources import JsonLines
from avlm.data.world import build, speech
from avlm.data.world.build import make_world, plan_rows
from avlm.data.world.pictures import RGB, Digit, Group, Pair, Thing, draw_scene, handwriting
from avlm.data.world.sounds import draw_sound
from avlm.data.world.tasks import Draft, Picture, Speech, Video
from avlm.data.world.words import COLOURS, NUMBERS, SHAPES, SOUNDS, SPLITS
from avlm.errors import ConfigError, MissingExtraError
from avlm.recipes.tiny import tiny

pytest.importorskip("espeakng_loader")
pytest.importorskip("sklearn")

TASKS = {"caption", "vqa", "transcribe", "sound", "match", "voice", "video"}
SMALL = {"seed": 3, "train_samples": 300, "eval_samples_per_task": 24}
Row = dict[str, object]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world") / "made"
    make_world(out, **SMALL)
    return out


def read_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def parts_of(row: Row) -> list[dict[str, str]]:
    return row["messages"][0]["content"]


def answer_of(row: Row) -> str:
    return row["messages"][1]["content"]


def media_of(rows: Iterable[Row]) -> set[str]:
    return {part["path"] for row in rows for part in parts_of(row) if part["type"] != "text"}


def guess_score(facts_and_answers: Iterable[tuple[Hashable, str]]) -> float:
    """The share right of whoever sees only the facts and gives each its commonest answer."""
    answers = defaultdict(Counter)
    for fact, answer in facts_and_answers:
        answers[fact][answer] += 1
    right = sum(counts.most_common(1)[0][1] for counts in answers.values())
    return right / sum(counts.total() for counts in answers.values())


# --- what is written ------------------------------------------------------------------


def test_rows_have_the_promised_form_and_every_medium_exists(world: Path) -> None:
    ids = []
    for split in SPLITS:
        rows = read_rows(world / f"{split}.jsonl")
        ids += [row["id"] for row in rows]
        assert {row["task"] for row in rows} == TASKS
        for row in rows:
            assert row["id"].startswith(f"{row['task']}-{split}-")
            roles = [message["role"] for message in row["messages"]]
            num_turns = min(3, len(roles) // 2) if split == "train" else 1
            assert roles == ["user", "assistant"] * num_turns
            *media, text = parts_of(row)
            assert text["type"] == "text" and text["text"]
            assert answer_of(row)
            assert {part["type"] for part in media} <= {"image", "audio", "video"}
        assert all((world / path).is_file() for path in media_of(rows))
    assert len(set(ids)) == len(ids)


def test_the_counts_are_those_asked_for(world: Path) -> None:
    assert len(read_rows(world / "train.jsonl")) == SMALL["train_samples"]
    counts = Counter(row["task"] for row in read_rows(world / "eval.jsonl"))
    assert all(24 - 7 <= count <= 24 for count in counts.values()), counts
    assert json.loads((world / "world.json").read_text())["rows"]["eval"]["match"] == 24


def test_the_recipe_reads_of_it_what_each_stage_is_for_and_no_video_where_one_sense_learns(world: Path) -> None:
    """Its model hears, so that a video is never a row of pictures alone, and its own alt would leave none to see."""
    source, config = JsonLines(world / "train.jsonl"), tiny()
    held = [Counter(part["type"] for part in parts_of(row) if part["type"] != "text") for row in
            read_rows(world / "train.jsonl")]  # fmt: skip
    every = list(range(len(held)))
    rows_of = {
        "text": every,
        "any": every,
        "vision": [i for i, kinds in enumerate(held) if kinds["image"]],  # whatever else is there has words
        "audio": [i for i, kinds in enumerate(held) if kinds["audio"]],
    }
    video = video_senses(config.model.audio is not None, config.model.video.order)
    for stage in config.stages:
        expected = rows_of[stage.rows]
        assert stage_rows(source.facts, stage, video) == stage_rows(source.facts, stage) == expected
        read = {expected[at] for at, _ in positions(0, len(expected), len(expected), seed=0, stage=stage.name)}
        assert stage.rows in ("any", "text") or not any(held[i]["video"] for i in read)
        told = left_out(source.facts, stage, video)
        assert told is None if stage.rows in ("any", "text") else f"{len(expected)} of {len(held)} rows; " in told


def test_training_goes_on_asking_and_no_answer_stands_in_an_earlier_turn(world: Path) -> None:
    rows = read_rows(world / "train.jsonl")
    assert sum(len(row["messages"]) > 2 for row in rows) > len(rows) / 3
    for row in rows:
        questions = [parts_of(row)[-1]["text"], *(message["content"] for message in row["messages"][2::2])]
        assert len(set(questions)) == len(questions), row
        later = [message["content"] for message in row["messages"][3::2]]
        assert answer_of(row) not in later, row


def test_each_medium_of_training_says_what_it_shows_or_says_and_none_that_is_held_out_does(world: Path) -> None:
    said = defaultdict(set)
    for row in read_rows(world / "train.jsonl"):
        *media, text = parts_of(row)
        alts, answer = [part["alt"] for part in media], answer_of(row)
        for part in media:
            said[part["path"]].add(part["alt"])
        if row["task"] in ("caption", "transcribe", "sound") or text["text"] == "What happens in the video?":
            assert alts == [answer], row
        elif text["text"] == "What happens first?":
            assert alts[0].startswith(f"{answer}, then "), row
        elif text["text"] == "What happens last?":
            assert alts[0].endswith(f", then {answer}"), row
        elif row["task"] == "match":
            shown, heard = (alt.split() for alt in alts)
            assert answer == ("yes" if set(heard) <= set(shown) else "no"), row
        else:
            assert all(alts), row
    assert all(len(alts) == 1 for alts in said.values())
    recordings = {line["path"]: line["text"] for line in read_rows(world / "recordings.jsonl")}
    assert len(recordings.keys() & said) > 50
    assert all(said[path] == {text} for path, text in recordings.items() if path in said)
    assert '"alt"' not in (world / "eval.jsonl").read_text()


def test_what_asks_about_one_of_two_things_is_a_set_that_training_can_begin_with(world: Path) -> None:
    found = {True: 0, False: 0}
    for row in read_rows(world / "train.jsonl"):
        shown = row["messages"][0]["content"][0]["alt"]
        apart = row["task"] == "vqa" and (" left of " in shown or " above " in shown)
        assert row.get("set") == ("telling-apart" if apart else None)
        found[apart] += 1
    assert min(found.values()) > 10
    (first,) = [stage.first for stage in tiny().stages if stage.first is not None]
    assert first.of == ("telling-apart",)
    assert all("set" not in row for row in read_rows(world / "eval.jsonl"))


def test_no_file_is_left_over(world: Path) -> None:
    named = media_of(read_rows(world / "train.jsonl") + read_rows(world / "eval.jsonl"))
    found = {path.relative_to(world).as_posix() for path in world.rglob("*") if path.is_file()}
    assert found - named == {"world.json", "train.jsonl", "eval.jsonl", "recordings.jsonl"}


def test_media_have_the_promised_sizes(world: Path) -> None:
    for path in world.glob("img/*.png"):
        with Image.open(path) as picture:
            assert (picture.size, picture.mode) == ((32, 32), "RGB")
    for path in world.glob("wav/*.wav"):
        about = soundfile.info(path)
        assert (about.samplerate, about.channels, about.subtype) == (16_000, 1, "PCM_16")
        assert 0.3 <= about.duration <= 2.4, (path, about.duration)
    for path in sorted(world.glob("vid/*.mp4"))[:4]:
        with av.open(str(path)) as video:
            assert video.streams.audio[0].codec_context.name == "aac"
            assert video.duration == 2_000_000
            frames = list(video.decode(video=0))
        assert [frame.time for frame in frames] == [number / 8 for number in range(16)]
        assert (frames[0].width, frames[0].height) == (32, 32)


def test_a_spoken_word_is_most_of_its_recording(world: Path) -> None:
    for line in read_rows(world / "recordings.jsonl"):
        wave, _ = soundfile.read(world / line["path"])
        loud = np.flatnonzero(np.abs(wave) > 0.1 * np.abs(wave).max())
        assert loud[0] < 0.2 * 16_000, line
        # What is short was padded to 0.3 s.
        assert len(wave) - loud[-1] < max(0.3 * 16_000, 0.4 * len(wave)), line


def test_the_vocabulary_is_small(world: Path) -> None:
    words = set()
    for row in read_rows(world / "train.jsonl"):
        for message in row["messages"][2:]:
            words |= set(message["content"].lower().replace("?", "").replace(".", "").split())
    for split in SPLITS:
        for draft in plan_rows(split, seed=0, train_samples=9000, eval_samples_per_task=100):
            said = [media.text for media in draft.media if isinstance(media, Speech)]
            for text in (draft.question, draft.answer, *said):
                words |= set(text.lower().replace("?", "").replace(".", "").replace(",", "").split())
    assert len(words) <= 100, sorted(words)


# --- the split ------------------------------------------------------------------------


def test_no_medium_is_in_both_splits(world: Path) -> None:
    held = {
        split: {
            hashlib.sha256((world / path).read_bytes()).digest()
            for path in media_of(read_rows(world / f"{split}.jsonl"))
        }
        for split in SPLITS
    }
    assert held["train"] and held["eval"]
    assert not held["train"] & held["eval"]
    pixels = {split: {Image.open(path).tobytes() for path in world.glob(f"img/{split}-*.png")} for split in SPLITS}
    assert not pixels["train"] & pixels["eval"]


def test_no_voice_is_in_both_splits(world: Path) -> None:
    rows = read_rows(world / "recordings.jsonl")
    voices = {split: {row["voice"] for row in rows if f"/{split}-" in row["path"]} for split in SPLITS}
    assert len(voices["train"]) >= 30
    assert len(voices["eval"]) == 8
    assert not voices["train"] & voices["eval"]


def test_no_handwriting_is_in_both_splits() -> None:
    images = {split: {image.tobytes() for of_value in handwriting()[split] for image in of_value} for split in SPLITS}
    assert len(images["train"]) > 1400
    assert len(images["eval"]) > 340
    assert not images["train"] & images["eval"]


# --- guessing -------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[*SPLITS, "eval of another seed"])
def drafts(request: pytest.FixtureRequest) -> list[Draft]:
    split = request.param if request.param in SPLITS else "eval"
    seed = 0 if request.param in SPLITS else 11
    return plan_rows(split, seed=seed, train_samples=9000, eval_samples_per_task=100)


def facts(drafts: list[Draft], task: str, fact: Callable[[Draft], Hashable]) -> Iterator[tuple[Hashable, str]]:
    return ((fact(draft), draft.answer) for draft in drafts if draft.task == task)


@pytest.mark.parametrize("task", ["match", "voice"])
def test_the_question_alone_is_worth_a_coin(drafts: list[Draft], task: str) -> None:
    assert guess_score(facts(drafts, task, lambda draft: draft.question)) == pytest.approx(0.5, abs=1e-12)


def test_every_sound_is_as_often_heard_alone_first_and_last(drafts: list[Draft]) -> None:
    heard = [(draft.question, draft.answer.split(", then ")) for draft in drafts if draft.task == "sound"]
    assert Counter(len(names) for _, names in heard).keys() == {1, 2}
    for length, place in ((1, 0), (2, 0), (2, 1)):
        some = [(question, names[place]) for question, names in heard if len(names) == length]
        assert guess_score(some) == 1 / 8
        assert {name for _, name in some} == set(SOUNDS)
    assert all(len(set(names)) == len(names) for _, names in heard)
    assert not {q for q, names in heard if len(names) == 1} & {q for q, names in heard if len(names) == 2}


def test_each_question_about_a_picture_has_all_its_answers_equally_often(drafts: list[Draft]) -> None:
    answers = defaultdict(Counter)
    for question, answer in facts(drafts, "vqa", lambda draft: draft.question):
        answers[question][answer] += 1
    for question, counts in answers.items():
        assert len(set(counts.values())) == 1, (question, counts)
        assert len(counts) >= 4


def test_the_commonest_caption_or_phrase_is_rare(drafts: list[Draft]) -> None:
    assert guess_score(facts(drafts, "caption", lambda draft: draft.question)) < 0.1
    assert guess_score(facts(drafts, "transcribe", lambda draft: draft.question)) < 0.1


def test_a_caption_is_settled_by_the_scene(drafts: list[Draft]) -> None:
    assert guess_score(facts(drafts, "caption", lambda draft: draft.media[0].scene)) == 1


@pytest.mark.parametrize("task", ["match", "voice"])
def test_picture_alone_and_recording_alone_are_worth_a_coin(drafts: list[Draft], task: str) -> None:
    def picture(draft: Draft) -> Picture:
        return next(media for media in draft.media if isinstance(media, Picture))

    def said(draft: Draft) -> Speech:
        return next(media for media in draft.media if isinstance(media, Speech))

    seen: list[Callable[[Draft], Hashable]] = [picture, said]  # one file, known by heart
    seen += [lambda draft: (draft.question, picture(draft).scene), lambda draft: (draft.question, said(draft).text)]
    for fact in seen:
        assert guess_score(facts(drafts, task, fact)) == 0.5
    both = facts(drafts, task, lambda draft: (picture(draft).scene, said(draft).text))
    assert guess_score(both) == 1


def video_of(draft: Draft) -> Video:
    (video,) = draft.media
    assert isinstance(video, Video)
    return video


def test_frames_alone_and_sound_track_alone_are_worth_a_coin(drafts: list[Draft]) -> None:
    def film(draft: Draft) -> Hashable:
        return draft.question, video_of(draft).film

    def track(draft: Draft) -> Hashable:
        return draft.question, video_of(draft).track

    assert guess_score(facts(drafts, "video", film)) == 0.5  # one file, known by heart
    assert guess_score(facts(drafts, "video", track)) == 0.5
    assert guess_score(facts(drafts, "video", lambda draft: (film(draft), track(draft)))) == 1

    def shown(draft: Draft) -> Hashable:
        return draft.question, video_of(draft).film.first, video_of(draft).film.second

    def heard(draft: Draft) -> Hashable:
        return draft.question, video_of(draft).track.first, video_of(draft).track.second

    for fact in (shown, heard):  # who has learned nothing by heart
        assert guess_score(facts(drafts, "video", fact)) <= 0.5
    assert guess_score(facts(drafts, "video", lambda draft: (shown(draft), heard(draft)))) == 1


def test_what_is_seen_and_heard_without_its_order_is_worth_a_quarter(drafts: list[Draft]) -> None:
    videos = [draft for draft in drafts if draft.task == "video"]
    assert len(videos) % 4 == 0
    groups = [(i // 4, draft) for i, draft in enumerate(videos)]
    for _, four in itertools.groupby(groups, key=lambda pair: pair[0]):
        some = [draft for _, draft in four]
        assert len({draft.question for draft in some}) == 1
        assert len({frozenset((v.film.first, v.film.second)) for v in map(video_of, some)}) == 1
        assert len({frozenset((v.track.first, v.track.second)) for v in map(video_of, some)}) == 1
    assert guess_score((group, draft.answer) for group, draft in groups) == 0.25


def test_the_answer_about_a_video_is_what_is_seen_and_heard_together(drafts: list[Draft]) -> None:
    asked = Counter()
    for draft in drafts:
        if draft.task == "video":
            film, track = video_of(draft).film, video_of(draft).track
            halves = [
                f"{thing.colour} {thing.shape} with {sound}"
                for thing, sound in ((film.first, track.first), (film.second, track.second))
            ]
            whole = {"video?": ", then ".join(halves), "first?": halves[0], "last?": halves[1]}
            last_word = draft.question.split()[-1]
            assert draft.answer == whole[last_word]
            asked[last_word] += 1
    assert asked.keys() == {"video?", "first?", "last?"}
    assert max(asked.values()) - min(asked.values()) <= 4  # the questions take turns


def test_the_videos_as_written_keep_one_film_and_one_track_for_two_answers(world: Path) -> None:
    shown, heard = [], []
    for row in read_rows(world / "eval.jsonl"):
        if row["task"] != "video":
            continue
        video, text = parts_of(row)
        with av.open(str(world / video["path"])) as container:
            frames = b"".join(frame.to_ndarray(format="rgb24").tobytes() for frame in container.decode(video=0))
        with av.open(str(world / video["path"])) as container:
            track = b"".join(frame.to_ndarray().tobytes() for frame in container.decode(audio=0))
        shown.append(((text["text"], frames), answer_of(row)))
        heard.append(((text["text"], track), answer_of(row)))
    assert len(shown) == 24
    assert guess_score(shown) == 0.5
    assert guess_score(heard) == 0.5
    assert len({frames for (_, frames), _ in shown}) == 12


# --- what eyes and ears can tell ------------------------------------------------------


def test_each_colour_is_nearest_to_itself() -> None:
    rng = np.random.default_rng(0)
    for colour in COLOURS * 8:
        scene = Group(1, Thing(colour, SHAPES[rng.integers(len(SHAPES))]))
        pixels = draw_scene(scene, "train", rng).reshape(-1, 3).astype(float)
        vivid = pixels[np.argsort(np.ptp(pixels, axis=1))[-15:]].mean(axis=0)
        assert min(RGB, key=lambda name: np.abs(vivid - RGB[name]).sum()) == colour


def test_the_first_of_a_pair_is_left_or_above() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        for relation, axis in (("left of", 1), ("above", 0)):
            pair = Pair(Thing("red", "circle"), relation, Thing("blue", "square"))
            pixels = draw_scene(pair, "train", rng).astype(float)
            centres = [
                np.argwhere(np.abs(pixels - RGB[name]).sum(axis=2) < 120).mean(axis=0) for name in ("red", "blue")
            ]
            apart = centres[1] - centres[0]
            assert apart[axis] > 12
            assert abs(apart[1 - axis]) < 8


def test_unseen_handwriting_is_recognised_by_its_nearest_neighbour() -> None:
    rng = np.random.default_rng(0)
    known = [(value, draw_scene(Digit(value), "train", rng)) for value in range(10) for _ in range(150)]
    table = np.stack([pixels.mean(axis=2).ravel() for _, pixels in known])
    right = 0
    for value in list(range(10)) * 10:
        distance = np.linalg.norm(table - draw_scene(Digit(value), "eval", rng).mean(axis=2).ravel(), axis=1)
        right += known[int(distance.argmin())][0] == value
    assert right >= 75


def log_mel(wave: np.ndarray, num_bands: int = 24) -> np.ndarray:
    """A plain spectrogram, (frames, bands), bands evenly on a logarithmic scale of frequency."""
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(wave, 256), 400)[::160] * np.hanning(400)
    power = np.abs(np.fft.rfft(frames, 512)) ** 2
    edges = np.unique(np.geomspace(3, 250, num_bands + 1).astype(int))
    bands = np.add.reduceat(power, edges[:-1], axis=1)
    return np.log(bands / power.mean() + 1e-3)


def test_sounds_are_told_apart_by_their_spectrum() -> None:
    rng = np.random.default_rng(0)

    def features(name: str) -> np.ndarray:
        mel = log_mel(draw_sound(name, 1.0, rng))
        return np.concatenate([mel.mean(axis=0), mel.std(axis=0), np.abs(np.diff(mel, axis=0)).mean(axis=0)])

    known = [(name, features(name)) for name in SOUNDS * 40]
    for name in SOUNDS * 10:
        heard = features(name)
        assert min(known, key=lambda other: np.linalg.norm(heard - other[1]))[0] == name


def test_of_two_sounds_in_a_recording_the_first_is_heard_first(world: Path) -> None:
    rng = np.random.default_rng(0)

    def features(wave: np.ndarray) -> np.ndarray:
        mel = log_mel(wave)
        return np.concatenate([mel.mean(axis=0), mel.std(axis=0), np.abs(np.diff(mel, axis=0)).mean(axis=0)])

    known = [(name, features(draw_sound(name, 0.7, rng))) for name in SOUNDS * 40]
    found = []
    for row in read_rows(world / "train.jsonl") + read_rows(world / "eval.jsonl"):
        names = answer_of(row).split(", then ")
        if row["task"] == "sound" and len(names) == 2:
            wave, _ = soundfile.read(world / parts_of(row)[0]["path"])
            assert 2 * 0.7 <= len(wave) / 16_000 <= 2 * 1.2
            for name, part in zip(names, (wave[: int(0.7 * 16_000)], wave[-int(0.7 * 16_000) :]), strict=True):
                heard = features(part)
                found.append(min(known, key=lambda other: np.linalg.norm(heard - other[1]))[0] == name)
    assert len(found) >= 32
    assert np.mean(found) > 0.9


def test_held_out_voices_are_understood_by_who_knows_the_others() -> None:
    rng = np.random.default_rng(0)
    espeak = speech.Espeak()
    words = (*NUMBERS, *COLOURS, *SHAPES)

    def features(voice: str, word: str) -> np.ndarray:
        rate, pitch = int(rng.integers(130, 191)), int(rng.integers(30, 71))
        wave = speech.trim(espeak.say(word, voice=voice, rate_wpm=rate, pitch=pitch), quiet=0.05)
        mel = log_mel(wave)
        steps = np.linspace(0, len(mel) - 1, 16)
        mel = np.stack([np.interp(steps, np.arange(len(mel)), band) for band in mel.T])
        return (mel - mel.mean(axis=1, keepdims=True)).ravel()

    centres = {word: np.mean([features(voice, word) for voice in speech.VOICES["train"]], axis=0) for word in words}
    for voice in speech.VOICES["eval"]:
        right = 0
        for word in words:
            heard = features(voice, word)
            right += min(words, key=lambda other: np.linalg.norm(heard - centres[other])) == word
        assert right >= 0.8 * len(words), (voice, right)


# --- the same again, whole or absent --------------------------------------------------


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes(world: Path, tmp_path: Path) -> None:
    make_world(tmp_path / "again", **SMALL)
    names = sorted(path.relative_to(world) for path in world.rglob("*") if path.is_file())
    assert names == sorted(p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*") if p.is_file())
    different = [name for name in names if (world / name).read_bytes() != (tmp_path / "again" / name).read_bytes()]
    assert not different


def test_another_seed_asks_other_questions() -> None:
    sizes = {"train_samples": 300, "eval_samples_per_task": 24}
    asked = [[d.answer for d in plan_rows("eval", seed=seed, **sizes)] for seed in (0, 1)]
    assert asked[0] != asked[1]


def test_a_second_call_returns_at_once(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_make", lambda *_: pytest.fail("made again"))
    start = time.perf_counter()
    make_world(world, **SMALL)
    assert time.perf_counter() - start < 0.5


def test_progress_is_told_to_the_end_and_stopping_leaves_nothing(tmp_path: Path) -> None:
    told = []

    def stop_at_videos(what: str, done: int, total: int) -> None:
        told.append((what, done, total))
        if what == "videos":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_world(tmp_path / "made", progress=stop_at_videos, **SMALL)
    assert list(tmp_path.iterdir()) == []
    assert [(done, total) for what, done, total in told if what == "pictures"][-1][0] == told[0][2]


@pytest.mark.slow
def test_killed_halfway_there_is_no_world(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys, pathlib\n"
        "from avlm.data.world.build import make_world\n"
        "make_world(pathlib.Path(sys.argv[1]), train_samples=200, eval_samples_per_task=10,\n"
        "           progress=lambda *_: os.kill(os.getpid(), signal.SIGKILL))\n"
    )
    root = Path(build.__file__).resolve().parents[3]
    ended = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "made")], env={**os.environ, "PYTHONPATH": str(root)}
    )
    assert ended.returncode == -signal.SIGKILL
    assert not (tmp_path / "made").exists()
    (left,) = tmp_path.iterdir()
    other = tmp_path / ".made.partial-alive"
    other.mkdir()
    with build._locked(other) as alone, build._aside(tmp_path / "made") as aside:  # another maker is at work
        assert alone and set(tmp_path.iterdir()) == {other, aside} != {left}
    assert list(tmp_path.iterdir()) == [other]


# --- refusals -------------------------------------------------------------------------


def test_another_world_is_not_overwritten(world: Path) -> None:
    with pytest.raises(ConfigError) as error:
        make_world(world, **{**SMALL, "seed": 4})
    made = {"version": build.VERSION, **SMALL}
    assert str(error.value) == (
        f"{world} holds a world made with {made}; making one with { ({**made, 'seed': 4}) } would mix the two. "
        "Remove that folder or name another."
    )


def test_a_folder_of_something_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="holds something that is not a world"):
        make_world(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_too_few_rows_are_refused_with_a_number_that_works(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        make_world(tmp_path / "made", train_samples=20)
    assert str(error.value) == (
        "train_samples=20 leaves some task without one balanced group of rows; "
        "the least is 200. Use train_samples=200 or more."
    )
    for split in SPLITS:  # the advice holds
        assert {d.task for d in plan_rows(split, seed=0, train_samples=200, eval_samples_per_task=10)} == TASKS


def test_without_espeak_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError) as error:
        make_world(tmp_path / "made")
    assert str(error.value) == (
        "Making speech needs the library espeakng-loader, which is not installed. "
        "Install it with: pip install 'avlm[demo]'"
    )
    assert not (tmp_path / "made").exists()
