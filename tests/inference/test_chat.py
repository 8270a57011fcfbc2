"""A conversation: pieces that join to the answer, and a memory that nothing disturbs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage

import avlm
from avlm.convert.weights import save_model
from avlm.errors import ConfigError, DataError, MediaError
from avlm.inference.chat import Audio, Chat, Image, Video
from avlm.inference.generate import generate
from avlm.inference.sampling import Sampling
from avlm.samples import MediaItem, Sample, Text, Turn

SHORT = Sampling(max_tokens=5)


@pytest.fixture
def chat(make_model: Callable[..., Any]) -> Chat:
    return Chat(*make_model())


def by_hand(chat: Chat, turns: tuple[Turn, ...]) -> str:
    """The answer to a conversation that was never streamed nor remembered."""
    prompt = chat.processor.encode(Sample("x", turns), prompt_only=True)
    (ids,) = generate(chat.model, chat.processor, [prompt], SHORT)
    return str(chat.processor.tokenizer.decode(ids, skip_special_tokens=True))


# ---------------------------------------------------------------- streaming


def scripted(monkeypatch: pytest.MonkeyPatch, chat: Chat, ids: list[int]) -> None:
    """Have the next answer be these tokens, whatever the model thinks."""
    tokens = iter([*ids, chat.processor.tokenizer.eos_token_id])
    monkeypatch.setattr("avlm.inference.engine.choose", lambda logits, choices: [next(tokens)])


@pytest.mark.parametrize(
    "text", ["red green", "naïve Größe", "日本語です", "🙂 and 👩‍👩‍👧", " leading and trailing ", "a\nb", "", "हिन्दी"]
)
def test_pieces_join_to_the_whole_answer_and_never_hold_half_a_character(
    text: str, chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = chat.processor.tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) > len(text) or text.isascii() or not text
    scripted(monkeypatch, chat, ids)
    pieces = list(chat.say("What?"))
    assert "".join(pieces) == text
    assert not [p for p in pieces if "\ufffd" in p or not p]
    if len(text.split()) > 1:
        assert len(pieces) > 1  # it did come in pieces
    assert chat.turns[-1] == Turn("assistant", (Text(text),))


def test_bytes_that_are_no_character_still_come_out(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    half = chat.processor.tokenizer("日", add_special_tokens=False).input_ids[:1]
    scripted(monkeypatch, chat, [*chat.processor.tokenizer("red", add_special_tokens=False).input_ids, *half])
    assert "".join(chat.say("What?")) == "red\ufffd"


def test_streamed_and_whole_answers_are_the_same(chat: Chat, make_sample: Callable[..., Sample]) -> None:
    question = make_sample("image", "audio").turns[0]
    streamed = "".join(chat.say(*question.parts[:2], "What is it?", sampling=SHORT))
    assert streamed == by_hand(chat, (question,))
    chat.clear()
    assert chat.chat(*question.parts[:2], "What is it?", sampling=SHORT) == streamed.strip()
    assert chat.turns == []


# ---------------------------------------------------------------- memory


def test_earlier_turns_and_their_media_are_remembered(chat: Chat, make_sample: Callable[..., Sample]) -> None:
    media = make_sample("image", "audio", "video").media()
    asked: list[Turn] = []
    forgetful = []
    for i, question in enumerate(("What is it?", "And what is number 2?", "red or blue?")):
        turn = Turn("user", (media[i], Text(question)))
        answer = "".join(chat.say(media[i], question, sampling=SHORT))
        assert answer == by_hand(chat, (*asked, turn))
        forgetful.append(answer == by_hand(chat, (turn,)))
        asked += [turn, Turn("assistant", (Text(answer),))]
        assert chat.turns == asked
    assert not all(forgetful)
    chat.clear()
    assert chat.turns == []


def test_an_answer_that_spells_a_marker_does_not_end_the_conversation(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    letters = [i for letter in "<image>" for i in chat.processor.tokenizer(letter, add_special_tokens=False).input_ids]
    with monkeypatch.context() as patch:
        scripted(patch, chat, letters)
        assert "".join(chat.say("What?")) == "<image>"
    assert "".join(chat.say("And now?", sampling=SHORT)) == by_hand(
        chat, (*chat.turns[:1], Turn("assistant", (Text("<image >"),)), Turn("user", (Text("And now?"),)))
    )


def test_asking_once_neither_reads_nor_writes_the_conversation(chat: Chat) -> None:
    alone = chat.chat("What is number 7?", sampling=SHORT)
    list(chat.say("red or blue?", sampling=SHORT))
    before = list(chat.turns)
    assert chat.chat("What is number 7?", sampling=SHORT) == alone
    assert chat.turns == before


def test_errors_and_interruptions_lose_nothing(
    chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_sample: Callable[..., Sample]
) -> None:
    list(chat.say(make_sample("image").media()[0], "What is it?", sampling=SHORT))
    before = list(chat.turns)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    for parts, kind in (
        ((Image(tmp_path / "broken.png"), "And this?"), MediaError),
        ((Image(tmp_path / "missing.png"),), MediaError),
        (("look: <image>",), DataError),
        ((), ConfigError),
    ):
        with pytest.raises(kind):
            chat.say(*parts)
        assert chat.turns == before

    answer = chat.say("red or blue?", sampling=SHORT)
    next(answer)
    answer.close()  # the listener went away in the middle of an answer
    assert chat.turns == before

    def dying(*args: Any, **kwargs: Any) -> list[int]:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("avlm.inference.readers.SlotReader.read", dying)
        with pytest.raises(RuntimeError, match="out of memory"):
            list(chat.say("red or blue?"))
        with pytest.raises(RuntimeError, match="out of memory"):
            chat.chat("red or blue?")
    assert chat.turns == before
    assert "".join(chat.say("red or blue?", sampling=SHORT)) == by_hand(
        chat, (*before, Turn("user", (Text("red or blue?"),)))
    )


# ---------------------------------------------------------------- what may be said


def test_media_in_every_form_are_the_same_medium(chat: Chat, picture: Callable[..., Path]) -> None:
    path = picture(size=(40, 30))
    image = PILImage.open(path)
    forms = [path, str(path), path.read_bytes(), image, np.asarray(image)]
    answers = {chat.chat("What is it?", Image(form), sampling=SHORT) for form in forms}
    assert len(answers) == 1
    assert chat.chat(Image(path), "What is it?", sampling=SHORT) in answers  # order of words and medium
    assert chat.chat("What is it?", sampling=SHORT) not in answers


def test_sounds_may_be_arrays_with_their_rate(chat: Chat, sound: Callable[..., Path]) -> None:
    import soundfile

    path = sound(seconds=0.3)
    wave, rate = soundfile.read(path, dtype="float32")
    expected = chat.chat("What is it?", Audio(path), sampling=SHORT)
    assert chat.chat("What is it?", Audio(wave, rate), sampling=SHORT) == expected
    assert chat.chat("What is it?", Audio(wave), sampling=SHORT) == expected


def test_sounds_and_videos_may_be_cut() -> None:
    assert Video("a.mp4", start_s=1.0, end_s=2.5) == MediaItem("video", Path("a.mp4"), start_s=1.0, end_s=2.5)
    assert Audio(b"abc", end_s=2.5) == MediaItem("audio", data=b"abc", end_s=2.5)
    whole = Audio(np.ones(9, np.float32), 3)
    assert Audio(whole) is whole
    cut = Audio(whole, start_s=1.0)
    assert (cut.decoded, cut.start_s, cut.end_s) == (whole.decoded, 1.0, None)
    with pytest.raises(DataError, match="ends at 1 s and begins at 2 s, so there is nothing in it"):
        Video("a.mp4", start_s=2.0, end_s=1.0)


@pytest.mark.parametrize("maker", [Image, Audio, Video])
def test_what_is_no_medium_is_refused_by_name(maker: Callable[[Any], Any]) -> None:
    with pytest.raises(DataError, match="was given as dict, which is not understood"):
        maker({})


def test_addresses_are_not_fetched(chat: Chat) -> None:
    with pytest.raises(DataError, match=r"https://example\.org/a\.png: .* fetched"):
        chat.chat("What is it?", Image("https://example.org/a.png"))


def test_a_loaded_model_answers_as_the_one_that_was_saved(
    chat: Chat, picture: Callable[..., Path], tmp_path: Path
) -> None:
    save_model(chat.model, chat.processor, tmp_path / "model")
    path = picture()
    expected = chat.chat("What is it?", Image(path), sampling=SHORT)
    again = avlm.load(tmp_path / "model")
    assert again.chat("What is it?", avlm.Image(path), sampling=SHORT) == expected
