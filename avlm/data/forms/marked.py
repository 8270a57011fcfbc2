"""The turns of rows that mark in their texts where media stand, and list the media beside them.

conversations    LLaVA's, ShareGPT's and VITA's turns with `from` and `value`
query            one question and its answer with what was said before: ms-swift's, and Alpaca's
messages         turns with `role` and `content` whose texts have marks: ms-swift's, LLaMA-Factory's; or parts: TRL's
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from avlm.data.forms.folders import KINDS, Whereabouts, unbroken
from avlm.data.forms.parts import is_learned, kind_of, medium_of, role_of
from avlm.errors import DataError
from avlm.samples import MediaItem, MediaKind, Role, Text, Turn

SPEAKERS: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
}
"""Who speaks in a conversation, and what we call them."""
_ALSO: dict[str, Role] = {"model": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}
"""Speakers of older collections."""
_TOOLS = ("function", "function_call", "observation", "tool", "tool_call", "tool_response", "ipython")

MARKS = re.compile("(<image>|<audio>|<video>)")
Said = tuple[Role, str]
"""Who speaks, and what."""


def conversation(row: dict[str, Any], said: list[Any], media: Whereabouts) -> tuple[Turn, ...]:
    """The turns of a row of LLaVA, VITA or ShareGPT, each medium where its mark stands.

    Raises:
        DataError: They are none, or marks and media are not as many.
    """
    set_names(row)
    texts, learned = list[Said](), list[bool]()
    for turn in said:
        for role, text in _said(turn):
            texts.append((role, text))
            learned.append(is_learned(turn, role))
    files = {kind: files_of(row, kind, media) for kind in KINDS}
    marks: dict[MediaKind, str] = {kind: f"<{kind}>" for kind in KINDS}
    asked = "".join(text for role, text in texts if role != "assistant")
    if files["video"] and not files["image"] and "<video>" not in asked and "<image>" in asked:
        marks |= {"image": "<video>", "video": "<image>"}  # LLaVA-Video marks its videos as images
    return _with_facts(row, _turns(placed(texts, files, marks), learned))


def marked_messages(row: dict[str, Any], said: list[Any], media: Whereabouts) -> tuple[Turn, ...]:
    """The turns of rows of ms-swift, LLaMA-Factory and TRL: texts with marks, or parts, and the lists of media.

    Raises:
        DataError: They are none, or marks and media are not as many.
    """
    texts, learned = list[Said](), list[bool]()
    for message in said:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list):
            content = _with_marks(content)
        if not isinstance(content, str):
            raise DataError(
                f"the row lists its media beside the messages, and a message has {kind_of(content)} as content. "
                "Give texts with a mark for each medium, or every medium as a part of its message"
            )
        texts.append((role_of(message), unbroken(content, "text")))
        learned.append(is_learned(message, texts[-1][0]))
    files = {kind: files_of(row, kind, media) for kind in KINDS}
    return _whole(_turns(placed(in_front(texts, files), files), learned))


def _turns(said: Iterable[tuple[Role, tuple[Text | MediaItem, ...]]], learned: Iterable[bool]) -> list[Turn]:
    pairs = zip(said, learned, strict=True)
    return [Turn(role, parts, verbatim=True, learned=learn) for (role, parts), learn in pairs]


def _with_marks(parts: list[Any]) -> str | list[Any]:
    """TRL's typed parts as a text with a mark for each medium that is in the row's list; what is none, as it was."""
    words: list[str] = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        held = {key for key, value in part.items() if value is not None} if isinstance(part, dict) else set()
        if kind == "text" and isinstance(part.get("text"), str):
            words.append(part["text"])
        elif kind in KINDS and held <= {"type", "index"}:
            words.append(f"<{kind}>")
        else:
            return parts
    return "".join(words)


def question(row: dict[str, Any], media: Whereabouts) -> tuple[Turn, ...]:
    """The turns of a row with a question, its answer, and perhaps what was said before.

    Raises:
        DataError: One of them is missing, or marks and media are not as many.
    """
    texts: list[Said] = []
    for pair in _history(row.get("history")):
        texts += [("user", _words(pair[0], "history")), ("assistant", _words(pair[1], "history"))]
    asked = [row[key] for key in ("query", "instruction", "input") if row.get(key) not in (None, "")]
    answer = next((row[key] for key in ("response", "output") if row.get(key) is not None), None)
    if answer is None:
        raise DataError('has a question and no "response" (or "output"), so there is nothing to learn. Give an answer')
    texts += [
        ("user", "\n".join(_words(text, "question") for text in asked)),
        ("assistant", _words(answer, "answer")),
    ]
    files = {kind: files_of(row, kind, media) for kind in KINDS}
    return _whole([Turn(role, parts, verbatim=True) for role, parts in placed(in_front(texts, files), files)])


def _words(value: Any, what: str) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise DataError(f"its {what} is {kind_of(value)}, and words are needed. Correct it")
    return unbroken(value if isinstance(value, str) else str(value), "text")


def _history(given: Any) -> list[Sequence[Any]]:
    if given is None:
        return []
    pairs = given if isinstance(given, list) else None
    if pairs is None or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        raise DataError(
            f'has {kind_of(given)} as "history", which is a list of pairs of a question and its answer. Correct it'
        )
    return pairs


def in_front(texts: Sequence[Said], files: Mapping[MediaKind, Sequence[MediaItem]]) -> list[Said]:
    """The texts with marks for media of kinds that none marks: they stand in front of the first question.

    Source:
        ms-swift does so (its `Template`); and a question about one picture needs no mark.
    """
    asked = "".join(text for role, text in texts if role != "assistant")
    missing = "".join(f"<{kind}>" * len(files[kind]) for kind in KINDS if f"<{kind}>" not in asked)
    first = next((i for i, (role, _) in enumerate(texts) if role == "user"), None)
    if not missing or first is None:
        return list(texts)
    return [(role, missing + text if i == first else text) for i, (role, text) in enumerate(texts)]


def placed(
    texts: Sequence[Said],
    files: Mapping[MediaKind, Sequence[MediaItem]],
    marks: Mapping[MediaKind, str] | None = None,
) -> Iterator[tuple[Role, tuple[Text | MediaItem, ...]]]:
    """Texts with the next medium of its kind in place of each mark; nobody answers with media.

    Args:
        marks: What stands for each kind, where it is not its name.

    Raises:
        DataError: Marks and media are not as many.
    """
    marks = marks or {kind: f"<{kind}>" for kind in KINDS}
    asked = [text for role, text in texts if role != "assistant"]
    for kind in KINDS:
        found, given = sum(text.count(marks[kind]) for text in asked), len(files[kind])
        if found != given:
            advice = "Add the file or remove a mark" if found > given else "Add a mark or remove the file"
            raise DataError(
                f"the text has {found} {marks[kind]} mark{'' if found == 1 else 's'} and the row lists {given} "
                f"{kind} file{'' if given == 1 else 's'}. {advice}"
            )
    items = {marks[kind]: iter(files[kind]) for kind in KINDS}
    for role, text in texts:
        if role == "assistant" or "<" not in text:
            yield role, ((Text(text),) if text or role == "assistant" else ())
        else:
            chunks = (chunk for chunk in MARKS.split(text) if chunk)
            yield role, tuple(next(items[chunk]) if chunk in items else Text(chunk) for chunk in chunks)


def _said(turn: Any) -> list[Said]:
    """Who speaks in a turn, and what; of one that holds a question and its answer, both."""
    if not isinstance(turn, dict):
        raise DataError(f'a turn is {kind_of(turn)} and not an object. Write {{"from": "human", "value": ...}}')
    if "from" not in turn and "role" not in turn and turn.keys() & SPEAKERS.keys():
        return [(SPEAKERS[who], _value(turn[who])) for who in SPEAKERS if turn.get(who) is not None]
    speaker = turn.get("from", turn.get("role"))
    if isinstance(speaker, str) and speaker in _TOOLS:
        raise DataError(
            f"a turn is from {json.dumps(speaker)}, a tool, and models here speak with people only. Leave such rows out"
        )
    role = SPEAKERS.get(speaker, _ALSO.get(speaker)) if isinstance(speaker, str) else None
    if role is None:
        given = json.dumps(speaker, default=repr)
        raise DataError(f"a turn is from {given}, and turns are from {', '.join(SPEAKERS)}. Correct it")
    return [(role, _value(next((turn[key] for key in ("value", "content", "text") if key in turn), None)))]


def _value(value: Any) -> str:
    if not isinstance(value, str):
        raise DataError('a turn has no "value". Give what is said')
    return unbroken(value, "text")


def set_names(row: dict[str, Any]) -> list[str]:
    """The sets that a row takes its media from, VITA's `set`: none, one for all, or one for each.

    Raises:
        DataError: It is neither a text nor a list of texts.
    """
    given = row.get("set")
    names = given if isinstance(given, list) else [] if given is None else [given]
    if not all(isinstance(name, str) for name in names):
        raise DataError(f'has {kind_of(given)} as "set", which is the name of a set or a list of names. Correct it')
    return names


def files_of(row: dict[str, Any], kind: MediaKind, media: Whereabouts) -> list[MediaItem]:
    """The files of one kind that a row lists: `image` or `images`, one or many.

    Raises:
        DataError: They are no files, or it is not known from which sets they are.
    """
    given = row.get(kind, row.get(f"{kind}s"))
    listed = given if isinstance(given, list) else [] if given is None else [given]
    if not listed:
        return []
    if not all(value and isinstance(value, (str, bytes, dict, MediaItem)) for value in listed):
        raise DataError(f'has {kind_of(given)} as "{kind}", which is the path of a file or a list of paths. Correct it')
    names = set_names(row)
    if kind == "audio" or len(set(names)) <= 1:
        names = (names or [""])[:1] * len(listed)
    if len(names) != len(listed):
        raise DataError(
            f"lists {len(listed)} {kind} files from {len(names)} sets, so which is whose is not known. "
            "Name one set, or one for each file"
        )
    return [
        medium_of(value.replace("\\", "/") if isinstance(value, str) else value, kind, media, name)
        for value, name in zip(listed, names, strict=True)
    ]


def _with_facts(row: dict[str, Any], turns: list[Turn]) -> tuple[Turn, ...]:
    """VITA's `inserted_id`, the number of the answer to noise, and `end_tag`; what is answered unasked is left out."""
    noise, end = row.get("inserted_id"), row.get("end_tag", True)
    if noise is not None:
        answers = isinstance(noise, int) and not isinstance(noise, bool) and 0 <= noise < len(turns)
        if not answers or turns[noise].role != "assistant":
            raise DataError(f"has inserted_id={noise!r}, which is not the number of an answer (from 0). Correct it")
        turns[noise] = replace(turns[noise], state="noise")
    if not isinstance(end, bool):
        raise DataError(f'has {kind_of(end)} as "end_tag", which is true or false. Correct it')
    last = max((i for i, turn in enumerate(turns) if turn.role == "assistant"), default=None)
    if last is not None:
        turns[last] = replace(turns[last], ended=end)
    return _whole(turns)


def _whole(turns: list[Turn]) -> tuple[Turn, ...]:
    """Turns that begin with somebody who asks."""
    while turns and turns[0].role == "assistant":
        turns = turns[1:]
    if not turns:
        raise DataError("has answers and no question. Add a turn from human")
    return tuple(turns)
