"""Folders in Hugging Face format, local or on the hub: their files, and what stands in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from avlm.config.io import read_mapping
from avlm.convert.streaming import Stored, read_files, read_pickles
from avlm.errors import ConfigError, WeightsError

SAFE, PICKLED = "model.safetensors", "pytorch_model.bin"


def file_of(path: str, name: str) -> Path | None:
    """A file of a local folder, or of a hub name; None where there is no such file."""
    if Path(path).is_dir():
        return Path(path) / name if (Path(path) / name).is_file() else None
    from transformers.utils import cached_file

    try:
        found = cached_file(path, name)
    except OSError:
        return None
    return None if found is None else Path(found)


def preprocessor_of(path: str, sense: str) -> dict[str, Any]:
    """The released preprocessing of pictures or of sounds: contents of ``preprocessor_config.json``, or nothing."""
    within = {"vision": "image_processor", "audio": "feature_extractor"}[sense]
    for name in ("preprocessor_config.json", "processor_config.json"):
        found = file_of(path, name)
        if found is not None:
            settings = read_mapping(found)
            return dict(settings.get(within) or settings)
    return {}


def weights_of(path: str, *, pickles: bool = False) -> dict[str, Stored]:
    """Every tensor of a folder's weights, none of them read yet.

    Args:
        path: A local folder, or a hub name.
        pickles: Also take PyTorch's own format, where there is no safetensors.

    Raises:
        ConfigError: It has no weights, or only such as were not allowed.
        WeightsError: A file is missing or damaged.
    """
    safe = _shards(path, SAFE)
    if safe:
        return read_files(safe)
    pickled = _shards(path, PICKLED)
    if pickled and not pickles:
        raise ConfigError(
            f"{path}: has its weights in {pickled[0].name}, a format that can hold programs, and only safetensors is "
            "read unasked. Add --pickles to read it all the same (tensors alone, nothing is run)"
        )
    if pickled:
        return read_pickles(pickled)
    raise ConfigError(
        f"{path}: has no weights (neither {SAFE} nor {SAFE}.index.json). Give the folder of a whole checkpoint"
    )


def _shards(path: str, name: str) -> list[Path]:
    """The files that hold the weights: one, or those that an index names."""
    index = file_of(path, f"{name}.index.json")
    if index is None:
        single = file_of(path, name)
        return [] if single is None else [single]
    try:
        names = sorted(set(dict(json.loads(index.read_text())["weight_map"]).values()))
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{index}: is not an index of weights ({type(error).__name__}: {error}). Copy or download it again"
        ) from None
    found = [(shard, None if Path(shard).name != shard else file_of(path, shard)) for shard in map(str, names)]
    missing = [shard for shard, file in found if file is None]
    if missing:
        raise WeightsError(
            f"{path}: the index names {len(missing)} files that are not there ({', '.join(missing[:5])}). "
            "Copy or download the folder again"
        )
    return [file for _, file in found if file is not None]
