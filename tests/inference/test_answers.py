"""The text of an answer as its tokens come: never half a character, never what a stop string swallows."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avlm.inference.answers import AnswerText, Decoder, spelled, told


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A byte-level one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["What is red, what is green? It is the end of it. Größe 日本"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")


@pytest.fixture(scope="module")
def pieces_tokenizer() -> Any:
    """One that marks spaces, as SentencePiece does, and falls back to bytes."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = ["<end>", "a", "▁a", "▁red", "▁green", "red", "en", "▁"]
    vocabulary = {word: i for i, word in enumerate([*words, *(f"<0x{b:02X}>" for b in range(256))])}
    made = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")


def told_in_pieces(tokenizer: Any, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], AnswerText]:
    text = AnswerText(Decoder(tokenizer), stop)
    found = []
    for token in ids:
        found.append(text.add(token))
        if text.stopped:
            return found, text
    return [*found, text.end()], text


@settings(deadline=None, max_examples=150)
@given(st.text(max_size=40), st.integers(0, 10**6))
def test_pieces_join_to_what_the_tokenizer_makes_of_all(tokenizer: Any, text: str, seed: int) -> None:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    found, _ = told_in_pieces(tokenizer, ids)
    assert "".join(found) == tokenizer.decode(ids, skip_special_tokens=True)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in found)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.integers(0, 399), max_size=30))
def test_any_tokens_at_all_come_out_whole(tokenizer: Any, ids: list[int]) -> None:
    ids = [i for i in ids if i < len(tokenizer)]
    found, text = told_in_pieces(tokenizer, ids)
    assert text.ids == ids
    assert "".join(found) == text.shown()
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    assert "".join(found).replace("\ufffd", "") == whole.replace("\ufffd", "")


@settings(deadline=None, max_examples=200)
@given(
    st.text("abc é日", max_size=30),
    st.lists(st.text("abc é日", min_size=1, max_size=4), max_size=3),
)
def test_an_answer_ends_where_the_first_stop_string_begins(tokenizer: Any, text: str, stop: list[str]) -> None:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    found, answer = told_in_pieces(tokenizer, ids, tuple(stop))
    assert answer.stopped == any(word in text for word in stop)
    if answer.stopped:
        assert text.startswith("".join(found))
        assert not any(word in "".join(found) for word in stop)
        assert any(text[len("".join(found)) :].startswith(word) for word in stop)
    else:
        assert "".join(found) == text


def test_what_may_be_the_beginning_of_a_stop_string_waits(tokenizer: Any) -> None:
    text = AnswerText(Decoder(tokenizer), ("END",))
    letters = [tokenizer(letter, add_special_tokens=False).input_ids for letter in "aENbEND"]
    assert [text.add(*ids) for ids in letters] == ["a", "", "", "ENb", "", "", ""]
    assert text.stopped and text.shown() == "aENb"


def test_spaces_between_words_that_mark_them_are_kept(pieces_tokenizer: Any) -> None:
    ids = [
        pieces_tokenizer.convert_tokens_to_ids(t) for t in ("▁red", "▁green", "en", "▁", "<0xE6>", "<0x97>", "<0xA5>")
    ]
    found, _ = told_in_pieces(pieces_tokenizer, ids)
    assert "".join(found) == "red greenen 日"
    assert found[0] == "red" and found[1] == " green"


def test_tokens_are_spelled_with_their_bytes(tokenizer: Any, pieces_tokenizer: Any) -> None:
    for text in ("日", "ö", "🙂"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert b"".join(spelled(tokenizer, i)[1] for i in ids) == text.encode()
    ids = tokenizer(" red, it is", add_special_tokens=False).input_ids
    assert "".join(spelled(tokenizer, i)[0] for i in ids) == " red, it is"
    assert spelled(pieces_tokenizer, pieces_tokenizer.convert_tokens_to_ids("▁red")) == (" red", b" red")
    assert spelled(pieces_tokenizer, pieces_tokenizer.convert_tokens_to_ids("<0xE6>"))[1] == b"\xe6"


def test_what_is_told_of_a_token_is_log_softmax(tokenizer: Any) -> None:
    torch.manual_seed(0)
    logits = torch.randn(300)
    expected = logits - torch.log(torch.exp(logits).sum())
    found = told(logits, 40, 3, [int(logits.argmax())], tokenizer)
    assert found.logprob == pytest.approx(float(expected[40]), abs=1e-6)
    best = sorted(range(300), key=lambda i: -float(logits[i]))[1:4]  # without what may never be said
    assert [(t, b) for t, b, _ in found.top] == [spelled(tokenizer, i) for i in best]
    assert [p for *_, p in found.top] == pytest.approx([float(expected[i]) for i in best], abs=1e-6)
    assert told(logits, 40, 0, [], tokenizer).top == ()


def test_the_text_of_a_long_answer_takes_time_in_proportion(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    text = AnswerText(Decoder(tokenizer))
    decode: Callable[..., str] = text._decode
    monkeypatch.setattr(text, "_decode", lambda ids: counted.append(len(ids)) or decode(ids))
    ids = tokenizer("What is red? " * 200, add_special_tokens=False).input_ids
    for token in ids:
        text.add(token)
    assert sum(counted) < 8 * len(ids)
