"""Python that a user names: a reader of one's own, or a function that lies in a dataset."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from hashlib import blake2b
from pathlib import Path
from types import ModuleType
from typing import Any

from avlm.config.data import DataConfig
from avlm.errors import ConfigError


def module_of(name: str, folder: Path | None = None) -> ModuleType:
    """A module by its name, or by the path of its file.

    Args:
        folder: What a path is relative to.

    Raises:
        ConfigError: It is not there, or cannot be imported.
    """
    try:
        if not name.endswith(".py"):
            return importlib.import_module(name)
        path = (Path(name) if folder is None else folder / name).resolve()
        known = f"avlm_own_{blake2b(str(path).encode(), digest_size=8).hexdigest()}"
        if known in sys.modules:
            return sys.modules[known]
        spec = importlib.util.spec_from_file_location(known, path)
        if spec is None or spec.loader is None or not path.is_file():
            raise ConfigError(f"{path}: there is no such file. Give the path of your Python file")
        module = sys.modules[known] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[known]
            raise
        return module
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{name}: cannot be imported ({type(error).__name__}: {error}). Correct it") from error


def named_in(module: ModuleType, name: str, where: str) -> Any:
    """What a module calls by a name.

    Raises:
        ConfigError: Nothing.
    """
    found = getattr(module, name, None)
    if found is None:
        raise ConfigError(f"{where}: has nothing named {name}. Correct the name behind the colon")
    return found


def function_of(text: str, folder: Path, data: DataConfig) -> Any:
    """A function that a dataset brings along, as ``FILE.py:FUNCTION``.

    Raises:
        ConfigError: It was not allowed to run it, or it is not there.
    """
    if not data.run_code:
        raise ConfigError(
            f"{folder}: needs {text}, Python that lies in the dataset, and whoever wrote the dataset could do anything "
            "with it. Read it, and allow it with data.run_code=true"
        )
    file, _, name = text.rpartition(":")
    return named_in(module_of(file, folder), name, f"{folder / file}")
