"""Scorers: an answer and the right one in, a number out."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence

from avlm.errors import ConfigError, MissingExtraError


def normalise(text: str) -> str:
    """Lower case, no punctuation, single blanks: what two answers are compared as."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.sub(r"[^\w\s]|_", " ", text).split())


def exact_match(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Share of answers that equal the right one, after `normalise`."""
    return sum(normalise(a) == normalise(e) for a, e in zip(answers, expected, strict=True)) / len(expected)


def word_error_rate(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Wrong, missing and added words per right word, over all answers together.

    Raises:
        MissingExtraError: jiwer is not installed.
    """
    try:
        import jiwer
    except ImportError:
        raise MissingExtraError("jiwer", "metrics", "the word error rate") from None
    return float(jiwer.wer([normalise(e) or "-" for e in expected], [normalise(a) for a in answers]))


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
