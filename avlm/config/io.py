"""Settings in and out: YAML, JSON, dotted overrides, and errors in the user's words."""

from __future__ import annotations

import copy
import difflib
import json
import re
import types
import typing
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from avlm.errors import ConfigError

S = TypeVar("S", bound=BaseModel)

_FLOAT = ("tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)[eE][-+]?[0-9]+$"))


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-4 is a number, as in JSON and in Python, nothing is a date, and no key stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value} stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]  # ten times faster, where there
    """Writes what `_Loader` reads back: the text '1e-4' in quotes."""


_Loader.add_implicit_resolver(*_FLOAT, list("-+0123456789."))
_Dumper.add_implicit_resolver(*_FLOAT, list("-+0123456789."))
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


def parse_value(text: str) -> Any:
    """Read one value the way YAML does: numbers, true/false, null, [lists], {maps}, and text.

    Raises:
        ConfigError: The text opens a list, a map or a quote and does not close it.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        quoted = "'" + text.replace("'", "''") + "'"
        raise ConfigError(
            f"the value {text} is not readable as YAML. To have it as text, quote it: {quoted}"
        ) from error


def to_yaml(settings: BaseModel) -> str:
    """Settings as YAML text that `read_mapping` and `build` read back to an equal object."""
    data = settings.model_dump(mode="json")
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML or JSON file that holds one mapping.

    Raises:
        ConfigError: No such file, not readable, not a mapping, or a key that stands twice.
    """
    is_json = path.suffix == ".json"
    try:
        text = path.read_text(encoding="utf-8-sig")
        data = json.loads(text, object_pairs_hook=_unique) if is_json else yaml.load(text, Loader=_Loader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file. Check the path") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        detail = " ".join(str(error).replace('in "<unicode string>",', "at").split())
        raise ConfigError(f"{path}: not readable as {'JSON' if is_json else 'YAML'} ({detail}). Correct it") from error
    if not isinstance(data, dict):
        held = "nothing" if data is None else "a list" if isinstance(data, list) else "one value"
        raise ConfigError(f"{path}: holds {held}, and settings are a mapping. Start it with `recipe: NAME`")
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)} stands twice")
    return found


