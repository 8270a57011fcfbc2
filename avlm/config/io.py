"""Settings in and out: YAML, JSON, dotted overrides, and errors in the user's words."""

from __future__ import annotations

import difflib
import json
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from avlm.errors import ConfigError

S = TypeVar("S", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-4 is a number, as in JSON and in Python."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def parse_value(text: str) -> Any:
    """Read one value the way YAML does: numbers, true/false, null, [lists], {maps}, and text.

    Raises:
        ConfigError: The text opens a list, a map or a quote and does not close it.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value {text!r} is not readable as YAML. Quote it, such as '{text[:20]}'") from error


def to_yaml(settings: BaseModel) -> str:
    """Settings as YAML text that `load` reads back to an equal object."""
    data = settings.model_dump(mode="json")
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML or JSON file that holds one mapping.

    Raises:
        ConfigError: No such file, not readable, or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text) if path.suffix == ".json" else yaml.load(text, Loader=_Loader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file. Check the path") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, yaml.YAMLError) as error:
        detail = " ".join(str(error).split())
        raise ConfigError(
            f"{path}: not readable as {path.suffix.lstrip('.') or 'YAML'} ({detail}). Correct the file"
        ) from error
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path}: holds a {type(data).__name__}, and settings are a mapping. Start it with `recipe: NAME`"
        )
    return data


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
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise ConfigError(f"{assignment!r} is not an override: an override is key=value. Write it like seed=1")
        _assign(kind, data, key.strip(), parse_value(text))
    return build(kind, data)


def _assign(kind: Any, data: Any, dotted: str, value: Any) -> None:
    keys = dotted.split(".")
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(data, (list, tuple)):
            key = _member(data, key, ".".join(keys[: depth + 1]))
            kind = next(iter(get_args(kind)), Any)
        else:
            kind = _field_type(kind, data, key, ".".join(keys[: depth + 1]))
        if last:
            data[key] = _variant(kind, value)
            return
        child = data[key] if isinstance(data, list) else data.get(key)
        if not isinstance(child, (dict, list, tuple)):
            child = {}
        if isinstance(child, tuple):
            child = list(child)
        data[key] = child
        data = child


def _member(items: Any, key: str, dotted: str) -> int:
    names = [item.get("name", "") if isinstance(item, dict) else "" for item in items]
    if key in names:
        return names.index(key)
    if key.isdigit() and int(key) < len(items):
        return int(key)
    known = [name for name in names if name] or [str(i) for i in range(len(items))]
    raise ConfigError(f"{dotted}: there is no such member.{_did_you_mean(key, known)}")


def _field_type(kind: Any, data: Any, key: str, dotted: str) -> Any:
    """Type of one field, looking into optional and variant types; refuses an unknown name."""
    if get_origin(kind) is dict:
        return get_args(kind)[1]
    models = _models(kind)
    if not models:
        return Any
    if len(models) > 1 and isinstance(data, dict):
        chosen = [m for m in models if "kind" in m.model_fields and m.model_fields["kind"].default == data.get("kind")]
        models = chosen or models
    for model in models:
        if key in model.model_fields:
            return model.model_fields[key].annotation
    known = [name for model in models for name in model.model_fields]
    raise ConfigError(f"{dotted} is not a setting.{_did_you_mean(key, known, dotted.rpartition('.')[0])}")


def _models(kind: Any) -> list[type[BaseModel]]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [kind]
    if get_origin(kind) in (typing.Union, types.UnionType, typing.Annotated):
        return [model for arm in get_args(kind) for model in _models(arm)]
    return []


def _variant(kind: Any, value: Any) -> Any:
    """Turn the bare name of a variant into that variant with its defaults."""
    names = {m.model_fields["kind"].default for m in _models(kind) if "kind" in m.model_fields}
    return {"kind": value} if isinstance(value, str) and value in names else value


def _did_you_mean(word: str, known: list[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if near:
        return f" Did you mean {prefix + '.' if prefix else ''}{near[0]}?"
    return f" Known here: {', '.join(dict.fromkeys(known))}."


def _explain(kind: type[BaseModel], data: Any, error: ValidationError) -> str:
    """The first thing that is wrong, in one sentence, with the dotted key."""
    first = error.errors()[0]
    path = [str(p) for p in first["loc"]]
    dotted = ".".join(_spoken(path, data))
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        known = _known_at(kind, path[:-1])
        return f"{dotted} is not a setting.{_did_you_mean(path[-1], known, dotted.rpartition('.')[0])}"
    if first["type"] == "missing":
        return f"{dotted} is missing, and nothing can be assumed for it. Set {dotted}=..."
    if first["type"] in ("value_error", "assertion_error"):
        return f"{dotted}: {message}." if dotted else f"{message}."
    value = first.get("input")
    shown = f"={value!r}" if isinstance(value, (str, int, float, bool, type(None))) else ""
    return f"{dotted}{shown}: {message[0].lower() + message[1:]}. Correct that setting."


def _spoken(path: list[str], data: Any) -> list[str]:
    """A location as the user would write it: members of a list by name, without the variants that pydantic puts in."""
    spoken = []
    for key in path:
        if isinstance(data, dict) and key not in data and key in VARIANTS:
            continue
        if isinstance(data, (list, tuple)) and key.isdigit() and int(key) < len(data):
            data = data[int(key)]
            key = data.get("name", key) if isinstance(data, dict) else key
        else:
            if key in VARIANTS and not isinstance(data, dict):
                continue
            data = data.get(key) if isinstance(data, dict) else None
        spoken.append(key)
    return spoken


VARIANTS = ("linear", "mlp", "pool", "ModelConfig", "str")
"""Names that pydantic puts into a location for a variant, which the user never wrote."""


def _known_at(kind: Any, path: list[str]) -> list[str]:
    for key in path:
        models = _models(kind)
        chosen = [
            m
            for m in models
            if m.__name__ == key or ("kind" in m.model_fields and m.model_fields["kind"].default == key)
        ]
        if chosen:
            kind = chosen[0]
            continue
        if get_origin(kind) is dict:
            kind = get_args(kind)[1]
        elif key.isdigit():
            kind = next(iter(get_args(kind)), Any)
        else:
            found = [m.model_fields[key].annotation for m in models if key in m.model_fields]
            kind = found[0] if found else Any
    return [name for model in _models(kind) for name in model.model_fields]
