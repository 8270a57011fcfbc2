"""LLaMA-Factory's `dataset_info.json`: data sets by name, each with its file, its form, and its columns' names.

Source:
    LLaMA-Factory's data/README.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from avlm.errors import ConfigError, DataError

_TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "system_tag": "system",
    "observation_tag": "observation",
    "function_tag": "function_call",
}
_COLUMNS = (
    "prompt", "query", "response", "history", "messages", "system", "tools", "images", "videos", "audios", "chosen",
    "rejected", "kto_tag",
)  # fmt: skip
_ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}
_SHAREGPT = {"messages": "conversations"}


@dataclass(frozen=True, slots=True)
class Listed:
    """One data set of a `dataset_info.json`: where its rows are, and how one of them is read."""

    path: Path
    formatting: str
    columns: Mapping[str, str] = field(default_factory=dict)
    """Their word for something, and the column that it is in."""
    tags: Mapping[str, str] = field(default_factory=dict)
    folder: Path = Path()
    """What paths of media are relative to: where the list lies, which their `media_dir` is if it is not given."""

    def __call__(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """A row in a form of ours.

        Raises:
            DataError: Its answer is marked as a bad one.
        """
        given = {word: row.get(column) for word, column in self.columns.items()}
        made = {key: given[key] for key in ("system", "tools", "images", "videos", "audios") if given.get(key)}
        made |= {key: row[key] for key in ("id", "task") if isinstance(row.get(key), (str, int))}
        if given.get("kto_tag") is False:
            raise DataError("its answer is marked as a bad one, and answers are learned. Leave such rows out")
        if self.formatting == "alpaca":
            return made | self._asked(given)
        said = given.get("messages")
        turns = [self._turn(turn) for turn in said] if isinstance(said, list) else said
        if isinstance(given.get("chosen"), dict) and isinstance(turns, list):
            turns.append(self._turn(given["chosen"]))
        worse = {"rejected": self._turn(given["rejected"])} if isinstance(given.get("rejected"), dict) else {}
        return made | {"conversations": turns} | worse

    def _asked(self, given: Mapping[str, Any]) -> dict[str, Any]:
        asked = [given[key] for key in ("prompt", "query") if given.get(key) not in (None, "")]
        answer = given["chosen"] if given.get("chosen") is not None else given.get("response")
        words = "\n".join(asked) if all(isinstance(text, str) for text in asked) else asked
        worse = {} if given.get("rejected") is None else {"rejected_response": given["rejected"]}
        return {"query": words, "response": answer, "history": given.get("history")} | worse

    def _turn(self, turn: Any) -> Any:
        if not isinstance(turn, Mapping):
            return turn
        speakers = {
            self.tags["user_tag"]: "human",
            self.tags["assistant_tag"]: "gpt",
            self.tags["system_tag"]: "system",
            self.tags["observation_tag"]: "observation",
            self.tags["function_tag"]: "function_call",
        }
        speaker = turn.get(self.tags["role_tag"])
        who = speakers.get(speaker, speaker) if isinstance(speaker, str) else speaker
        return {"from": who, "value": turn.get(self.tags["content_tag"])}


def is_list_of_sets(path: Path) -> bool:
    """Whether a file is LLaMA-Factory's; Hugging Face's `datasets` has files of that name too."""
    if path.name != "dataset_info.json" or not path.is_file():
        return False
    found = _read(path)
    return bool(found) and all(
        isinstance(one, dict)
        and one.keys() & {"file_name", "hf_hub_url", "ms_hub_url", "script_url", "cloud_file_name"}
        for one in found.values()
    )


def listed(path: Path, name: str | None) -> Listed:
    """A data set by its name.

    Raises:
        ConfigError: It is not there, lies on a hub, or is described wrongly.
    """
    sets = _read(path)
    if name not in sets:
        said = f"has no data set {name!r}" if name else "lists data sets, and none is named"
        raise ConfigError(f"{path}: {said} (it has {', '.join(sets)}). Write {path}:NAME with one of those")
    described = sets[name]
    file = described.get("file_name")
    if not isinstance(file, str):
        raise ConfigError(
            f"{path}: {name} lies on a hub, and nothing is fetched from there. Download it and give its file_name"
        )
    formatting = described.get("formatting", "alpaca")
    if formatting not in ("alpaca", "sharegpt", "openai"):
        raise ConfigError(f"{path}: {name} has formatting {formatting!r}. Write alpaca, sharegpt or openai")
    columns = _strings(described, "columns", path, name)
    unknown = sorted(columns.keys() - set(_COLUMNS))
    if unknown:
        raise ConfigError(f"{path}: {name} has columns.{unknown[0]}, and columns are {', '.join(_COLUMNS)}. Correct it")
    defaults = _ALPACA if formatting == "alpaca" else _SHAREGPT
    openai = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    tags = _TAGS | (openai if formatting == "openai" else {}) | _strings(described, "tags", path, name)
    return Listed(path.parent / file, str(formatting), {**defaults, **columns}, tags, path.parent)


def _strings(described: Mapping[str, Any], key: str, path: Path, name: str) -> dict[str, str]:
    given = described.get(key) or {}
    if not isinstance(given, dict) or not all(isinstance(value, str) or value is None for value in given.values()):
        raise ConfigError(f"{path}: {name}.{key} is no table of names. Correct it")
    return {word: value for word, value in given.items() if value is not None}


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: not readable ({error.strerror}). Give an existing dataset_info.json") from None
    except (ValueError, RecursionError):
        raise ConfigError(f"{path}: is not JSON. Correct it") from None
    return found if isinstance(found, dict) else {}
