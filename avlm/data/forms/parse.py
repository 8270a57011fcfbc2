"""Rows in the forms that people have them in, to samples, each checked on its own.

    messages         {"messages": [{"role": "user", "content": ...}]}: avlm's own, OpenAI's, and with `images`, `videos`
                     and `audios` beside marks in the texts ms-swift's and LLaMA-Factory's
    conversations    {"conversations": [{"from": "human", "value": "<image>..."}], "image": ...}: ShareGPT's, LLaVA's,
                     and VITA's with its `set`, `audio`, `inserted_id` and `end_tag`
    query            {"query": ..., "response": ...}, perhaps with `history`: ms-swift's; {"instruction": ...,
                     "output": ...}: Alpaca's

A row of any of them may have a worse answer besides; see `pairs`.

What is wrong with a row is a `DataError` that names the place and the row's id.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from avlm.data.forms.fields import ABSENT, Field
from avlm.data.forms.folders import KINDS, Folders, Whereabouts, unbroken
from avlm.data.forms.marked import SPEAKERS as SPEAKERS
from avlm.data.forms.marked import conversation, marked_messages, question, set_names
from avlm.data.forms.pairs import both, is_pair, worse_of
from avlm.data.forms.parts import cut_of as cut_of
from avlm.data.forms.parts import kind_of, turn_of
from avlm.errors import DataError
from avlm.samples import Sample, Text, Turn

Form = Literal["messages", "conversations", "query"]

_FORMS: dict[Form, str] = {
    "messages": 'A row is {"messages": [{"role": "user", "content": ...}, ...]}',
    "conversations": 'A row is {"conversations": [{"from": "human", "value": ...}, ...]}, as others of the file are',
    "query": 'A row is {"query": ..., "response": ...}, as others of the file are',
}
BOXES = ("<ref-object>", "<bbox>")
_LISTS = frozenset(name for kind in KINDS for name in (kind, f"{kind}s"))


def recognise(row: Any) -> Form | None:
    """The form that a row is in, by what it holds."""
    if not isinstance(row, dict):
        return None
    return next((form for form in _FORMS if _is_in(row, form)), None)


def _is_in(row: dict[str, Any], form: Form) -> bool:
    pair = "chosen" in row and is_pair(row)
    asked = ("query" in row and ("response" in row or pair)) or ("instruction" in row and ("output" in row or pair))
    told = "conversations" in row or "conversation" in row
    if form == "messages":
        return "messages" in row or (pair and not asked and not told)
    return told if form == "conversations" else asked


def parse_row(row: Any, media: Whereabouts, where: str = "", form: Form | None = "messages", key: str = "") -> Sample:
    """Read one row.

    Args:
        row: As it came out of the JSON, or of a table.
        media: What media paths are relative to.
        where: Source and place, for messages.
        form: The form of the file's rows; None where no row so far had one.
        key: What the row is called where it has no `id`; default: its place.

    Raises:
        DataError: The row is not in that form.
    """
    named = isinstance(row, dict) and isinstance(row.get("id"), (str, int))
    sample_id = str(row["id"]) if named else key or where
    try:
        if not isinstance(row, dict):
            raise DataError(f"is {kind_of(row)} and not an object. {_FORMS[form or 'messages']}")
        if form is None:
            raise DataError(
                f'has neither "messages" nor "conversations" nor "query" and "response". {_FORMS["messages"]}; '
                "or say with data.columns which of its columns are what"
            )
        other = recognise(row)
        if other is not None and not _is_in(row, form):
            raise DataError(
                f'is a row of "{other}", and the first row of the file is one of "{form}". '
                "Give rows of each form a file of their own; data.train takes several"
            )
        rejected = None
        if row.get("label") is False and form == "messages":
            raise DataError(
                'has "label": false, by which ms-swift marks an answer as a bad one, and answers are learned. '
                "Leave such rows out, or call the column otherwise"
            )
        if is_pair(row):
            better, worse = both(row, form, _said(row, form))
            turns = _with_system(row, _turns(better, form, media))
            rejected = worse_of(turns, _with_system(row, _turns(worse, form, media)))
        else:
            turns = _with_system(row, _turns(row, form, media))
        _check_learned(turns)
        task = _word(row, "task")
        _word(row, "id")
        unbroken(sample_id, "id")
    except DataError as error:
        shown = f" (id {json.dumps(sample_id)})" if named else ""
        writable = sample_id.encode(errors="replace").decode()
        raise DataError(error.reason, where=where + shown, sample_id=writable) from None
    return Sample(sample_id, turns, task, where, rejected)


def _turns(row: dict[str, Any], form: Form, media: Whereabouts) -> tuple[Turn, ...]:
    if row.get("tools"):
        raise DataError(
            'lists "tools" to be called, and models here answer in words. Leave such rows out, or remove their tools'
        )
    said = _said(row, form)
    if row.get("objects") and any(mark in _text_of([row.get("query"), row.get("response"), said]) for mark in BOXES):
        raise DataError(
            "has ms-swift's marks for boxes (<ref-object>, <bbox>) with their objects beside, and each model writes "
            "boxes in its own way. Write each box as words where its mark stands"
        )
    if form == "query":
        return question(row, media)
    if not isinstance(said, list) or not said:
        raise DataError(f'has no list "{form}" with a message in it. {_FORMS[form]}')
    if form == "conversations":
        return conversation(row, said, media)
    if not _LISTS.isdisjoint(row) and any(row.get(name) for name in _LISTS):
        return marked_messages(row, said, media)
    return tuple(turn_of(message, media) for message in said)


def _text_of(value: Any) -> str:
    return json.dumps(value, default=lambda _: None)  # tables hold bytes, too


def _check_learned(turns: tuple[Turn, ...]) -> None:
    """Refuse a row of whose answers none is learned; one without any answer is a question.

    Raises:
        DataError: It is one.
    """
    answers = [turn for turn in turns if turn.role == "assistant"]
    if answers and not any(turn.learned for turn in answers):
        raise DataError("has no answer that is learned: all have a weight (or loss) of 0. Leave the row out")


def _said(row: dict[str, Any], form: Form) -> Any:
    """The messages of a row, if its form has any."""
    said = row.get(form, row.get("conversation") if form == "conversations" else None)
    if not isinstance(said, str):
        return said
    try:
        return json.loads(said)  # tables of some collections hold the list as a text
    except (ValueError, RecursionError):
        return None


def _with_system(row: dict[str, Any], turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """The turns with what the row has as its `system` in front.

    Raises:
        DataError: They begin with another system prompt.
    """
    given = row.get("system")
    if given is None or given == "":
        return turns
    if not isinstance(given, str):
        raise DataError(f'has {kind_of(given)} as "system", which is a text. Correct it, or leave it out')
    if turns[0].role != "system":
        return (Turn("system", (Text(unbroken(given, "text")),)), *turns)
    if turns[0].text() != given:
        raise DataError('has a "system" and a turn of the system that says something else. Leave one of them out')
    return turns


def set_name(row: Any) -> str:
    """The set that a row is from, its first where it names several.

    Raises:
        DataError: It is neither a text nor a list of texts.
    """
    names = set_names(row) if isinstance(row, dict) else []
    return names[0] if names else ""


def _word(row: dict[str, Any], key: str) -> str:
    """A name that a row may have; null is none."""
    value = row.get(key)
    if value is not None and (not isinstance(value, (str, int)) or isinstance(value, bool)):
        raise DataError(f'has {kind_of(value)} as "{key}", which is a text. Correct it, or leave it out')
    return unbroken("" if value is None else str(value), key)


# ---------------------------------------------------------------- columns by other names

_NAMES = {"question": "query", "answer": "response"}
"""What `data.columns` calls some things, and what a row calls them."""


def renamed(row: Mapping[str, Any], columns: Mapping[str, Field]) -> dict[str, Any]:
    """A row with its columns called as they are here.

    Args:
        columns: Of each name here the field of the row; those that are not there are left out.
    """
    found = {}
    for name, field in columns.items():
        value = field.of(row)
        if value is not ABSENT:
            found[_NAMES.get(name, name)] = value
    if "query" not in found and "response" in found:
        found["query"] = ""
    return found


__all__ = ["SPEAKERS", "Folders", "Form", "cut_of", "parse_row", "recognise", "renamed", "set_name", "set_names"]
