"""Scorers: an answer and the right one in, a number out."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence

from avlm.errors import ConfigError, MissingExtraError


def normalise(text: str) -> str:
    """Lower case, no punctuation, single blanks: what two answers are compared as.

    Letters keep their marks (vowel signs of Hindi, say). An answer of signs alone stays as it is.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    words = "".join(" " if unicodedata.category(c)[0] in "PSZC" else c for c in text).split()
    return " ".join(words or text.split())


def exact_match(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Share of answers that equal the right one, after `normalise`."""
    return sum(normalise(a) == normalise(e) for a, e in zip(answers, expected, strict=True)) / len(expected)


def word_error_rate(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Wrong, missing and added words per right word, over all answers together.

    Where nothing is to be said, every word that is said is an added one; where nothing is to be said in any of them,
    the rate is the number of added words.

    Raises:
        MissingExtraError: jiwer is not installed.
    """
    try:
        import jiwer
    except ImportError:
        raise MissingExtraError("jiwer", "metrics", "the word error rate") from None
    pairs = [(normalise(e), normalise(a)) for e, a in zip(expected, answers, strict=True)]
    wrong = sum(len(said.split()) for right, said in pairs if not right)
    words = sum(len(right.split()) for right, _ in pairs)
    spoken = [(right, said) for right, said in pairs if right]
    if spoken:
        found = jiwer.process_words([right for right, _ in spoken], [said for _, said in spoken])
        wrong += found.substitutions + found.deletions + found.insertions
    return wrong / max(1, words)


METRICS: dict[str, Callable[[Sequence[str], Sequence[str]], float]] = {
    "exact": exact_match,
    "wer": word_error_rate,
}

SPEECH_TASKS = ("transcribe", "transcription", "asr")
"""Tasks whose word error rate is told beside the share of exact answers."""


def metrics_for(task: str, chosen: Sequence[str]) -> tuple[str, ...]:
    """Which scores a task gets: the chosen ones, else exact match, and for speech the word error rate too.

    Raises:
        ConfigError: A chosen one is unknown.
    """
    for name in chosen:
        if name not in METRICS:
            raise ConfigError(f"--metric {name} is not a metric. There are {', '.join(METRICS)}")
    if chosen:
        return tuple(chosen)
    return ("exact", "wer") if task in SPEECH_TASKS else ("exact",)
