"""Rows in the forms that people have them in, to samples, each checked on its own.

    messages         {"messages": [{"role": "user", "content": ...}]}, avlm's own and OpenAI's
    conversations    {"conversations": [{"from": "human", "value": "<image>..."}], "image": ...}: ShareGPT's, LLaVA's,
                     and VITA's with its `set`, `audio`, `inserted_id` and `end_tag`

What is wrong with a row is a `DataError` that names the place and the row's id.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from avlm.config.data import DataSet
from avlm.errors import DataError
from avlm.samples import MediaItem, MediaKind, Role, Sample, State, Text, Turn

Form = Literal["messages", "conversations"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")
KINDS: tuple[MediaKind, ...] = ("image", "audio", "video")
SPEAKERS: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
}
"""Who speaks in a conversation, and what we call them."""

_FORMS: dict[Form, str] = {
    "messages": 'A row is {"messages": [{"role": "user", "content": ...}, ...]}',
    "conversations": 'A row is {"conversations": [{"from": "human", "value": ...}, ...]}, as others of the file are',
}
_MARKS = re.compile("(<image>|<audio>|<video>)")
_OPENAI: dict[str, tuple[MediaKind, str]] = {
    "image_url": ("image", "url"),
    "video_url": ("video", "url"),
    "input_audio": ("audio", "data"),
}
"""OpenAI's parts: what kind they are, and the key of what they hold."""


@dataclass(frozen=True, slots=True)
class Folders:
    """What the media paths of a row are relative to."""

    base: Path = Path()
    sets: Mapping[str, str | DataSet] = field(default_factory=dict)

    def folder(self, kind: MediaKind, name: str) -> Path:
        """The folder of one kind of media of a set; of rows without a set, and sets without a folder, the base."""
        found = self.sets.get(name)
        if found is None or isinstance(found, str):
            return self.base if found is None else Path(found)
        own = (found.sounds or found.folder) if kind == "audio" else found.folder
        return self.base if own is None else Path(own)

    def ratio(self, name: str) -> float:
        """Share of a set's rows that is read."""
        found = self.sets.get(name)
        return found.ratio if isinstance(found, DataSet) else 1.0


def recognise(row: Any) -> Form | None:
    """The form that a row is in, by what it holds."""
    if not isinstance(row, dict):
        return None
    return "messages" if "messages" in row else "conversations" if "conversations" in row else None


def parse_row(row: Any, folders: Folders, where: str = "", form: Form | None = "messages") -> Sample:
    """Read one row.

    Args:
        row: As it came out of the JSON.
        folders: What media paths are relative to.
        where: Source and place, for messages.
        form: The form of the file's rows; None where no row so far had one.

    Raises:
        DataError: The row is not in that form.
    """
    named = isinstance(row, dict) and isinstance(row.get("id"), (str, int))
    sample_id = str(row["id"]) if named else where
    try:
        if not isinstance(row, dict):
            raise DataError(f"is {_kind(row)} and not an object. {_FORMS[form or 'messages']}")
        if form is None:
            other = '{"conversations": [{"from": "human", "value": ...}, ...]}'
            raise DataError(f'has neither "messages" nor "conversations". {_FORMS["messages"]}, or {other}')
        said = row.get(form)
        if not isinstance(said, list) or not said:
            raise DataError(f'has no list "{form}" with a message in it. {_FORMS[form]}')
        if form == "messages":
            turns = tuple(_turn(message, folders.base) for message in said)
        else:
            turns = _conversation(row, said, folders)
        task = _word(row, "task")
        _word(row, "id")
        _unbroken(sample_id, "id")
    except DataError as error:
        shown = f" (id {json.dumps(sample_id)})" if named else ""
        writable = sample_id.encode(errors="replace").decode()
        raise DataError(error.reason, where=where + shown, sample_id=writable) from None
    return Sample(sample_id, turns, task, where)


def set_names(row: dict[str, Any]) -> list[str]:
    """The sets that a row takes its media from, VITA's `set`: none, one for all, or one for each.

    Raises:
        DataError: It is neither a text nor a list of texts.
    """
    given = row.get("set")
    names = given if isinstance(given, list) else [] if given is None else [given]
    if not all(isinstance(name, str) for name in names):
        raise DataError(f'has {_kind(given)} as "set", which is the name of a set or a list of names. Correct it')
    return names


