"""Voice data: what is meant for the model and what is not, said by voices and in rooms that the held-out share nothing
with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from voices import noise, speech

from avlm.config.data import DataConfig
from avlm.data.sources import open_source
from avlm.data.voice.build import VoiceSettings, make_voice
from avlm.data.voice.drawing import KINDS, OWN_VOICE, Draft, Drawer, Heard, Said, Texts, draw_all
from avlm.data.voice.gate import GateSettings, passages
from avlm.data.voice.mixing import NOISES, beside, draw_noise, in_room, let_through, level
from avlm.data.voice.scenes import Scenes
from avlm.data.voice.texts import NODS, STATEMENTS, asked, held_out, read_questions, talk, told, world_questions
from avlm.data.voice.timeline import Moment, draw_timeline, read_timeline, render, write_timeline
from avlm.data.world.speech import VOICES
from avlm.errors import ConfigError, DataError

SMALL = VoiceSettings(train_rows=40, eval_rows=24, timelines=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("espeakng_loader")
    out = tmp_path_factory.mktemp("voice") / "made"
    make_voice(out, SMALL)
    return out


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "eval"])
def test_rows_are_read_as_training_reads_them_and_say_who_was_meant(split: str, made: Path) -> None:
    source = open_source(str(made / f"{split}.jsonl"), DataConfig())
    samples = [source[i] for i in range(len(source))]
    assert len(samples) == (40 if split == "train" else 24)
    assert {sample.task for sample in samples} == set(KINDS)
    assert {sample.turns[-1].state for sample in samples} == {"question", "noise"}
    for sample in samples:
        assert sample.turns[-1].text() in ({""} if sample.turns[-1].state == "noise" else {"yes", "no", ""})
        (sound,) = [item for item in sample.media() if item.kind == "audio"]
        wave, rate = soundfile.read(sound.path)
        assert rate == 16_000 and 0.2 < len(wave) / rate < 8 and 0.1 < np.abs(wave).max() <= 1


def test_no_voice_of_one_split_is_heard_in_the_other(made: Path) -> None:
    said = {line["voice"] for line in rows(made / "recordings.jsonl")} - {OWN_VOICE}
    assert said & set(VOICES["train"]) and said & set(VOICES["eval"])
    assert said <= set(VOICES["train"]) | set(VOICES["eval"])
    assert not set(VOICES["train"]) & set(VOICES["eval"])
    assert OWN_VOICE not in {*VOICES["train"], *VOICES["eval"]}


def test_no_noise_and_no_talk_of_one_split_is_in_the_other() -> None:
    assert not set(NOISES["train"]) & set(NOISES["eval"])
    assert not set(NODS["train"]) & set(NODS["eval"])
    told = {split: {talk(split, np.random.default_rng(i)) for i in range(300)} for split in ("train", "eval")}
    assert not told["train"] & told["eval"]


@pytest.mark.slow
def test_the_same_settings_make_the_same_bytes(made: Path, tmp_path: Path) -> None:
    make_voice(tmp_path / "again", SMALL)
    names = sorted(path.relative_to(made) for path in made.rglob("*") if path.is_file())
    assert names == sorted(
        path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*") if path.is_file()
    )
    for name in names:
        assert (made / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_a_timeline_names_sounds_that_are_there_in_the_order_of_time(made: Path) -> None:
    (path,) = (made / "timelines").iterdir()
    moments = read_timeline(path)
    assert [moment.at_s for moment in moments] == sorted(moment.at_s for moment in moments)
    for moment in moments:
        for name in (moment.sound, moment.image):
            assert not name or (path.parent / name).is_file()
    typed = [i for i, moment in enumerate(moments) if moment.text]
    assert all(moments[i - 1].image and moments[i - 1].at_s == moments[i].at_s for i in typed)  # there is much to say
    judged = [moment for moment in moments if moment.state]
    assert len(judged) == 12
    assert len(typed) == sum(moment.kind == "interruption" for moment in judged) > 0
    ends = [m.at_s + soundfile.info(path.parent / m.sound).duration for m in judged]
    assert all(
        end < after.at_s for end, after in zip(ends, judged[1:], strict=False)
    )  # one at a time, but for the room


@pytest.mark.slow
def test_questions_of_ones_own_keep_their_answers(tmp_path: Path) -> None:
    pytest.importorskip("espeakng_loader")
    (tmp_path / "q.txt").write_text("what is the capital of france\tParis\nwho wrote this\n\n")
    (tmp_path / "o.txt").write_text("".join(f"this is line number {i}\n" for i in range(10)))
    own = VoiceSettings(
        train_rows=40, eval_rows=20, timelines=0, questions=str(tmp_path / "q.txt"), others=str(tmp_path / "o.txt")
    )
    make_voice(tmp_path / "out", own)
    found = [row["messages"][1] for row in rows(tmp_path / "out" / "train.jsonl")]
    asked_ = [message for message in found if message["state"] == "question"]
    assert {(message["content"], message.get("ended", True)) for message in asked_} == {("Paris", True), ("", False)}
    said = {line["text"] for line in rows(tmp_path / "out" / "recordings.jsonl")}
    assert "who wrote this" in said and any(text.startswith("this is line") for text in said)
    source = open_source(str(tmp_path / "out" / "train.jsonl"), DataConfig())
    assert {len(source[i].media()) for i in range(len(source))} == {1}  # no pictures of the world


def test_lines_of_ones_own_are_parted_between_the_splits() -> None:
    lines = tuple(f"line {i}" for i in range(23))
    train, kept = held_out(lines, "train"), held_out(lines, "eval")
    assert sorted((*train, *kept)) == sorted(lines) and not set(train) & set(kept) and len(kept) == 5
    assert asked(world_questions(), "train") == asked(world_questions(), "eval")


def test_kinds_have_their_shares_and_questions_come_equally_often() -> None:
    drafts = draw_all(Drawer("train", Texts(world_questions()), np.random.default_rng(0)), 1000)
    counts = {kind: sum(draft.kind == kind for draft in drafts) for kind in KINDS}
    assert counts == {"addressed": 350, "noise": 350, "overlap": 150, "interruption": 150}
    texts = [draft.front.text for draft in drafts if draft.state == "question"]
    often = [texts.count(question.text) for question in world_questions()]
    assert max(often) - min(often) <= 1
    for draft in drafts:
        assert draft.state == "noise" or not isinstance(draft.front, Heard)


def test_a_question_told_is_a_statement_of_its_words() -> None:
    assert [told(q) for q in ("is it the digit nine", "are there two", "can you hear me", "who wrote this")] == [
        "it is the digit nine", "there are two", "you can hear me", ""
    ]  # fmt: skip
    assert {told(question.text) for question in world_questions()} <= set(STATEMENTS)


def test_whoever_learns_hears_questions_told_more_often() -> None:
    twins = {told(question.text) for question in world_questions()}
    often = {}
    for split in ("train", "eval"):
        drafts = draw_all(Drawer(split, Texts(world_questions()), np.random.default_rng(0)), 2000)
        noises = [draft.front for draft in drafts if draft.kind == "noise"]
        often[split] = sum(isinstance(front, Said) and front.text in twins for front in noises) / len(noises)
    assert often["train"] == pytest.approx(0.42 * (0.6 + 0.4 * 21 / len(STATEMENTS)), abs=0.04)
    assert often["eval"] == pytest.approx(0.25 * 21 / len(STATEMENTS), abs=0.03)


# ---------------------------------------------------------------- what is seen


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Scenes:
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("scenes")
    (folder / "img").mkdir()
    return Scenes(folder, "eval", np.random.default_rng(0))


@pytest.mark.parametrize("question", [question.text for question in world_questions()])
def test_what_is_seen_does_not_tell_who_was_meant(question: str, scenes: Scenes) -> None:
    """Beside a question and beside its words told, the same chance shows the same pictures."""
    seen = {}
    for state, text in (("question", question), ("noise", told(question))):
        scenes.rng = np.random.default_rng(3)
        seen[state] = [scenes.beside(Draft("addressed", state, Said(text))) for _ in range(60)]
    assert seen["question"] == seen["noise"]
    asked_ = {scenes.answer(path, question) for path in seen["question"]}
    assert asked_ == {"yes", "no", ""}  # some fit, some do not


def test_two_things_are_where_it_is_asked_whether_there_is_one(scenes: Scenes) -> None:
    for path in scenes.paths:
        asked_ = [scenes.answer(path, q.text) for q in world_questions() if q.text.startswith("is there a")]
        assert any(asked_) == (path in scenes.pairs)


def test_pictures_of_every_sort_are_seen_beside_any_sound(scenes: Scenes) -> None:
    scenes.rng = np.random.default_rng(0)
    for front in (Said("is it the digit nine"), Said("my uncle baked a cake"), Heard(("bell",))):
        seen = {scenes.beside(Draft("noise", "noise", front)) for _ in range(12_000)}
        assert seen == set(scenes.paths)


# ---------------------------------------------------------------- mixing


@given(st.floats(-10, 40), st.integers(0, 5))
@settings(max_examples=20, deadline=None)
def test_the_one_behind_is_quieter_by_so_many_decibels(snr_db: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    front, behind = rng.normal(size=16_000), rng.normal(size=4000) * rng.uniform(0.01, 10)
    added = beside(front, behind, snr_db) - front
    assert 20 * np.log10(level(front) / level(added)) == pytest.approx(snr_db, abs=0.2)


def test_pauses_do_not_make_speech_quieter() -> None:
    loud = np.sin(np.arange(16_000) / 5)
    assert level(np.concatenate([loud, np.zeros(12_000)])) == pytest.approx(np.sqrt(0.5), rel=0.01)


def test_a_room_goes_on_before_and_behind() -> None:
    rng = np.random.default_rng(0)
    wave, room = np.sin(np.arange(8000) / 5), rng.normal(size=16_000)
    out = in_room(wave, room, before_s=0.2, snr_db=30, loudness=0.5)
    assert out.dtype == np.float32 and len(out) == 16_000 and np.abs(out).max() == pytest.approx(0.5)
    quiet, loud = np.r_[out[:3200], out[11_200:]], out[3200:11_200]
    assert 20 * np.log10(loud.std() / quiet.std()) == pytest.approx(30, abs=1)


@pytest.mark.parametrize(("split", "name"), [(split, name) for split in NOISES for name in NOISES[split]])
def test_noises_have_a_length_and_a_peak(split: str, name: str) -> None:
    wave = draw_noise(name, split, 12_345, np.random.default_rng(0))  # type: ignore[arg-type]
    assert wave.shape == (12_345,) and wave.dtype == np.float32
    assert np.abs(wave).max() == pytest.approx(1.0)


@pytest.mark.parametrize("loudness", [0.0005, 0.01])
def test_a_rows_sound_is_what_a_session_would_judge(loudness: float) -> None:
    """Cut from the recording where the gate cuts, and not where the sound was put."""
    heard = noise(4, loudness)
    heard[16_000 : 16_000 + 4800] += speech(0.3)  # somebody else before it
    heard[32_000 : 32_000 + 12_800] += speech(0.8)
    first, second = passages(heard)
    cut = let_through(heard, 32_000, 12_800)
    np.testing.assert_array_equal(cut, second.wave)
    np.testing.assert_array_equal(let_through(heard, 16_000, 4800), first.wave)
    settings = GateSettings()
    start = second.start - settings.before_ms * 16
    np.testing.assert_array_equal(cut, heard[start : start + len(cut)])
    assert len(cut) == second.end - start + settings.pause_ms * 16


def test_what_no_gate_opens_for_is_cut_with_the_margins_of_one() -> None:
    heard = noise(3, 0.02)
    assert passages(heard) == []
    np.testing.assert_array_equal(let_through(heard, 20_000, 8000), heard[20_000 - 1920 : 28_000 + 2560])


# ---------------------------------------------------------------- timelines


def test_an_interruption_follows_what_was_typed_before_it_can_be_answered() -> None:
    drawer = Drawer("eval", Texts(world_questions()), np.random.default_rng(0))
    found = [moment for _ in range(40) for moment in draw_timeline(drawer, 12)]
    typed = [i for i, (_, what) in enumerate(found) if isinstance(what, str)]
    behind = [found[i + 1] for i in typed]
    assert all(0.1 <= pause <= 0.3 and what.kind == "interruption" for pause, what in behind)  # type: ignore[union-attr]
    drafts = [what for _, what in found if not isinstance(what, str)]
    assert len(drafts) == 480 and len(behind) == sum(draft.kind == "interruption" for draft in drafts)
    assert len(behind) == pytest.approx(120, abs=30)
    assert {draft.state for draft in drafts if draft.kind == "interruption"} == {"question", "noise"}


def test_a_timeline_is_read_as_it_was_written(tmp_path: Path) -> None:
    moments = [
        Moment(0.5, text="Hello?"),
        Moment(1.0, sound="a.wav", state="noise", kind="noise", says="ö"),
        Moment(2.0, image="b.png"),
    ]
    write_timeline(tmp_path / "t.jsonl", moments)
    assert read_timeline(tmp_path / "t.jsonl") == moments


def test_sounds_are_added_where_they_overlap() -> None:
    moments = [Moment(0.0, sound="a"), Moment(0.5, sound="b"), Moment(0.6, text="c")]
    rendered = render(moments, [np.full(16_000, 0.25, np.float32), np.full(16_000, 0.5, np.float32), None], tail_s=1)
    assert rendered.spans == ((0, 16_000), (8000, 24_000), (9600, 9600))
    assert len(rendered.wave) == 24_000 + 16_000
    assert rendered.wave[[0, 7999, 8000, 15_999, 16_000, 23_999, 24_000]].tolist() == [
        0.25,
        0.25,
        0.75,
        0.75,
        0.5,
        0.5,
        0,
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[]", "is not an object. Write one object a line, with at_s"),
        ('{"at_s": -1, "text": "a"}', "has at_s=-1, which is no time on a timeline. Give seconds, from 0 to 86400"),
        ('{"text": "a"}', "has at_s=null, which is no time on a timeline. Give seconds, from 0 to 86400"),
        ('{"at_s": 1}', "has nothing that happens, and one thing does. Give one of sound, text, image"),
        (
            '{"at_s": 1, "text": "a", "sound": "b"}',
            "has sound and text that happens, and one thing does. Give one of sound, text, image",
        ),
        ('{"at_s": 1, "text": "a", "state": "maybe"}', 'has the state "maybe". Use "question" or "noise"'),
        ('{"at_s": 1, "text": 3}', "has text=3, which is not a text. Write it as one"),
        (
            '{"at_s": 1, "txt": "a"}',
            "has txt, which no moment has. There are at_s, image, kind, says, sound, state, text",
        ),
    ],
)
def test_a_line_that_is_no_moment_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"at_s": 0, "text": "a"}\n' + line + "\n")
    with pytest.raises(DataError) as error:
        read_timeline(path)
    assert str(error.value) == f"{path} line 2: {message}"


# ---------------------------------------------------------------- refusals


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(ConfigError) as error:
        make_voice(tmp_path, SMALL)
    assert str(error.value) == f"{tmp_path} holds something already, and two sets of rows would mix. Name a new folder"
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(ConfigError) as error:
        VoiceSettings(train_rows=3)
    assert str(error.value) == "train_rows=3 leaves some kind of sound out; the least is 20. Use train_rows=20 or more"


def test_files_of_texts_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(DataError, match="has no line with a text, so there is nothing to say"):
        read_questions(tmp_path / "empty.txt")
    (tmp_path / "other.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="is not text in UTF-8, so it cannot be spoken"):
        read_questions(tmp_path / "other.txt")