def build(kind: type[S], data: dict[str, Any], *, where: str = "") -> S:
    """Make settings from plain data, with errors that name the dotted key.

    Raises:
        ConfigError: A key is unknown (with the nearest known one), a value has the wrong type, or settings disagree.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise ConfigError((f"{where}: " if where else "") + _explain(kind, data, error)) from None


def override(settings: S, assignments: Sequence[str]) -> S:
    """Apply ``key.sub=value`` assignments and check the whole again.

    A member of a list is named by its position or by its ``name``; naming a variant
    (``model.vision.connector=linear``) switches to it with that variant's defaults.

    Raises:
        ConfigError: An assignment has no ``=``, a key is unknown, or the result cannot work.
    """
    return assemble(type(settings), settings.model_dump(mode="python"), assignments)


def assemble(kind: type[S], data: dict[str, Any], assignments: Sequence[str]) -> S:
    """Make settings from plain data with overrides applied first; see `override`."""
    data = copy.deepcopy(data)
    given = {assignment.partition("=")[0].strip() for assignment in assignments}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"{assignment!r} is not an override: an override is key=value. Write it like seed=1")
        _assign(kind, data, key.strip(), text.strip(), given)
    return build(kind, data)


# ---------------------------------------------------------------- overrides


def _assign(kind: Any, data: Any, dotted: str, text: str, given: Collection[str]) -> None:
    """Set one value inside plain data, making the groups on the way to it.

    A setting that stands instead of another one (steps, epochs) takes its place, unless that is `given` too.
    """
    keys = dotted.split(".")
    for depth, key in enumerate(keys):
        here = ".".join(keys[: depth + 1])
        outer = kind
        at: Any = _member(data, key, here) if isinstance(data, list) else key
        kind, start = _slot(outer, data, at, here)
        if depth == len(keys) - 1:
            value = _fitting(kind, text)
            if key == "kind" and len(_models(outer)) > 1 and data.get("kind") != value:
                data.clear()  # another variant: what was set for the old one means nothing for it
            data[at] = value
            rivals = [] if value is None else _instead(outer, key)
            for rival in rivals:
                if f"{dotted.rpartition('.')[0]}.{rival}" not in given:
                    data[rival] = None
            return
        inside = data[at] if isinstance(data, list) else data.get(at)
        data[at] = data = _opened(kind, inside, start, here, dotted)


def _opened(kind: Any, inside: Any, start: Any, here: str, dotted: str) -> Any:
    """What stands at a key, as something that can be written into."""
    if isinstance(inside, (dict, list)):
        return inside
    if isinstance(inside, tuple):
        return list(inside)
    holds = _models(kind) or any(arm is Any or get_origin(arm) is dict for arm in _arms(kind))
    if inside is not None or not holds:
        raise ConfigError(
            f"{dotted}: {here}={_shown(inside)} has no settings inside it. Set {here} itself, or correct the key"
        )
    return start.model_dump() if isinstance(start, BaseModel) else {}


def _slot(kind: Any, data: Any, at: Any, dotted: str) -> tuple[Any, Any]:
    """Type and default of what stands at a key; refuses an unknown key."""
    models = _chosen(kind, data)
    for model in models:
        if at in model.model_fields:
            found = model.model_fields[at]
            return found.annotation, _default(found)
    if models:
        known = [name for model in models for name in model.model_fields]
        raise ConfigError(f"{dotted} is not a setting.{_did_you_mean(str(at), known, dotted.rpartition('.')[0])}")
    return _inside(kind, at), None


def _default(found: FieldInfo) -> Any:
    return None if found.is_required() else found.get_default(call_default_factory=True, validated_data={})


def _chosen(kind: Any, data: Any) -> list[type[BaseModel]]:
    """The models that a place can hold: of several variants, the one that the data names."""
    models = _models(kind)
    if len(models) > 1 and isinstance(data, dict):
        return [model for model in models if _tag(model) == data.get("kind")] or models
    return models


def _member(items: list[Any], key: str, dotted: str) -> int:
    names = [str(item.get("name", "")) if isinstance(item, dict) else "" for item in items]
    if key in names:
        return names.index(key)
    if key.isdecimal() and int(key) < len(items):
        return int(key)
    known = [name for name in names if name] or [str(i) for i in range(len(items))]
    raise ConfigError(f"{dotted}: there is no such member.{_did_you_mean(key, known, dotted.rpartition('.')[0])}")


_NO_YAML = re.compile(r"[*&!%@`]|\{[^{}:]*\}[^\s,]|\[[^\[\]:]*\][^\s,]")
"""Begins what is no YAML, or means something else there, and names files by a pattern."""


def _fitting(kind: Any, text: str) -> Any:
    """A value as its place wants it: the bare name of a variant is that variant, and text stays text (out=2024)."""
    arms = _arms(kind)
    wants_text = [arm for arm in arms if arm is str or _choices(arm)]
    value = text if wants_text and _NO_YAML.match(text) else parse_value(text)
    if isinstance(value, str) and value in (tags := _tags(kind)):
        return {"kind": tags[value]}
    name = value if isinstance(value, str) else text  # on and off are words here, and true and false to YAML
    if name in (presets := _presets(kind)):
        return copy.deepcopy(presets[name])
    if isinstance(value, (bool, int, float)) and wants_text and not {int, float, bool, Any} & set(arms):
        return text
    return value


# ---------------------------------------------------------------- types


def _arms(kind: Any) -> list[Any]:
    """The types that an annotation allows, None left out."""
    if get_origin(kind) is typing.Annotated:
        return _arms(get_args(kind)[0])
    if get_origin(kind) in (typing.Union, types.UnionType):
        return [inner for arm in get_args(kind) if arm is not type(None) for inner in _arms(arm)]
    return [kind]


def _models(kind: Any) -> list[type[BaseModel]]:
    return [arm for arm in _arms(kind) if isinstance(arm, type) and issubclass(arm, BaseModel)]


def _tag(model: type[BaseModel]) -> str | None:
    """Name of a variant, which is the default of its field `kind`."""
    found = model.model_fields.get("kind")
    return None if found is None else str(found.default)


def _tags(kind: Any) -> dict[str, str]:
    """Names of the variants at a place that has several."""
    models = _models(kind)
    return {tag: tag for tag in map(_tag, models) if tag is not None} if len(models) > 1 else {}


def _instead(kind: Any, key: str) -> list[str]:
    """Settings that one setting takes the place of (``path`` and ``random``)."""
    groups = [group for model in _models(kind) for group in getattr(model, "EITHER", ()) if key in group]
    return [other for group in groups for other in group if other != key]


def _presets(kind: Any) -> dict[str, dict[str, Any]]:
    """Settings that have a short name at a place (``model.audio=ast``)."""
    return {name: data for model in _models(kind) for name, data in getattr(model, "PRESETS", {}).items()}


def _choices(kind: Any) -> list[str]:
    return [str(value) for value in get_args(kind)] if get_origin(kind) is typing.Literal else []


def _inside(kind: Any, at: Any) -> Any:
    """Type of a member of a list or a mapping, or of a field."""
    for arm in _arms(kind):
        arguments = get_args(arm)
        if get_origin(arm) is dict:
            return arguments[1]
        if get_origin(arm) is tuple:
            return arguments[0] if arguments[-1] is Ellipsis else arguments[min(at, len(arguments) - 1)]
        if isinstance(arm, type) and issubclass(arm, BaseModel) and at in arm.model_fields:
            return arm.model_fields[at].annotation
    return Any


# ---------------------------------------------------------------- messages


def _did_you_mean(word: str, known: Sequence[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if near:
        return f" Did you mean {prefix + '.' if prefix else ''}{near[0]}?"
    return f" Known here: {', '.join(dict.fromkeys(known))}."


def _explain(kind: type[BaseModel], data: Any, error: ValidationError) -> str:
    """The first thing that is wrong, in one or two sentences, with the dotted key; unknown keys come first."""
    errors = error.errors()
    first = next((e for e in errors if e["type"] == "extra_forbidden" or e["loc"][-1:] == ("[key]",)), errors[0])
    outer, keys, found = _walk(kind, data, first["loc"])
    dotted, prefix = ".".join(keys), ".".join(keys[:-1])
    what, message, value = first["type"], first["msg"].removeprefix("Value error, "), first.get("input")
    if what == "extra_forbidden":
        known = [name for model in _models(outer) for name in model.model_fields]
        return f"{dotted} is not a setting.{_did_you_mean(keys[-1], known, prefix)}"
    if first["loc"][-1:] == ("[key]",):
        known = [choice for arm in _arms(outer) for choice in _choices(get_args(arm)[0])]
        return f"{dotted} is not a setting.{_did_you_mean(keys[-1], known, prefix)}"
    if what == "missing":
        return f"{dotted} is missing, and nothing can be assumed for it. Set {dotted}=..."
    if what in ("value_error", "assertion_error"):
        return f"{dotted}: {message}." if dotted else f"{message}."
    tags = list(_tags(found))
    if what == "union_tag_not_found":
        return f"{dotted}.kind is missing, and nothing can be assumed for it. Set it to one of {', '.join(tags)}."
    if what == "union_tag_invalid":
        return f"{dotted}.kind={value['kind']!r} is none of its kinds.{_did_you_mean(str(value['kind']), tags)}"
    if what == "model_attributes_type" and tags:
        return f"{dotted}={_shown(value)} is none of its kinds.{_did_you_mean(str(value), tags)}"
    if what == "model_type" and isinstance(value, str) and (presets := list(_presets(found))):
        return f"{dotted}={_shown(value)} is the name of no known part.{_did_you_mean(value, presets)}"
    if what == "literal_error" and (choices := _choices(next(iter(_arms(found))))):
        return f"{dotted}={_shown(value)} is not one of its values.{_named(value, choices)}"
    advice = {"tuple_type": f" Write a list, such as [{value}].", "string_type": f' Write it in quotes: "{value}".'}
    rule = message[0].lower() + message[1:].replace("dictionary", "mapping")
    if what in ("model_type", "dict_type") or len(_arms(found)) > 1:
        rule = "there are settings inside it, and this is one value"
    return f"{dotted}={_shown(value)}: {rule}.{advice.get(what, f' Correct {dotted}.')}"


def _named(value: Any, choices: list[str]) -> str:
    """Which choice was meant; true and false are words here only in quotes."""
    word = str(value).lower() if isinstance(value, bool) else str(value)
    return f' Write it in quotes: "{word}".' if word in choices else _did_you_mean(word, choices)


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value) if isinstance(value, (str, int, float)) else f"({type(value).__name__})"
    return text if len(text) <= 80 else text[:77] + "..."


def _labels(arm: Any) -> set[str | None]:
    """What pydantic calls an arm of a union in a location."""
    return {getattr(arm, "__name__", None), *(_tag(model) for model in _models(arm))} - {None}


def _walk(kind: Any, data: Any, loc: Sequence[Any]) -> tuple[Any, list[str], Any]:
    """Follow a location of pydantic's: (type around the last key, keys as the user writes them, type at the end).

    Members of lists are spoken of by name; the arm of a union, which pydantic puts in, is left out.
    """
    outer, keys = kind, list[str]()
    for key in loc:
        arms = _arms(kind)
        if len(arms) > 1:
            kind = next((arm for arm in arms if key in _labels(arm)), Any)
            continue
        if key == "[key]":
            continue
        outer, kind = kind, _inside(kind, key)
        if isinstance(data, (list, tuple)):
            data = data[key] if isinstance(key, int) and key < len(data) else None
            key = data.get("name", key) if isinstance(data, dict) else key
        else:
            data = data.get(key) if isinstance(data, dict) else None
        keys.append(str(key))
    return outer, keys, kind