def _kind(value: Any) -> str:
    """What JSON calls a value."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


def _word(row: dict[str, Any], key: str) -> str:
    """A name that a row may have; null is none."""
    value = row.get(key)
    if value is not None and (not isinstance(value, (str, int)) or isinstance(value, bool)):
        raise DataError(f'has {_kind(value)} as "{key}", which is a text. Correct it, or leave it out')
    return _unbroken("" if value is None else str(value), key)


def _unbroken(text: str, what: str) -> str:
    """A text that can be written as UTF-8: JSON can hold half of a character, and no tokenizer takes that."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise DataError(f"its {what} holds half of a character ({half}). Write the whole one") from None
    return text


# ---------------------------------------------------------------- messages


def _turn(message: Any, base: Path) -> Turn:
    if not isinstance(message, dict):
        raise DataError(f'a message is {_kind(message)} and not an object. Write {{"role": ..., "content": ...}}')
    role = message.get("role")
    if role not in ROLES:
        raise DataError(
            f"a message has the role {json.dumps(role, default=repr)}, and roles are {', '.join(ROLES)}. Correct it"
        )
    content, state = message.get("content"), _state(message.get("state"), role)
    if isinstance(content, str):
        return Turn(role, (Text(_unbroken(content, "text")),), state=state)
    if not isinstance(content, list):
        raise DataError('a message has no "content". Give a text, or a list of typed parts')
    return Turn(role, tuple(_part(part, base) for part in content), state=state)


def _state(given: Any, role: Role) -> State:
    if given is None:
        return ""
    if role == "assistant" and (given == "question" or given == "noise"):
        return "question" if given == "question" else "noise"
    raise DataError(
        f"a message of the {role} has the state {json.dumps(given, default=repr)}, and it is answers that have one: "
        '"question", or "noise" where the model was not meant. Correct it, or leave it out'
    )


def _part(part: Any, base: Path) -> Text | MediaItem:
    if not isinstance(part, dict):
        raise DataError(f'a part is {_kind(part)} and not an object. Write {{"type": "text", "text": ...}}')
    kind = part.get("type")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise DataError('a part of type text has no "text". Give its words')
        return Text(_unbroken(part["text"], "text"))
    if isinstance(kind, str) and kind in _OPENAI:
        return _openai_part(part, kind, base)
    if kind not in KINDS:
        given = json.dumps(kind, default=repr)
        raise DataError(f"a part has the type {given}, and parts are text, image, audio or video. Correct its type")
    path = part.get("path")
    if not isinstance(path, str) or not path:
        raise DataError(f'a part of type {kind} has no "path". Give the path of its file, relative to the data file')
    alt = part.get("alt")
    if alt is not None and not isinstance(alt, str):
        raise DataError(
            f'a part of type {kind} has {_kind(alt)} as "alt", which is a text. Correct it, or leave it out'
        )
    start, end = cut_of(part)
    path = _path(path, kind)
    return MediaItem(kind, path=base / path, alt=_unbroken(alt or "", "alt"), start_s=start, end_s=end)


def cut_of(part: dict[str, Any]) -> tuple[float, float | None]:
    """Where the cut that a part asks for begins and ends, in seconds: its keys ``start`` and ``end``; null is none.

    Raises:
        DataError: One of them is no number.
    """
    start, end = _time_s(part, "start"), _time_s(part, "end")
    return 0.0 if start is None else start, end


def _time_s(part: dict[str, Any], key: str) -> float | None:
    value = part.get(key)
    if value is None:
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise DataError(
            f'a part of type {part.get("type")} has {_kind(value)} as "{key}", which is a time in seconds. '
            "Give a number, or leave it out"
        )
    return float(value) if abs(value) < 1e9 else math.inf


def _path(path: str, kind: str) -> str:
    """A path as it stands in a row, if it can be one."""
    if "\0" in path:
        raise DataError(f"the path of a part of type {kind} holds a zero character. Correct it")
    if "://" in path or path.startswith("data:"):
        raise DataError(
            f"the path of a part of type {kind} is a URL ({path[:60]}), and nothing is fetched. "
            "Download the file and give its path, relative to the data file"
        )
    return _unbroken(path, "path")


