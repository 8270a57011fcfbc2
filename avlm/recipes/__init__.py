"""Recipes: functions that return a whole run's settings. Importing them needs no torch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from avlm.config.io import build, override, parse_value, read_mapping
from avlm.config.run import RunConfig
from avlm.errors import ConfigError
from avlm.recipes.audio import mistral_7b, qwen_audio, salmonn, ultravox
from avlm.recipes.avlm import avlm_8b
from avlm.recipes.neva import classic, llava15_7b, llava15_13b
from avlm.recipes.sft import sft
from avlm.recipes.tiny import tiny
from avlm.recipes.twin import short, tiny_parts
from avlm.recipes.vita import vita15_7b, vita_8x7b
from avlm.recipes.voice import voice

RECIPES: dict[str, Callable[..., RunConfig]] = {
    "tiny": tiny,
    "sft": sft,
    "avlm.8b": avlm_8b,
    "neva.llava15_7b": llava15_7b,
    "neva.llava15_13b": llava15_13b,
    "neva.classic": classic,
    "audio.mistral_7b": mistral_7b,
    "audio.salmonn": salmonn,
    "audio.qwen_audio": qwen_audio,
    "audio.ultravox": ultravox,
    "vita.8x7b": vita_8x7b,
    "vita15.7b": vita15_7b,
    "voice": voice,
}

SIZES = ("full", "twin")


def recipe(name: str, *overrides: str, **arguments: Any) -> RunConfig:
    """The settings of a recipe.

    Args:
        name: A recipe's name, or a YAML or JSON file of settings (one that a run recorded, say).
        overrides: Settings to change, by dotted key, as on the command line: ``"stages.finetune.steps=50"``.
        arguments: The recipe function's own, such as ``peft="lora"``; and for all of them ``size="twin"``: tiny random
            parts of the same families and short stages, to try everything on a laptop. Stages keep what an override
            says of them.

    Raises:
        ConfigError: There is no such recipe, it does not take such an argument, or an override cannot be.
    """
    size = _size(arguments.pop("size", "full"))
    run = _call(name, arguments)
    # A twin is short before it is overridden, so that its steps can be, and tiny behind that, swapped parts and all.
    run = override(short(run) if size == "twin" else run, overrides)
    return tiny_parts(run) if size == "twin" else run


def resolve(name: str, assignments: Sequence[str]) -> RunConfig:
    """A recipe with what a command line says after its name: its own arguments, and overrides of settings.

    Raises:
        ConfigError: As `recipe`.
    """
    parameters = list(inspect.signature(RECIPES[name]).parameters) if name in RECIPES else []
    known = {"size", *parameters} - set(RunConfig.model_fields)
    own = {key: text for key, equals, text in (a.partition("=") for a in assignments) if equals and key in known}
    rest = [a for a in assignments if a.partition("=")[0] not in own]
    others = {argument for function in RECIPES.values() for argument in inspect.signature(function).parameters}
    for key in (a.partition("=")[0] for a in rest):
        if key in others - set(RunConfig.model_fields):
            takes = ", ".join(sorted(known))
            raise ConfigError(f"{key} is no setting of a run, and the recipe {name} takes {takes}. Correct the name")
    return recipe(name, *rest, **{key: text if key == "size" else parse_value(text) for key, text in own.items()})


def _size(size: Any) -> str:
    if size not in SIZES:
        raise ConfigError(f"size={size} is not a size of a recipe. Use one of {', '.join(SIZES)}")
    return str(size)


def _call(name: str, arguments: dict[str, Any]) -> RunConfig:
    if name not in RECIPES:
        return _from_file(name, arguments)
    function = RECIPES[name]
    hints = {key: hint for key, hint in get_type_hints(function).items() if key != "return"}
    for argument, value in arguments.items():
        if argument not in hints:
            takes = ", ".join([*hints, "size"])
            raise ConfigError(f"the recipe {name} takes no {argument}. It takes {takes}")
        try:
            TypeAdapter(hints[argument]).validate_python(value)
        except ValidationError as error:
            wanted = error.errors()[0]["msg"]
            raise ConfigError(
                f"{argument}={value} is nothing that the recipe {name} can work with "
                f"({wanted[0].lower()}{wanted[1:]}). Correct {argument}"
            ) from None
    return function(**arguments)


def _from_file(name: str, arguments: dict[str, Any]) -> RunConfig:
    path = Path(name)
    if path.suffix in (".yaml", ".yml", ".json"):
        if arguments:
            raise ConfigError(
                f"{name} is a file of settings and takes no {next(iter(arguments))}. "
                "Change the file, or override its keys"
            )
        return build(RunConfig, read_mapping(path), where=name)
    import difflib

    near = difflib.get_close_matches(name, RECIPES, n=1)
    hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(RECIPES)}."
    raise ConfigError(f"{name} is neither a recipe nor a file of settings. {hint}")


def summaries() -> list[tuple[str, str]]:
    """Name and first line of every recipe."""
    return [(name, (inspect.getdoc(function) or "").splitlines()[0]) for name, function in RECIPES.items()]
