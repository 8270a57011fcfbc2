"""Columns of numbers on the disk, one for each row of a data set: memory-mapped, hashed, complete or absent."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

HEAD = "index.json"
"""Says what the columns are, and what their files hash to. Written last."""


def new_columns(folder: Path, dtypes: Mapping[str, type], rows: int) -> dict[str, np.memmap[Any, Any]]:
    """Columns of zeros to write to."""
    return {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=(rows,))
        for name, dtype in dtypes.items()
    }


def open_columns(folder: Path, names: Mapping[str, type], mode: str = "r") -> dict[str, np.ndarray]:
    """Columns that are there already, to read (or with ``r+`` to write).

    Raises:
        ValueError, OSError: One is missing or damaged.
    """
    return {name: np.load(folder / f"{name}.npy", mmap_mode=mode, allow_pickle=False) for name in names}  # type: ignore[arg-type]


def seal(folder: Path, head: dict[str, Any]) -> None:
    """Write down what a folder holds, and what each of its files hashes to."""
    hashes = {path.name: digest(path) for path in sorted(folder.iterdir()) if path.name != HEAD}
    aside = folder / f".{HEAD}"
    aside.write_text(json.dumps({**head, "files": hashes}, indent=1))
    with ThreadPoolExecutor() as pool:  # together, so that the disk is waited for once
        list(pool.map(_sync, [*folder.iterdir(), folder]))
    aside.replace(folder / HEAD)
    _sync(folder)


def sealed(folder: Path) -> dict[str, Any] | None:
    """What a folder says it holds; None where it is not there, not whole, or damaged."""
    try:
        head = json.loads((folder / HEAD).read_bytes())
        whole = all(digest(folder / name) == value for name, value in head["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return head if whole else None


def publish(aside: Path, folder: Path) -> None:
    """Put a folder where another one may be."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    aside.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # a folder cannot be opened there
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