def _openai_part(part: dict[str, Any], name: str, base: Path) -> MediaItem:
    """A medium as OpenAI's requests hold it: a data URL, base64, or the path of a file."""
    kind, key = _OPENAI[name]
    inner = part.get(name)
    value = inner.get(key) if isinstance(inner, dict) else None
    if not isinstance(value, str) or not value:
        raise DataError(f'a part of type {name} has no "{name}": {{"{key}": ...}}. Give what it shows or lets hear')
    if key == "data":
        return MediaItem(kind, data=_decoded(value, name))
    if value.startswith("data:"):
        return MediaItem(kind, data=_decoded(value.partition(",")[2], name))
    return MediaItem(kind, path=base / _path(value, kind))


def _decoded(text: str, name: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise DataError(f"the data of a part of type {name} are not base64. Encode the file's bytes") from None


# ---------------------------------------------------------------- conversations


def _conversation(row: dict[str, Any], said: list[Any], folders: Folders) -> tuple[Turn, ...]:
    """The turns of a row of LLaVA, VITA or ShareGPT, each medium where its mark stands."""
    media = {kind: _files(row, kind, folders) for kind in KINDS}
    texts = [_said(turn) for turn in said]
    asked = [text for role, text in texts if role != "assistant"]
    marks = {kind: f"<{kind}>" for kind in KINDS}
    if media["video"] and not media["image"] and "<video>" not in "".join(asked) and "<image>" in "".join(asked):
        marks |= {"image": "<video>", "video": "<image>"}  # LLaVA-Video marks its videos as images
    for kind in KINDS:
        found, given = sum(text.count(marks[kind]) for text in asked), len(media[kind])
        if found != given:
            advice = "Add the file or remove a mark" if found > given else "Add a mark or remove the file"
            raise DataError(
                f"the text has {found} {marks[kind]} mark{'' if found == 1 else 's'} and the row lists {given} "
                f"{kind} file{'' if given == 1 else 's'}. {advice}"
            )
    items = {marks[kind]: iter(media[kind]) for kind in KINDS}
    turns = [Turn(role, _parts(text, role, items), verbatim=True) for role, text in texts]
    return _with_facts(row, turns)


def _said(turn: Any) -> tuple[Role, str]:
    """Who speaks, and what."""
    if not isinstance(turn, dict):
        raise DataError(f'a turn is {_kind(turn)} and not an object. Write {{"from": "human", "value": ...}}')
    speaker, value = turn.get("from"), turn.get("value")
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        given = json.dumps(speaker, default=repr)
        raise DataError(f"a turn is from {given}, and turns are from {', '.join(SPEAKERS)}. Correct it")
    if not isinstance(value, str):
        raise DataError('a turn has no "value". Give what is said')
    return SPEAKERS[speaker], _unbroken(value, "text")


def _parts(text: str, role: Role, items: Mapping[str, Any]) -> tuple[Text | MediaItem, ...]:
    """A text with the next medium of its kind in place of each mark; nobody answers with media."""
    if role == "assistant":
        return (Text(text),)
    return tuple(next(items[chunk]) if chunk in items else Text(chunk) for chunk in _MARKS.split(text) if chunk)


def _files(row: dict[str, Any], kind: MediaKind, folders: Folders) -> list[MediaItem]:
    """The files of one kind that a row lists: `image` or `images`, one or many."""
    given = row.get(kind, row.get(f"{kind}s"))
    paths = given if isinstance(given, list) else [] if given is None else [given]
    if not all(isinstance(path, str) and path for path in paths):
        raise DataError(f'has {_kind(given)} as "{kind}", which is the path of a file or a list of paths. Correct it')
    names = set_names(row)
    if kind == "audio" or len(set(names)) <= 1:
        names = (names or [""])[:1] * len(paths)
    if paths and len(names) != len(paths):
        raise DataError(
            f"lists {len(paths)} {kind} files from {len(names)} sets, so which is whose is not known. "
            "Name one set, or one for each file"
        )
    return [
        MediaItem(kind, path=folders.folder(kind, name) / _path(path.replace("\\", "/"), kind))
        for path, name in zip(paths, names, strict=False)
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
        raise DataError(f'has {_kind(end)} as "end_tag", which is true or false. Correct it')
    last = max((i for i, turn in enumerate(turns) if turn.role == "assistant"), default=None)
    if last is not None:
        turns[last] = replace(turns[last], ended=end)
    while turns and turns[0].role == "assistant":
        turns = turns[1:]
    if not turns:
        raise DataError("has answers and no question. Add a turn from human")
    return tuple(turns)
