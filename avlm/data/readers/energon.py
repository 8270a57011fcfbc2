"""Datasets of Megatron Energon: its `.nv-meta` says which tars and what their members are; our tar reader reads them.

So they can be read in any order, and without Energon. A metadataset's YAML file is a blend of such datasets.

Source:
    Energon's documentation, "Dataset Formats", "Metadataset" and "Sample Types".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from avlm.config.data import DataConfig
from avlm.data.forms.fields import ABSENT, Field, field_of
from avlm.data.readers.code import function_of
from avlm.data.readers.members import Fields, natural_row
from avlm.data.readers.taking import Progress, columns_of
from avlm.data.readers.types import TYPES
from avlm.data.readers.webdataset import Shape, WebDataset, expanded
from avlm.errors import ConfigError, DataError

META = ".nv-meta"
Taken = Callable[[Path, str, int], bool]


def is_prepared(path: Path) -> bool:
    """Whether a folder is a dataset that `energon prepare` was run on."""
    return any((path / META / name).is_file() for name in (".info.json", ".info.yaml"))


def energon_dataset(
    path: Path,
    data: DataConfig,
    split: str,
    *,
    dataset_config: str | None = None,
    split_config: str | None = None,
    subset: Subset | None = None,
    progress: Progress | None = None,
) -> WebDataset:
    """The samples of one split of a prepared dataset.

    Args:
        split: Such as ``train``.
        dataset_config, split_config: Files of `.nv-meta` to read in place of `dataset.yaml` and `split.yaml`.
        subset: The part of the split that is read.

    Raises:
        ConfigError: A file of `.nv-meta` is missing or wrong, the split is not there, its tars have changed since it
            was prepared, or its samples are of a type that nobody knows how to read.
    """
    counts = _counts(path)
    tars, left_out = _split(path, split, split_config, counts)
    config = _yaml(path / META / (dataset_config or "dataset.yaml"))
    total = sum(counts[name] for name in tars)
    taken = _taken(path, left_out, (subset or Subset()).bounds(total))
    made = WebDataset(
        [path / name for name in tars],
        data,
        name=path.name,
        columns=columns_of(data),
        shape=shape_of(path, config, data),
        taken=taken,
        progress=progress,
    )
    for name, count in zip(tars, made.counts, strict=True):
        if count != counts[name] and not any(error.where == Path(name).name for error in made.errors):
            raise ConfigError(
                f"{path / name}: has {count} samples and had {counts[name]} when the dataset was prepared, so what "
                "else .nv-meta says may be old too. Run `energon prepare` again"
            )
    made.kind = f"Energon's {_type_name(config)}, split {split}"
    return made


# ---------------------------------------------------------------- .nv-meta


def splits_of(path: Path) -> list[str]:
    """The splits of a prepared dataset, or of a metadataset's file.

    Raises:
        ConfigError: The file that says so is missing or wrong.
    """
    if path.is_file():
        found = _yaml(path).get("splits")
    else:
        file = path / META / "split.yaml"
        found = _yaml(file if file.is_file() else file.with_suffix(".json")).get("split_parts")
    return [str(name) for name in found] if isinstance(found, dict) else []


def _counts(path: Path) -> dict[str, int]:
    folder = path / META
    info = _yaml(folder / ".info.json" if (folder / ".info.json").is_file() else folder / ".info.yaml")
    counts = info.get("shard_counts")
    if not isinstance(counts, dict) or not all(isinstance(count, int) for count in counts.values()):
        raise ConfigError(f"{folder}: .info.json has no shard_counts. Run `energon prepare` again")
    return counts


def _split(
    path: Path, split: str, split_config: str | None, counts: Mapping[str, int]
) -> tuple[list[str], frozenset[str]]:
    """The tars of a split, and what of them is left out: samples as ``TAR/KEY``."""
    file = path / META / (split_config or "split.yaml")
    if split_config is None and not file.is_file():
        file = path / META / "split.json"
    found = _yaml(file)
    parts = found.get("split_parts")
    if not isinstance(parts, dict) or not isinstance(parts.get(split), list):
        known = ", ".join(parts) if isinstance(parts, dict) else "none"
        raise ConfigError(f"{path}: has no split {split!r} (it has {known}). Write {path}:SPLIT with one of those")
    excluded = frozenset(name for given in found.get("exclude") or [] for name in expanded(str(given)))
    tars = [name for given in parts[split] for name in expanded(str(given)) if name not in excluded]
    if not tars:
        raise ConfigError(
            f"{path}: its split {split!r} has no tar, as Energon splits by tar. Prepare it again with another ratio, "
            "or write smaller tars"
        )
    unknown = [name for name in tars if name not in counts]
    if unknown:
        raise ConfigError(f"{path}: {unknown[0]} is of the split and was not prepared. Run `energon prepare` again")
    return tars, frozenset(name for name in excluded if "/" in name)


def _taken(path: Path, left_out: frozenset[str], bounds: tuple[int, int]) -> Taken | None:
    def taken(tar: Path, key: str, number: int) -> bool:
        within = bounds[0] <= number < bounds[1]
        return within and f"{tar.relative_to(path).as_posix()}/{key}" not in left_out

    return taken


def _yaml(file: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: not readable ({error.strerror}). Run `energon prepare` again") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{file}: is not YAML ({str(error).splitlines()[0]}). Correct it") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{file}: holds no settings. Run `energon prepare` again")
    return found


# ---------------------------------------------------------------- what a sample is


def _type_name(config: Mapping[str, Any]) -> str:
    given = config.get("sample_type")
    name = given.get("__class__") if isinstance(given, dict) else config.get("__class__")
    return str(name or "CrudeWebdataset")


def shape_of(path: Path, config: Mapping[str, Any], data: DataConfig) -> Shape:
    """What makes a row of a sample of some type.

    Raises:
        ConfigError: Nobody knows what to make of the type, its field map is wrong, or it needs Python that lies in the
            dataset and was not allowed.
    """
    name = _type_name(config)
    if name == "CrudeWebdataset":
        return natural_row
    known = TYPES.get(name.removesuffix("Webdataset").removesuffix("Sample"))
    if known is None and not data.columns:
        raise ConfigError(
            f"{path}: its samples are of type {name}, and it is not known what they ask and answer. Say with "
            "data.columns what its members are, or write a reader of your own (docs/data.md)"
        )
    make: Callable[[Mapping[str, Any]], dict[str, Any]] = known or dict
    field_map, loader = config.get("field_map"), config.get("sample_loader")
    if isinstance(field_map, dict):
        fields = {str(key): field_of(str(text), f"{path}: field_map.{key}") for key, text in field_map.items()}
        return partial(_by_fields, fields=fields, make=make)
    if isinstance(loader, str):
        return partial(_by_loader, loader=function_of(loader, path / META, data), make=make)
    raise ConfigError(f"{path}: dataset.yaml has neither field_map nor sample_loader. Run `energon prepare` again")


def _by_fields(given: Fields, fields: Mapping[str, Field], make: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    values = {}
    for name, field in fields.items():
        value = field.of(given)
        if value is ABSENT:
            raise DataError(f"has no {field.text}, which is its {name}: it has {', '.join(given)}. Correct field_map")
        values[name] = value
    return make(values)


def _by_loader(given: Fields, loader: Callable[..., Any], make: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """What the dataset's own Python makes of a sample; media are passed through it undecoded."""
    try:
        values = loader({"__key__": given.beside.key, **given})
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"its sample_loader raised {type(error).__name__} ({error}). It gets texts and JSON decoded and media as "
            "they are; one that changes pixels needs a reader of your own (docs/data.md)"
        ) from None
    if not isinstance(values, dict):
        raise DataError(f"its sample_loader gives {type(values).__name__} and not a dict. Correct it")
    return make(values)


