"""Scorers against numbers counted by hand."""

import builtins
from typing import Any

import pytest

from avlm.errors import ConfigError, MissingExtraError
from avlm.eval.metrics import exact_match, metrics_for, normalise, word_error_rate


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Red.", "red"),
        ("  The   RED  square!\n", "the red square"),
        ("“Yes”, she said…", "yes she said"),
        ("STRASSE", "strasse"),
        ("Straße", "strasse"),
        ("ﬁve", "five"),  # a ligature
        ("ｆｕｌｌ　ｗｉｄｔｈ", "full width"),
        ("snake_case", "snake case"),
        ("a-b", "a b"),
        ("日本。", "日本"),
        ("कि", "कि"),  # vowel signs are part of the word
        ("", ""),
        ("?!", "?!"),  # signs alone are the answer
        ("+", "+"),
    ],
)
def test_what_two_answers_are_compared_as(text: str, expected: str) -> None:
    assert normalise(text) == expected


def test_words_that_differ_in_a_vowel_sign_or_a_sign_alone_are_not_the_same() -> None:
    assert exact_match(["कि", "-", "naïve"], ["की", "+", "naive"]) == 0.0


def test_exact_match_is_the_share_of_right_answers() -> None:
    assert exact_match(["Red.", "blue", "a green one", ""], ["red", "Blue!", "green", "red"]) == 0.5


def test_answers_without_expectations_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="zip"):
        exact_match(["red", "blue"], ["red"])


@pytest.mark.parametrize(
    ("answers", "expected", "rate"),
    [
        (["the cat sat on the mat"], ["The cat sat on the mat."], 0.0),
        (["the cat sit on mat"], ["the cat sat on the mat"], 2 / 6),  # one wrong, one missing
        (["the cat sit on mat", "hello"], ["the cat sat on the mat", "hello world"], 3 / 8),
        (["hello there big world"], ["hello world"], 2 / 2),  # two added
        ([""], ["hello world"], 1.0),
        (["a b c d e f"], ["x"], 6.0),  # one wrong and five added, for one word
        (["", "yes"], ["", "yes"], 0.0),  # nothing to say, and nothing said
        (["uh huh", "yes"], ["", "yes"], 2.0),  # two added, one word in all
        (["uh"], [""], 1.0),
        ([""], [""], 0.0),
    ],
)
def test_word_error_rate_as_counted_by_hand(answers: list[str], expected: list[str], rate: float) -> None:
    assert word_error_rate(answers, expected) == pytest.approx(rate)


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_jiwer(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "jiwer":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_jiwer)
    with pytest.raises(MissingExtraError) as error:
        word_error_rate(["a"], ["a"])
    assert str(error.value) == (
        "the word error rate needs the library jiwer, which is not installed. "
        "Install it with: pip install 'avlm[metrics]'"
    )


def test_which_scores_a_task_gets() -> None:
    assert metrics_for("vqa", ()) == ("exact",)
    assert metrics_for("transcribe", ()) == ("exact", "wer")
    assert metrics_for("vqa", ("wer",)) == ("wer",)
    with pytest.raises(ConfigError) as error:
        metrics_for("vqa", ["bleu"])
    assert str(error.value) == "--metric bleu is not a metric. There are exact, wer"
