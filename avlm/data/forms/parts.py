"""The turns of a row of `messages`: avlm's own, OpenAI's, and typed parts as transformers' templates take them."""

from __future__ import annotations

import json
import math
from typing import Any

from avlm.data.forms.folders import KINDS, Whereabouts, decoded, unbroken
from avlm.errors import DataError
from avlm.samples import MediaItem, MediaKind, Role, State, Text, Turn

ROLES: tuple[Role, ...] = ("system", "user", "assistant")

_OPENAI: dict[str, tuple[MediaKind, str]] = {
    "image_url": ("image", "url"),
    "video_url": ("video", "url"),
    "audio_url": ("audio", "url"),
    "input_audio": ("audio", "data"),
}
"""OpenAI's parts: what kind they are, and the key of what they hold."""


def kind_of(value: Any) -> str:
    """What JSON calls a value."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "bytes" if isinstance(value, bytes) else "a number")


def turn_of(message: Any, media: Whereabouts) -> Turn:
    """One message.

    Raises:
        DataError: It is none.
    """
    if not isinstance(message, dict):
        raise DataError(f'a message is {kind_of(message)} and not an object. Write {{"role": ..., "content": ...}}')
    role = role_of(message)
    content, state = message.get("content"), _state(message.get("state"), role)
    ended, verbatim = _truth(message, "ended", True), _truth(message, "verbatim", False)
    learned = is_learned(message, role)
    if isinstance(content, str):
        return Turn(role, (Text(unbroken(content, "text")),), verbatim, state, ended, learned)
    if not isinstance(content, list):
        raise DataError('a message has no "content". Give a text, or a list of typed parts')
    return Turn(role, tuple(_part(part, media) for part in content), verbatim, state, ended, learned)


def role_of(message: dict[str, Any]) -> Role:
    """Who a message is from.

    Raises:
        DataError: It is from nobody that is known, or calls tools.
    """
    given = "system" if message.get("role") == "developer" else message.get("role")  # OpenAI's later name for it
    if given not in ROLES:
        raise DataError(
            f"a message has the role {json.dumps(given, default=repr)}, and roles are {', '.join(ROLES)}. Correct it"
        )
    if message.get("tool_calls"):
        raise DataError('an answer calls tools ("tool_calls"), and models here answer in words. Leave such rows out')
    return ROLES[ROLES.index(given)]


def is_learned(said: dict[str, Any], role: Role) -> bool:
    """Whether an answer is learned: OpenAI's `weight`, ms-swift's `loss`; what others say never is, whatever it has.

    Raises:
        DataError: It is to be learned in part.
    """
    given = [(key, said[key]) for key in ("weight", "loss") if said.get(key) is not None] if role == "assistant" else []
    for key, value in given:
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise DataError(
                f"an answer has {key}={json.dumps(value, default=repr)}, and an answer is learned (1) or not (0). "
                "Correct it"
            )
    return all(value for _, value in given)


def _truth(message: dict[str, Any], key: str, default: bool) -> bool:
    value = message.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise DataError(f'a message has {kind_of(value)} as "{key}", which is true or false. Correct it')
    return value


def _state(given: Any, role: Role) -> State:
    if given is None:
        return ""
    if role == "assistant" and (given == "question" or given == "noise"):
        return "question" if given == "question" else "noise"
    raise DataError(
        f"a message of the {role} has the state {json.dumps(given, default=repr)}, and it is answers that have one: "
        '"question", or "noise" where the model was not meant. Correct it, or leave it out'
    )


def _part(part: Any, media: Whereabouts) -> Text | MediaItem:
    if not isinstance(part, dict):
        raise DataError(f'a part is {kind_of(part)} and not an object. Write {{"type": "text", "text": ...}}')
    kind = part.get("type")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise DataError('a part of type text has no "text". Give its words')
        return Text(unbroken(part["text"], "text"))
    if isinstance(kind, str) and kind in _OPENAI:
        return _openai_part(part, kind, media)
    if kind not in KINDS:
        named = json.dumps(kind, default=repr)
        raise DataError(f"a part has the type {named}, and parts are text, image, audio or video. Correct its type")
    alt = part.get("alt")
    if alt is not None and not isinstance(alt, str):
        raise DataError(
            f'a part of type {kind} has {kind_of(alt)} as "alt", which is a text. Correct it, or leave it out'
        )
    start, end = cut_of(part)
    given = next((part[key] for key in ("path", "url", kind, "base64") if part.get(key) is not None), None)
    if isinstance(part.get("base64"), str) and given is part["base64"]:
        given = decoded(given, kind)
    return medium_of(given, kind, media, alt=unbroken(alt or "", "alt"), start_s=start, end_s=end)


def medium_of(given: Any, kind: MediaKind, media: Whereabouts, name: str = "", **more: Any) -> MediaItem:
    """A medium as a row gives it: a path, an address, bytes, bytes with a path (as tables have them), or ready.

    Args:
        name: The set that it is from.

    Raises:
        DataError: It is none of these.
    """
    title = ""
    if isinstance(given, dict):
        path = given.get("path") or given.get("url")
        data = given.get("bytes")
        title = path if isinstance(path, str) else ""
        given = path if data is None else data
    if isinstance(given, MediaItem):
        return given
    if isinstance(given, (bytes, bytearray)):
        return MediaItem(kind, data=bytes(given), title=unbroken(title, "path"), **more)
    if not isinstance(given, str) or not given:
        raise DataError(f'a part of type {kind} has no "path". Give the path of its file, relative to the data file')
    return media.item(kind, given, name, **more)


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
            f'a part of type {part.get("type")} has {kind_of(value)} as "{key}", which is a time in seconds. '
            "Give a number, or leave it out"
        )
    return float(value) if abs(value) < 1e9 else math.inf


def _openai_part(part: dict[str, Any], name: str, media: Whereabouts) -> MediaItem:
    """A medium as OpenAI's requests hold it: an address, a data URL, base64, or the path of a file."""
    kind, key = _OPENAI[name]
    inner = part.get(name)
    value = inner.get(key) if isinstance(inner, dict) else inner if key == "url" else None
    if not isinstance(value, str) or not value:
        raise DataError(f'a part of type {name} has no "{name}": {{"{key}": ...}}. Give what it shows or lets hear')
    if key == "data" and not value.startswith("data:"):
        return MediaItem(kind, data=decoded(value, name))
    if value.startswith("data:"):
        return MediaItem(kind, data=decoded(value.partition(",")[2], name))
    return media.item(kind, value)
