"""What commands share: their arguments, and refusals before anything heavy is loaded."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from avlm.errors import ConfigError

if TYPE_CHECKING:
    from avlm.config.data import DataConfig
    from avlm.config.run import RunConfig

Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings to change, by dotted key.")]
RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's name, or a YAML file of settings.")]
MAX_SEED = 2**63 - 1
ModelDir = Annotated[str, typer.Argument(metavar="MODEL", help="A model directory.")]


def quiet() -> None:
    """transformers draws bars while it loads; where there is no terminal they would bury what there is to read."""
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def resolve(name: str, overrides: list[str] | None) -> RunConfig:
    from avlm.recipes import resolve

    return resolve(name, overrides or [])


def check_files(config: RunConfig) -> None:
    """Refuse a missing file before anything heavy is loaded."""
    from avlm.config.data import paths_of

    named = {"data.train": config.data.train, "data.eval": config.data.eval}
    named |= {f"stages.{s.name}.data": s.data for s in config.stages}
    for key, data in named.items():
        for path in paths_of(data):
            check_data(key, path)
    if isinstance(config.model, str) and not os.path.isdir(config.model):
        raise ConfigError(f"model={config.model}: there is no such directory. Set model=DIR to a model directory")


def check_absent(out: Path) -> None:
    if os.path.lexists(out):
        raise ConfigError(f"{out} exists, and would be overwritten. Choose another name, or remove it")


def data_settings(overrides: list[str], advice: str) -> DataConfig:
    """Where media lie and so on, as overrides of ``data`` say.

    Args:
        advice: What to do where one is of something else.
    """
    from avlm.config.data import DataConfig
    from avlm.config.io import override

    for text in overrides:
        if not text.startswith("data."):
            raise ConfigError(f"{text.partition('=')[0]} is a setting of a run, and no run is named. {advice}")
    return override(DataConfig(), [text.removeprefix("data.") for text in overrides])


def check_data(key: str, path: str) -> None:
    """Refuse rows that are not there as far as a look tells it: a part of something, a pattern and somebody's reader
    are left to what opens them."""
    if not os.path.exists(path) and not any(sign in path for sign in ":{*?["):
        raise ConfigError(f"{key}={path}: there is no such file. Check the path")
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise ConfigError(f"{key}={path}: is neither a file nor a folder, so there are no rows to read. Give one")


def check_file(key: str, path: str) -> None:
    if os.path.isdir(path):
        raise ConfigError(f"{key}={path}: is a directory, and a file is wanted. Give the path of the file itself")
    if not os.path.isfile(path):
        raise ConfigError(f"{key}={path}: there is no such file. Check the path")


def check_writable(path: Path) -> None:
    """Refuse a place that cannot be written before the work is done, rather than after."""
    with writing(path):
        new = not os.path.lexists(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
        if new:
            path.unlink()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A place that cannot be written is the user's to change."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror or error}). Choose another place") from None


def write_json(path: Path, data: dict[str, Any]) -> None:
    text = json.dumps(data, indent=1, ensure_ascii=False)
    path.write_text(text, encoding="utf-8", errors="backslashreplace")  # half a character becomes JSON's escape for it
