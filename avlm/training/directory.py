"""The directory of a run: whose it is, one process at a time in it, and settings that it goes on with.

    config.yaml     the settings as they were given
    data.json       what the training data is known by
    steps.json      how many steps a stage takes, where that is known only when it begins
    .lock           held by the process that trains

What the stages leave there is in chain.py.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from avlm.config.io import build, read_mapping, to_yaml
from avlm.config.run import RunConfig
from avlm.errors import AvlmError, ConfigError
from avlm.training.checkpoint import Owner

Difference = tuple[str, object, object]
"""A setting, as it was and as it is."""

FREE = (
    "save",
    "samples",
    "threads",
    "max_steps",
    "out",
    "side_by_side",
    "speed",
    "device",
    "parallel",
    "evaluate",
    "watch",
    "count",
    "log",
    "profile",
)
"""Settings that may differ when a run goes on: they change no weights of the steps that were done."""
FREE_DATA = (
    "cache_mb",
    "workers",
    "worker_mb",
    "stall_s",
    "eval",
    "train",
    "folder",
    "roots",
    "fetch",
    "index",
    "max_bad",
    "max_bad_run",
    "too_long",
)
"""The same of `data`. The training file, and its media, may lie elsewhere; the file's contents are compared."""

FREE_FEATURES = ("folder", "disk_mb")
"""The same of `features`: where they are found changes no bit of them."""

LOCK = ".lock"
STEPS = "steps.json"
MOCK = "mock"
"""Folder of made-up data in a run's directory, for a run that was given none."""
LEFT_BY_A_START = {LOCK, ".config.yaml.writing", MOCK}
"""All that a run killed at its very start can have left in its directory."""


class RunDirectory:
    """The directory of one run.

    Args:
        given: The run's settings as they were asked for, which is what is written down.
        fingerprint: What each source of the run is known by, by name.
        changed: What else may have changed since the settings that are written down there, beside the settings
            themselves.
    """

    def __init__(
        self, given: RunConfig, fingerprint: Mapping[str, str], changed: Callable[[RunConfig], Difference | None]
    ) -> None:
        self.given, self.fingerprint, self.changed = given, fingerprint, changed
        self.out = Path(given.out)

    def check(self) -> None:
        """Make sure that the directory is this run's, empty, or not there.

        Raises:
            ConfigError: It is something else, or was begun with other settings or data.
        """
        check_place(self.out)
        saved = self.out / "config.yaml"
        if os.path.isfile(saved):
            self._compare(build(RunConfig, read_mapping(saved), where=str(saved)))

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """The directory made, written down as this run's, and locked against a second process while the block runs.

        Raises:
            ConfigError: It cannot be, another process has it, or it is another run's by now.
        """
        with ExitStack() as stack:
            try:
                self.out.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context((self.out / LOCK).open("a"))
                alone = _lock(lock.fileno())
                if alone:
                    self.check()
                    write(self.out / "config.yaml", to_yaml(self.given))
                    write(self.out / "data.json", json.dumps(self.fingerprint, indent=1))
            except OSError as error:
                raise ConfigError(
                    f"{self.out} cannot be written to ({error.strerror}). Choose another directory with out=DIR"
                ) from None
            if not alone:
                raise ConfigError(
                    f"another process is training in {self.out}, and two would overwrite each other. "
                    "Wait for it, or choose another directory with out=DIR"
                )
            for pattern in (".*.old", ".*.writing", "*/.*.writing"):  # left by a run that was killed
                for path in self.out.glob(pattern):
                    shutil.rmtree(path, ignore_errors=True)
            yield

    def owner(self) -> Owner:
        """Whose the run's checkpoints are."""
        data = sorted(self.fingerprint.values())

        def differs(facts: Any) -> str | None:
            try:
                changed, learned = self.difference(build(RunConfig, facts["settings"])), facts["data"]
            except (AvlmError, KeyError, TypeError):
                return "its settings are not known here"
            if changed is not None:
                return f"{changed[0]}={_shown(changed[1])} there, and {_shown(changed[2])} here"
            return None if learned == data else "it learned from other data"

        return Owner({"settings": self.given.model_dump(mode="json"), "data": data}, differs)

    def difference(self, old: RunConfig) -> Difference | None:
        """The first setting of another run's that this one's weights do not follow from."""
        before, now = old.model_dump(mode="json"), self.given.model_dump(mode="json")
        for data in (before, now):
            for key in FREE:
                del data[key]
            for key in FREE_DATA:
                del data["data"][key]
            for key in FREE_FEATURES:
                del data["features"][key]
        return _first_difference(before, now)

    def _compare(self, old: RunConfig) -> None:
        if old.recipe != self.given.recipe:
            raise ConfigError(
                f"{self.out} is a run of the recipe {old.recipe}, and this one is {self.given.recipe}. "
                "Choose another directory with out=DIR"
            )
        changed = self.difference(old) or self.changed(old)
        if changed is not None:
            key, a, b = changed
            raise ConfigError(
                f"{self.out} was begun with {key}={_shown(a)}, and now {key}={_shown(b)}. A run goes on with the "
                f"settings it began with: set {key}={_shown(a)}, or choose another directory with out=DIR"
            )
        self._compare_data()

    def _compare_data(self) -> None:
        try:
            known = json.loads((self.out / "data.json").read_bytes())
        except (OSError, ValueError):
            return  # killed before it was written: nothing was learned yet
        if sorted(known.values()) != sorted(self.fingerprint.values()):
            changed = [name for name, digest in known.items() if digest not in self.fingerprint.values()]
            raise ConfigError(
                f"{self.out} was begun with other training data ({', '.join(changed or known)} changed since). "
                "Put the data back as it was, or choose another directory with out=DIR"
            )


def check_place(out: Path) -> None:
    """Make sure that a run's directory is a run's, empty, or not there.

    Raises:
        ConfigError: It is something else.
    """
    if os.path.isdir(out):
        if not os.path.isfile(out / "config.yaml") and set(os.listdir(out)) - LEFT_BY_A_START:
            raise ConfigError(f"{out} holds other files and no run. Choose an empty or a new directory with out=DIR")
    elif os.path.lexists(out):
        raise ConfigError(
            f"{out} is a file, and a run needs a directory. Choose another name with out=DIR, or remove the file"
        )


def noted_steps(out: Path) -> dict[str, int]:
    """Steps of the stages of a run whose length was known only when they began, by name."""
    try:
        return {str(name): int(steps) for name, steps in json.loads((out / STEPS).read_bytes()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def note_steps(out: Path, stage: str, steps: int) -> None:
    """Write down how many steps a stage takes that begins now."""
    write(out / STEPS, json.dumps({**noted_steps(out), stage: steps}, indent=1))


def _first_difference(a: object, b: object, path: str = "") -> Difference | None:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(k for k in b if k not in a)]:
            found = _first_difference(a.get(key), b.get(key), f"{path}.{key}" if path else key)
            if found:
                return found
        return None
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            name = x.get("name", i) if isinstance(x, dict) else i
            found = _first_difference(x, y, f"{path}.{name}")
            if found:
                return found
        return None
    return None if a == b else (path, a, b)


def _shown(value: object) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 100 else text[:100] + "..."


def write(path: Path, text: str) -> None:
    """Write a file that is whole or not there, whenever the process is killed."""
    aside = path.with_name(f".{path.name}.writing")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def _lock(handle: int) -> bool:
    """Lock an open file until it is closed, however the process ends; False if another process has."""
    try:
        import fcntl
    except ImportError:  # Windows: two runs in one directory are then not told apart
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True
