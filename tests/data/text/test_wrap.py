"""Tokens around media: they are text, one before and one behind everything that a medium takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from avlm.convert.weights import load_model, save_model
from avlm.data.processor import AvlmProcessor
from avlm.data.text.templates import PLACEHOLDERS
from avlm.errors import ConfigError
from avlm.samples import IGNORE, Sample

SEE, HEAR = ["<im_start>", "<im_end>"], ["<so_start>", "<so_end>"]


@pytest.fixture
def wrapped(make_model: Callable[..., Any]) -> Any:
    return make_model(seeing={"wrap": SEE, "tiling": {"kind": "internvl", "max_tiles": 4}}, hearing={"wrap": HEAR})


def runs(processor: AvlmProcessor, ids: list[int]) -> list[str]:
    """Tokens with each run of one placeholder told once, everything else that is no token around media left out."""
    tokens = processor.tokenizer.convert_ids_to_tokens(ids)
    kept = [t for t in tokens if t in (*SEE, *HEAR, *PLACEHOLDERS.values())]
    return [t for i, t in enumerate(kept) if i == 0 or t != kept[i - 1]]


def test_each_medium_stands_between_its_tokens(wrapped: Any, make_sample: Callable[..., Sample]) -> None:
    _, processor = wrapped
    found = runs(processor, processor.encode(make_sample("image", "audio", "image")).ids)
    picture, sound = [SEE[0], "<image>", SEE[1]], [HEAR[0], "<audio>", HEAR[1]]
    assert found == [*picture, *sound, *picture]


def test_a_video_is_wrapped_once_as_a_whole(wrapped: Any, make_sample: Callable[..., Sample]) -> None:
    _, processor = wrapped
    found = runs(processor, processor.encode(make_sample("video")).ids)
    assert found == [SEE[0], "<video>", "<audio>", "<video>", SEE[1]]


def test_they_are_text_and_learned_where_all_text_is(wrapped: Any, make_sample: Callable[..., Sample]) -> None:
    _, processor = wrapped
    marks = {processor.tokenizer.convert_tokens_to_ids(token) for token in (*SEE, *HEAR)}
    assert len(marks) == 4
    sample = make_sample("image", "audio")
    answers, everything = processor.encode(sample), processor.encode(sample, supervise="everything")
    assert all(label == IGNORE for i, label in zip(answers.ids, answers.labels, strict=True) if i in marks)
    assert all(label == i for i, label in zip(everything.ids, everything.labels, strict=True) if i in marks)
    placeholders = set(processor.tokens().placeholders.values())
    assert all(label == IGNORE for i, label in zip(everything.ids, everything.labels, strict=True) if i in placeholders)


def test_they_are_new_special_tokens_with_rows_of_their_own_in_the_table(wrapped: Any, tmp_path: Any) -> None:
    model, processor = wrapped
    ids = [processor.tokenizer.convert_tokens_to_ids(token) for token in (*SEE, *HEAR)]
    assert min(ids) >= 0 and max(ids) < model.get_input_embeddings().num_embeddings
    assert processor.tokenizer.decode(ids, skip_special_tokens=True) == ""
    save_model(model, processor, tmp_path / "model")
    again = load_model(tmp_path / "model").processor
    assert again.tokenizer.convert_tokens_to_ids([*SEE, *HEAR]) == ids


def test_nobody_writes_one_in_a_message(wrapped: Any, make_sample: Callable[..., Sample]) -> None:
    _, processor = wrapped
    start = processor.tokenizer.convert_tokens_to_ids(SEE[0])
    assert start not in processor.encode(make_sample(text=f"What is {SEE[0]}?")).ids
    assert processor.encode(make_sample("image", text=f"What is {SEE[0]}?")).ids.count(start) == 1


def test_packed_and_padded_rows_run_with_them(wrapped: Any, make_sample: Callable[..., Sample]) -> None:
    model, processor = wrapped
    batch = processor.collate([processor.encode(make_sample("image", "audio")), processor.encode(make_sample("video"))])
    assert model(**batch).loss.isfinite()


def test_a_tokenizer_that_lacks_them_is_refused(wrapped: Any, make_model: Callable[..., Any]) -> None:
    _, processor = wrapped
    _, plain = make_model()
    with pytest.raises(ConfigError, match="the tokenizer has no token <im_start>, <im_end>, <so_start>, <so_end>, so"):
        AvlmProcessor(plain.tokenizer, media=processor.media)


def test_a_placeholder_is_no_token_around_media(make_model: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError) as error:
        make_model("vision", seeing={"wrap": ["<image>", "</image>"]})
    assert str(error.value) == (
        "the token <image> stands for media itself, so it cannot stand around them. Use another, such as <image_start>"
    )
