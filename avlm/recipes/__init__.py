"""Recipes: functions that return a whole run's settings. Importing them needs no torch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from avlm.config.io import build, read_mapping
from avlm.config.run import RunConfig
from avlm.errors import ConfigError
from avlm.recipes.sft import sft
from avlm.recipes.tiny import tiny

RECIPES: dict[str, Callable[..., RunConfig]] = {
    "tiny": tiny,
    "sft": sft,
}


def recipe(name: str, **arguments: Any) -> RunConfig:
    """The settings of a recipe.

    Args:
        name: A recipe's name, or a YAML or JSON file of settings (one that a run recorded, say).
        arguments: The recipe function's own, such as ``peft="lora"``.

    Raises:
        ConfigError: There is no such recipe, or it does not take such an argument.
    """
    if name not in RECIPES:
        return _from_file(name, arguments)
    function = RECIPES[name]
    known = inspect.signature(function).parameters
    for argument in arguments:
        if argument not in known:
            raise ConfigError(f"the recipe {name} takes no {argument}. It takes {', '.join(known) or 'nothing'}")
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
