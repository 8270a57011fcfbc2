"""Rows with two answers to one question, of which one is better: what preference training learns from.

chosen, rejected     beside `messages` or `conversations`, which end with the question; beside `query`, `instruction` or
                     `prompt`; or each a whole conversation. An answer is a text, a message, or a list of messages
rejected_response    ms-swift's: the worse answer as a text, where the row itself ends with the better one
rejected_messages    ms-swift's: the whole conversation with the worse answer
"""

from __future__ import annotations

from typing import Any

from avlm.data.forms.parts import kind_of
from avlm.errors import DataError
from avlm.samples import Turn

WORSE = ("rejected", "rejected_response", "rejected_messages")
_WORSE = frozenset(WORSE)
_PAIR = ("chosen", *WORSE)

Row = dict[str, Any]


def is_pair(row: Any) -> bool:
    """Whether a row has a worse answer beside the one that is learned; one of nothing is none."""
    return not _WORSE.isdisjoint(row) and any(row.get(key) not in (None, "", [], {}) for key in WORSE)


def both(row: Row, form: str, said: Any) -> tuple[Row, Row]:
    """The row as two without a pair: one that ends with the better answer, and one with the worse.

    Args:
        form: Of the row.
        said: Its list of messages, if its form has one.

    Raises:
        DataError: An answer is none.
    """
    rest = {key: value for key, value in row.items() if key not in _PAIR}
    better = row.get("chosen")
    worse = next(row[key] for key in WORSE if row.get(key) not in (None, "", [], {}))
    if form == "query":
        plain = {key: value for key, value in rest.items() if key not in ("response", "output")}
        answer = next((row[key] for key in ("chosen", "response", "output") if row.get(key) is not None), None)
        return plain | {"response": _words(answer, "chosen")}, plain | {"response": _words(worse, "rejected")}
    asked = _asked(row.get("prompt")) if said is None else list(said) if isinstance(said, list) else []
    first = _ends_with(asked, better, form) if better is not None else asked
    question = first[:-1] if first else []
    return rest | {form: first}, rest | {form: _ends_with(question, worse, form)}


def worse_of(better: tuple[Turn, ...], worse: tuple[Turn, ...]) -> Turn:
    """The worse answer of a pair.

    Raises:
        DataError: The two do not answer the same.
    """
    if not all(turns[-1].learned for turns in (better, worse) if turns):
        raise DataError(
            "has two answers (chosen and rejected) of which one has a weight (or loss) of 0, and pairs are learned by "
            "comparing both. Remove the weight, or leave the row out"
        )
    if better[:-1] != worse[:-1] or any(not turns or turns[-1].role != "assistant" for turns in (better, worse)):
        raise DataError(
            "has two answers (chosen and rejected) that follow different words, and they are compared as answers to "
            "the same. Give one conversation up to its last question, and each answer to that"
        )
    return worse[-1]


def _asked(prompt: Any) -> list[Any]:
    """What a prompt asks, as messages: TRL's rows have a text or a list, or nothing beside whole conversations."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return list(prompt) if isinstance(prompt, list) else []


def _ends_with(asked: list[Any], answer: Any, form: str) -> list[Any]:
    """Messages that end with an answer: to what was asked, or a whole conversation of its own."""
    if isinstance(answer, str):
        said = {"role": "assistant", "content": answer} if form == "messages" else {"from": "gpt", "value": answer}
        return [*asked, said]
    if isinstance(answer, dict):
        return [*asked, answer]
    if not isinstance(answer, list) or not answer:
        raise DataError(
            f"has {kind_of(answer)} as an answer of a pair, and that is a text, a message or a list of messages. "
            "Correct it"
        )
    first = answer[0].get("role", answer[0].get("from")) if isinstance(answer[0], dict) else None
    return [*asked, *answer] if first in ("assistant", "gpt") else answer


def _words(answer: Any, name: str) -> str:
    if isinstance(answer, dict):
        answer = answer.get("content", answer.get("value"))
    if not isinstance(answer, str):
        raise DataError(f'has {kind_of(answer)} as "{name}", which is an answer in words. Correct it')
    return answer