# ---------------------------------------------------------------- blends


class Subset:
    """A part of a dataset: numbers of samples first, then shares of what is left.

    Args:
        numbers: First sample, and the one behind the last; None is the end.
        shares: The same as shares from 0 to 1.
    """

    def __init__(self, numbers: tuple[int, int | None] = (0, None), shares: tuple[float, float] = (0.0, 1.0)) -> None:
        self.numbers, self.shares = numbers, shares

    def bounds(self, total: int) -> tuple[int, int]:
        """First sample and the one behind the last, of so many."""
        start, end = self.numbers[0], total if self.numbers[1] is None else min(self.numbers[1], total)
        room = max(0, end - start)
        return start + int(room * self.shares[0]), start + int(room * self.shares[1])

    def within(self, outer: Subset) -> Subset:
        """This part, of which an outer one takes its share."""
        width = self.shares[1] - self.shares[0]
        first, last = (self.shares[0] + share * width for share in outer.shares)
        return Subset(self.numbers, (first, last))


class Leaf:
    """A dataset of a blend: how it is opened and how much it weighs.

    Attributes:
        weight: Its share of the samples, or, where the blend counts epochs, how often it is gone through.
    """

    def __init__(self, path: Path, split: str, weight: float, subset: Subset, reference: Mapping[str, Any]) -> None:
        self.path, self.split, self.weight, self.subset, self.reference = path, split, weight, subset, reference

    def media(self) -> str | None:
        """The folder of its media, where the blend names one beside it (`aux`)."""
        aux = self.reference.get("aux")
        folders = [str(value) for value in aux.values()] if isinstance(aux, dict) else []
        found = [folder.removeprefix("filesystem://") for folder in folders if folder.startswith("filesystem://")]
        return found[0] if len(found) == 1 else None


