"""Reading a text word by word gives what the tokenizer gives of all of it."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from avlm.data.text import words
from avlm.data.text.words import Words, parts_before_spaces

CASES = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
RULES = {
    "GPT-2": None,
    "Llama 3": rf"{SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{REST}",
    "Qwen 2": rf"{SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{REST}",
    "o200k": "|".join(
        [
            rf"[^\r\n\p{{L}}\p{{N}}]?{CASES[0]}*{CASES[1]}+{SHORT}?",
            rf"[^\r\n\p{{L}}\p{{N}}]?{CASES[0]}+{CASES[1]}*{SHORT}?",
            r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ]
    ),
}
"""As the files of released tokenizers have them."""
TEXTS = [
    "What's in the picture? I'll say: 3 red circles, 1250 blue squares.\n\nIt's the user's.  Yes\n No",
    "naïve café 漢字",
]


@cache
def made(rule: str, *, digits: bool = False, nfc: bool = False) -> Tokenizer:
    own = Tokenizer(models.BPE())
    pattern = RULES[rule]
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    if pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None))
    own.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    if nfc:
        own.normalizer = normalizers.NFC()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    own.train_from_iterator(TEXTS * 4, trainer)
    own.add_special_tokens([AddedToken("<|end|>", normalized=False), AddedToken("<image>", normalized=True)])
    own.add_tokens([AddedToken("word", single_word=True)])
    return own


def read(own: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [found.ids for found in own.encode_batch(texts, add_special_tokens=False)]


ALPHABET = [*" \t\n\r\v\x1c\x85\xa0\u2003\u3000'/.,;!-_aAbzZ019éñ漢字\u0301\u0345\u200d½٣", "😀", "'s", "'ll", "'LL"]
SOME = [*ALPHABET, *ALPHABET[:1] * 12, "<|end|>", "<image>", "<im", "word", "words", "the", "picture", "1250"]
WRITTEN = st.lists(st.sampled_from(SOME), max_size=24).map("".join) | st.text(max_size=30)


@pytest.mark.parametrize("nfc", [False, True], ids=["as it is", "NFC"])
@pytest.mark.parametrize("digits", [False, True], ids=["", "digit by digit"])
@pytest.mark.parametrize("rule", RULES)
@settings(deadline=None, max_examples=250)
@given(st.lists(WRITTEN, min_size=1, max_size=3))
@example(["a  b \n c\n  d 1 ", " a", " ", "", "a ", "a\n b\t c"])
def test_word_by_word_is_as_a_whole(rule: str, digits: bool, nfc: bool, texts: list[str]) -> None:
    own = made(rule, digits=digits, nfc=nfc)
    assert parts_before_spaces(own)
    by_word = Words(lambda some: read(own, some))
    for _ in range(2):  # the second time everything is known
        assert [by_word.ids(text) for text in texts] == read(own, texts)


def test_each_word_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    by_word = Words(lambda some: [seen.append(text) or [len(text)] for text in some])  # type: ignore[func-returns-value]
    assert by_word.ids("one two three two") == [3, 4, 6, 4]
    assert by_word.ids("one three one\none") == [3, 6, 8]
    assert sorted(seen) == [" one\none", " three", " two", "one"]
    long = "x" * (words.LONGEST + 1)
    by_word.ids(f"one {long}")
    by_word.ids(f"one {long}")
    assert seen.count(f" {long}") == 2  # nobody's letter salad is kept
    monkeypatch.setattr(words, "MOST_WORDS", 4)
    by_word.ids("one a b c d e")
    assert by_word.ids("one two a") == [3, 4, 2] and seen.count(" two") == 2


def test_other_tokenizers_are_left_alone() -> None:
    """Each of them differs in one thing from one that is read word by word, and reads some text otherwise."""

    def other(change: Any, text: str) -> None:
        own = Tokenizer.from_str(made("GPT-2").to_str())
        assert parts_before_spaces(own)
        change(own)
        assert not parts_before_spaces(own)
        whole, parts = read(own, [text])[0], read(own, words.words_of(text)[:1])[0]
        parts += [i for word in words.words_of(text)[1:] for i in read(own, [f" {word}"])[0]]
        assert whole != parts

    def rule(pattern: str) -> Any:
        def change(own: Tokenizer) -> None:
            split = pre_tokenizers.Split(Regex(pattern), "isolated")
            last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            own.pre_tokenizer = pre_tokenizers.Sequence([split, last])

        return change

    def replaces(own: Tokenizer) -> None:
        own.normalizer = normalizers.Replace("d a", "d")

    other(replaces, "red and")
    other(lambda own: own.add_tokens([AddedToken("red circle")]), "a red circle")
    other(lambda own: own.add_special_tokens([AddedToken("<x>", rstrip=True)]), "a<x> b")
    assert not parts_before_spaces(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    plain = Tokenizer.from_str(made("Qwen 2").to_str())
    for pattern in (r"\p{L}+ \p{L}+|\s+", r"\p{N}| ?\p{L}+", rf"(?<=a)\p{{L}}+|{REST}"):
        rule(pattern)(plain)
        assert not parts_before_spaces(plain)
    dropping = Tokenizer.from_str(made("GPT-2").to_str())
    dropping.model.dropout = 0.5
    assert not parts_before_spaces(dropping)
