"""What settings add to a conversation follows from what it holds, the same in training and in chat."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat_families import CHATML, MEDIA, processor, tokenizer

from avlm.config.data import SystemPrompts
from avlm.config.stage import StateTokens
from avlm.convert.compose import Composed
from avlm.convert.weights import load_model, save_model
from avlm.data.processor import AvlmProcessor
from avlm.data.text.turns import addressed, state_classes, with_state_tokens
from avlm.samples import MediaItem, Sample, State, Text, Turn

VITA = SystemPrompts(
    text="Aim to help.", image="You see an image, not a video.", video="You see a video, not an image."
)
PICTURE, SOUND, CLIP = (MediaItem(kind, path=Path("x")) for kind in ("image", "audio", "video"))


def ask(*media: MediaItem) -> Sample:
    return Sample("7", (Turn("user", (*media, Text("What?"))), Turn("assistant", (Text("red"),))))


# ---------------------------------------------------------------- system prompts


@pytest.mark.parametrize(
    ("media", "prompt"),
    [
        pytest.param([], "Aim to help.", id="text"),
        pytest.param([SOUND], "Aim to help.", id="sound shares the prompt of text"),
        pytest.param([PICTURE], "You see an image, not a video.", id="image"),
        pytest.param([CLIP], "You see a video, not an image.", id="trap 13: a video has the video's"),
        pytest.param([PICTURE, SOUND], "You see an image, not a video.", id="image and sound"),
        pytest.param([CLIP, SOUND], "You see a video, not an image.", id="video and sound"),
        pytest.param([CLIP, PICTURE], "Aim to help.", id="both: neither of the two would be true"),
    ],
)
def test_the_prompt_is_that_of_what_the_row_holds(media: list[MediaItem], prompt: str) -> None:
    sample = ask(*media)
    first, *rest = addressed(sample, VITA).turns
    assert first == Turn("system", (Text(prompt),)) and tuple(rest) == sample.turns


def test_sound_can_have_a_prompt_of_its_own_and_there_may_be_none() -> None:
    assert addressed(ask(SOUND), SystemPrompts(text="a", audio="b")).turns[0].text() == "b"
    assert addressed(ask(), SystemPrompts(image="a")) == ask()


def test_a_system_turn_of_the_row_is_left_alone() -> None:
    sample = Sample("7", (Turn("system", (Text("mine"),)), *ask().turns))
    assert addressed(sample, VITA) is sample


def test_encode_templates_and_chat_begin_alike(make_sample: Callable[..., Any]) -> None:
    made = AvlmProcessor(tokenizer(CHATML), MEDIA.model_dump(mode="json"), CHATML.template, VITA.model_dump())
    for kinds, prompt in (((), VITA.text), (("image",), VITA.image), (("video",), VITA.video)):
        sample = make_sample(*kinds)
        for prompt_only in (True, False):
            text = made.tokenizer.decode(made.encode(sample, prompt_only=prompt_only).ids)
            assert text.startswith(f"<|im_start|>system\n{prompt}<|im_end|>\n<|im_start|>user")
    written = made.apply_chat_template([{"role": "user", "content": "What?"}], add_generation_prompt=True)
    assert written.startswith(f"<|im_start|>system\n{VITA.text}<|im_end|>")
    plain = processor(CHATML).encode(make_sample("image"))
    assert VITA.image not in processor(CHATML).tokenizer.decode(plain.ids)


def test_a_model_directory_carries_its_prompts(
    make_model: Callable[..., Composed], make_sample: Callable[..., Sample], tmp_path: Path
) -> None:
    made = make_model()
    made.processor.use_system(VITA)
    save_model(*made, tmp_path / "model")
    again = load_model(tmp_path / "model").processor
    for kinds in ((), ("image",), ("video",), ("audio",)):
        sample = make_sample(*kinds)
        assert again.encode(sample, prompt_only=True).ids == made.processor.encode(sample, prompt_only=True).ids
    assert again.encode(make_sample()).ids != make_model().processor.encode(make_sample()).ids


# ---------------------------------------------------------------- states


def test_every_answer_gets_the_token_of_its_question() -> None:
    """The rule of VITA's data code: noise where the row says so, else by whether the question was heard."""
    turns = (
        Turn("user", (SOUND,)),
        Turn("assistant", (Text("one"),)),
        Turn("user", (Text("And?"),)),
        Turn("assistant", (Text("two"),)),
        Turn("user", (PICTURE, SOUND)),
        Turn("assistant", (Text("three"),), state="noise"),
        Turn("user", (CLIP, Text("Now?"))),
        Turn("assistant", (Text("<2>four"),)),
    )
    marked = with_state_tokens(Sample("7", turns), StateTokens())
    assert [turn.text() for turn in marked.turns[1::2]] == ["<1>one", "<3>two", "<2>three", "<2>four"]
    assert state_classes(marked) == [0, 0, 1, 1]
    assert marked.turns[::2] == turns[::2]
    assert with_state_tokens(marked, StateTokens()) == marked  # what is there already is not written twice


@pytest.mark.parametrize(
    ("answer", "state", "expected"),
    [
        ("red", "", 0),
        ("<1>red", "", 0),
        ("<2>red", "", 1),
        ("\u261fred", "", 1),
        ("\u261ered", "", 0),
        ("red", "noise", 1),
        ("<2>red", "question", 0),
    ],
)
def test_a_state_is_the_rows_word_or_else_the_answers_token(answer: str, state: State, expected: int) -> None:
    turns = (Turn("user", (Text("What?"),)), Turn("assistant", (Text(answer),), state=state))
    assert state_classes(Sample("7", turns)) == [expected]


def test_state_tokens_are_learned_as_plain_text(make_sample: Callable[..., Sample]) -> None:
    hands = StateTokens(audio="\u261e", noise="\u261f", text="\u261c")
    made = processor(CHATML)
    for kinds, token in (((), "\u261c"), (("audio",), "\u261e")):
        encoded = made.encode(with_state_tokens(make_sample(*kinds), hands))
        learned = made.tokenizer.decode([label for label in encoded.labels if label != -100])
        assert learned == f"{token}red<|im_end|>"


def test_state_tokens_that_begin_alike_are_refused() -> None:
    with pytest.raises(ValueError, match="the state tokens <1>, <1>a, <3> begin alike"):
        StateTokens(noise="<1>a")