def is_metadataset(path: Path) -> bool:
    """Whether a YAML file is a blend of Energon datasets."""
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        return False
    found = _yaml(path)
    return "splits" in found or str(found.get("__class__", "")).startswith("Metadataset")


def leaves(path: Path, split: str, depth: int = 0) -> tuple[list[Leaf], bool]:
    """The datasets of a blend, those of blends in it too.

    Returns:
        The datasets, and whether their weights are numbers of epochs.

    Raises:
        ConfigError: The file is no metadataset, joins datasets, or mixes the two ways of blending.
    """
    if depth > 20:
        raise ConfigError(f"{path}: is a blend that holds itself. Correct its paths")
    splits = _yaml(path).get("splits")
    given = splits.get(split) if isinstance(splits, dict) else None
    if not isinstance(given, dict):
        known = ", ".join(map(str, splits)) if isinstance(splits, dict) else "none"
        raise ConfigError(f"{path}: has no split {split!r} (it has {known}). Write {path}:SPLIT with one of those")
    epochs = "blend_epochized" in given
    listed = next((given[key] for key in ("blend", "blend_epochized", "datasets") if key in given), [given])
    if not isinstance(listed, list) or not listed or not all(isinstance(one, dict) for one in listed):
        raise ConfigError(f"{path}: splits.{split} lists no datasets. Give each a path and a weight")
    outer = _subset(given, path) if listed != [given] else Subset()
    total = 1.0 if epochs else sum(_weight(one, "weight", path) for one in listed)
    if not 0 < total < float("inf"):
        raise ConfigError(f"{path}: the weights of splits.{split} add up to {total:g}. Give one a weight above 0")
    found: list[Leaf] = []
    for one in listed:
        weight = _weight(one, "repetitions" if epochs else "weight", path) / total
        inner, counted = _reference(path, one, split, outer, depth)
        if len(inner) > 1 and counted != epochs:
            raise ConfigError(
                f"{path}: blends by {'epochs' if epochs else 'weight'}, and {one.get('path')} in it the other way. "
                "Use one way in both"
            )
        found += [Leaf(leaf.path, leaf.split, weight * leaf.weight, leaf.subset, leaf.reference) for leaf in inner]
    return found, epochs


def _reference(path: Path, one: Mapping[str, Any], split: str, outer: Subset, depth: int) -> tuple[list[Leaf], bool]:
    if "join" in one:
        raise ConfigError(
            f"{path}: joins datasets, which Python of yours decides how to. Join them once into one dataset, or write "
            "a reader of your own (docs/data.md)"
        )
    if not isinstance(one.get("path"), str):
        raise ConfigError(f"{path}: a dataset of splits.{split} has no path. Give the folder of each")
    target = path.parent / one["path"]
    part, subset = str(one.get("split_part") or split), _subset(one, path).within(outer)
    if is_metadataset(target):
        inner, epochs = leaves(target, part, depth + 1)
        for leaf in inner:
            leaf.subset = leaf.subset.within(subset)
        return inner, epochs
    return [Leaf(target, part, 1.0, subset, one)], False


def _weight(one: Mapping[str, Any], key: str, path: Path) -> float:
    value = one.get(key, 1.0)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise ConfigError(f"{path}: {one.get('path')} has {key}={json.dumps(value, default=repr)}. Give a number")
    return float(value)


def _subset(given: Mapping[str, Any], path: Path) -> Subset:
    told = given.get("subset")
    if told is None:
        return Subset()
    bounds = told.get("range") if isinstance(told, dict) else None
    if isinstance(bounds, list) and len(bounds) == 2:
        first, last = bounds
        if isinstance(first, int) and (isinstance(last, int) or last == "end"):
            return Subset((first, None if last == "end" else last))
        shares = [str(bound).strip() for bound in bounds]
        if all(share.endswith("%") and share[:-1].replace(".", "", 1).isdecimal() for share in shares):
            return Subset(shares=(float(shares[0][:-1]) / 100, float(shares[1][:-1]) / 100))
    raise ConfigError(f"{path}: a subset is {json.dumps(told, default=repr)}. Write range: [25%, 75%] or [100, end]")
