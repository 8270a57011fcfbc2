"""Rows of Parquet and Arrow files: Hugging Face datasets on the disk, and tables of one's own.

Arrow files are mapped into memory. Parquet is compressed in groups of rows: a group is read for a row of it, and the
last few are kept. No medium is read while the rows are looked through, and none is decoded here.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from avlm.config.data import DataConfig
from avlm.data.forms.fields import Field
from avlm.data.forms.folders import folders_of
from avlm.data.forms.parse import recognise
from avlm.data.readers.taking import Parser, Progress, Reshape, Ticker, shares
from avlm.data.rownumbers import Columns
from avlm.data.rows import RowTable, facts_of
from avlm.errors import ConfigError, DataError, MissingExtraError
from avlm.samples import MediaItem, MediaKind, Sample

if TYPE_CHECKING:
    import pyarrow as pa

ENDINGS = (".parquet", ".arrow")
KEPT = 2
"""Groups of rows that stay decoded."""
_FEATURES: dict[str, MediaKind] = {"Image": "image", "Audio": "audio", "Video": "video"}
"""What Hugging Face's `datasets` calls columns of media."""
_SCAN_ROWS = 1024


class Tables:
    """The rows of some Parquet or Arrow files of the same columns.

    Args:
        files: In order.
        data: Where media lie that rows name by path, and which share of each set is read.
        name: What to call it.
        columns: What the rows' columns are called, where they have other names.
        reshape: Makes another form of a row first.
        progress: Called with rows done and in all, where that takes longer than two seconds.

    Raises:
        ConfigError: A file is missing or damaged, or no row can be read.
        MissingExtraError: Without pyarrow.
    """

    def __init__(
        self,
        files: Sequence[Path],
        data: DataConfig | None = None,
        *,
        name: str = "",
        columns: Mapping[str, Field] | None = None,
        reshape: Reshape | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.files = list(files)
        self.name = name or self.files[0].name
        self.parser = Parser(folders_of(self.files[0], data or DataConfig()), columns, reshape)
        self.roots = tuple(dict.fromkeys([*(path.parent for path in self.files), self.parser.folders.base]))
        self.facts = RowTable()
        self.errors: list[DataError] = []
        self._places = Columns(group="i", row="i", number="q")
        """Of each row its group, its place in that, and its number in its file, from 1."""
        self._groups = [group for number, file in enumerate(self.files) for group in _groups_in(file, number)]
        self._open: OrderedDict[int, pa.Table] = OrderedDict()
        self._media = _media_columns(self.files[0]) | _media_named(columns or {})
        self._scan(progress)
        if not self.facts:
            first = f" The first row: {self.errors[0].reason}" if self.errors else " It is empty."
            raise ConfigError(f"{self.name}: has no row that can be read, so there is nothing to learn from.{first}")
        self.kind = (
            f"{len(files)} {self.files[0].suffix[1:]} file{'' if len(files) == 1 else 's'} of {self.parser.form}"
        )
        kept = shares(self.facts, self.parser.folders)
        if kept is not None:
            self.facts, self._places = self.facts.kept(kept), self._places.kept(kept)

    def _scan(self, progress: Progress | None) -> None:
        digest = hashlib.sha256()
        ticker = Ticker(progress, sum(group.rows for group in self._groups))
        done = 0
        for number, group in enumerate(self._groups):
            for first, rows in _without_media(self.files[group.file], group):
                for i, row in enumerate(rows, first):
                    digest.update(repr(row).encode(errors="backslashreplace"))
                    self._take(number, i, group.before + i + 1, row)
                    ticker.at(done + i)
            done += group.rows
        ticker.end()
        self._digest = digest.hexdigest()

    def _take(self, group: int, row: int, number: int, values: dict[str, Any]) -> None:
        try:
            sample, name = self._parse(values, self._where(group, number))
        except DataError as error:
            self.errors.append(error)
            return
        self.facts.append(facts_of(sample, name))
        self._places.append(group, row, number)

    def _parse(self, row: dict[str, Any], where: str) -> tuple[Sample, str]:
        for column, kind in self._media.items():
            if column in row:
                row[column] = _media(row[column], kind)
        if self.parser.columns:
            return self.parser.parse(row, where)
        return self.parser.parse(_lists_of_media(row, self._media, self.parser.reshape), where)

    def _where(self, group: int, number: int) -> str:
        return f"{self.files[self._groups[group].file].name} row {number}"

    def __len__(self) -> int:
        return len(self.facts)

    def __getitem__(self, index: int) -> Sample:
        """The sample of one row; media that the table holds are its bytes.

        Raises:
            DataError: The row has changed.
            ConfigError: Its file is not there any more.
        """
        group, row, number = self._places.row(index)
        (values,) = self._table(group).slice(row, 1).to_pylist()
        return self._parse(values, self._where(group, number))[0]

    def _table(self, number: int) -> pa.Table:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        group = self._groups[number]
        table = self._open[number] = group.read(self.files[group.file])
        while len(self._open) > KEPT:
            self._open.popitem(last=False)
        return table

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def where(self, index: int) -> str:
        """The file and the number of a row."""
        group, _, number = self._places.row(index)
        return self._where(group, number)

    def fingerprint(self) -> str:
        """A digest of all that the rows hold beside their media, and of which media there are."""
        return self._digest

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}


class Group:
    """Rows that are read together.

    Attributes:
        file: Number of their file.
        number: Of the group in its file.
        before: Rows of the file before it.
        rows: How many it has.
    """

    def __init__(self, file: int, number: int, before: int, rows: int) -> None:
        self.file, self.number, self.before, self.rows = file, number, before, rows

    def read(self, path: Path, columns: list[str] | None = None) -> pa.Table:
        """Its rows, or some of their columns.

        Raises:
            ConfigError: The file cannot be read.
        """
        with reading(path):
            if path.suffix != ".parquet":
                return _arrow_table(path)
            from pyarrow import parquet

            with parquet.ParquetFile(path) as file:
                return file.read_row_group(self.number, columns=columns)


class reading:  # noqa: N801 (used as a context)
    """What pyarrow raises about a file, as one message about it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        try:
            import pyarrow  # noqa: F401
        except ModuleNotFoundError:
            raise MissingExtraError("pyarrow", "datasets", f"Reading {self.path.name}") from None

    def __exit__(self, kind: Any, error: BaseException | None, _: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, (ConfigError, DataError, MissingExtraError)):
            number = error.errno if isinstance(error, OSError) else None
            detail = type(error).__name__ if number is None else os.strerror(number)
            raise ConfigError(
                f"{self.path}: not readable as {self.path.suffix[1:]} ({detail}). Copy or write the file again"
            ) from None


def _groups_in(path: Path, file: int) -> list[Group]:
    with reading(path):
        if path.suffix != ".parquet":
            return [Group(file, 0, 0, _arrow_table(path).num_rows)]
        from pyarrow import parquet

        with parquet.ParquetFile(path) as opened:
            counts = [opened.metadata.row_group(i).num_rows for i in range(opened.num_row_groups)]
        before = np.cumsum([0, *counts])
        return [Group(file, i, int(before[i]), count) for i, count in enumerate(counts)]


def _arrow_table(path: Path) -> pa.Table:
    """An Arrow file of either kind, mapped: nothing is read before it is looked at."""
    import pyarrow as pa

    mapped = pa.memory_map(str(path))
    try:
        return pa.ipc.open_stream(mapped).read_all()  # as `datasets` writes them
    except pa.ArrowInvalid:
        mapped.seek(0)
        return pa.ipc.open_file(mapped).read_all()


def _media_columns(path: Path) -> dict[str, MediaKind]:
    """Columns that `datasets` says are media, and columns of bytes with a path under a medium's name."""
    with reading(path):
        if path.suffix == ".parquet":
            from pyarrow import parquet

            schema = parquet.read_schema(path)
        else:
            schema = _arrow_table(path).schema
    told = _told_features(schema)
    found = {name: kind for name in schema.names if (kind := _kind_of_feature(told.get(name))) is not None}
    for name in schema.names:
        singular = name.removesuffix("s")
        if singular in _FEATURES.values() and _holds_bytes(schema.field(name).type):
            found.setdefault(name, singular)
    return found


def _media_named(columns: Mapping[str, Field]) -> dict[str, MediaKind]:
    """Columns that the user says are media."""
    kinds = {name: kind for kind in _FEATURES.values() for name in (kind, f"{kind}s")}
    return {first: kinds[name] for name, field in columns.items() if name in kinds for first in field.first()}


def _told_features(schema: Any) -> dict[str, Any]:
    try:
        told = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    return told if isinstance(told, dict) else {}


def _kind_of_feature(feature: Any) -> MediaKind | None:
    """The kind of a column of `datasets`, or of what its lists hold."""
    while isinstance(feature, (list, dict)):
        if isinstance(feature, list):
            feature = feature[0] if feature else None
        elif feature.get("_type") in _FEATURES:
            return _FEATURES[feature["_type"]]
        else:
            feature = feature.get("feature")
    return None


def _holds_bytes(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _holds_bytes(kind.value_type)
    if pa.types.is_struct(kind):
        return any(_is_bytes(kind.field(i).type) for i in range(kind.num_fields))
    return bool(_is_bytes(kind))


def _is_bytes(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


# ---------------------------------------------------------------- looking through without media


def _without_media(path: Path, group: Group) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """The rows of a group, some at a time with the number of the first; bytes are only there or not."""
    with reading(path):
        unread: list[str] = []
        if path.suffix == ".parquet":
            read, unread = _texts_of(path, group.number)
            table = group.read(path, read)
        else:
            table = group.read(path)
        for first in range(0, group.rows, _SCAN_ROWS):
            part = table.slice(first, _SCAN_ROWS)
            count = min(_SCAN_ROWS, group.rows - first)
            columns = {name: _slim(part.column(name).combine_chunks()).to_pylist() for name in part.column_names}
            columns |= {name: [True] * count for name in unread}
            yield first, [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _texts_of(path: Path, group: int) -> tuple[list[str], list[str]]:
    """What of a Parquet file is read to know its rows: all but bytes that are there for certain.

    Returns:
        The columns that are read, and the columns of bytes that are not, as no row of the group is without them.
    """
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        leaves = [file.schema.column(i) for i in range(len(file.schema))]
        chunks = [file.metadata.row_group(group).column(i) for i in range(len(leaves))]
    raw = {leaf.path for leaf in leaves if _is_raw(leaf)}
    beside = {leaf.path.rpartition(".")[0] for leaf in leaves if leaf.path not in raw}
    unread = {path for path in raw if path.rpartition(".")[0] in beside and "." in path}
    alone = [
        chunk.path_in_schema
        for chunk in chunks
        if chunk.path_in_schema in raw
        and "." not in chunk.path_in_schema
        and chunk.statistics is not None
        and chunk.statistics.has_null_count
        and chunk.statistics.null_count == 0
    ]
    return [leaf.path for leaf in leaves if leaf.path not in unread and leaf.path not in alone], alone


def _is_raw(leaf: Any) -> bool:
    return leaf.physical_type == "BYTE_ARRAY" and str(leaf.logical_type.type) not in ("STRING", "JSON", "ENUM")


def _slim(values: Any) -> Any:
    """An array in which bytes are only there or not, so that they are not copied."""
    import pyarrow as pa

    kind = values.type
    if _is_bytes(kind):
        return values.is_valid()
    if pa.types.is_struct(kind):
        fields = [_slim(values.field(i)) for i in range(kind.num_fields)]
        names = [kind.field(i).name for i in range(kind.num_fields)]
        made = pa.StructArray.from_arrays(fields, names, mask=values.is_null()) if names else values
        return made
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        if not _holds_bytes(kind.value_type):
            return values
        inner = _slim(values.flatten())
        lengths = np.asarray(values.value_lengths().fill_null(0))
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        whole = pa.ListArray.from_arrays(pa.array(offsets), inner)
        return pa.array(
            [one if valid else None for one, valid in zip(whole.to_pylist(), values.is_valid().to_pylist())]
        )
    return values


def _media(value: Any, kind: MediaKind) -> Any:
    """A column's medium or media; those whose bytes were not read stand for themselves, empty."""
    if isinstance(value, list):
        return [_media(one, kind) for one in value]
    if isinstance(value, bool):
        return MediaItem(kind, data=b"") if value else None
    if isinstance(value, dict):
        held = value.get("bytes")
        if held is True or ("bytes" not in value and not isinstance(value.get("path"), str)):
            return MediaItem(kind, data=b"")
        if held is False:
            return {**value, "bytes": None}
    return value


def _lists_of_media(row: dict[str, Any], media: Mapping[str, MediaKind], reshape: Reshape | None) -> dict[str, Any]:
    """A row whose media of other names are listed under their kind, where it is a question or a conversation."""
    named = {name for kind in _FEATURES.values() for name in (kind, f"{kind}s")}
    others = [name for name in media if name not in named and row.get(name) is not None]
    if not others or reshape is not None or recognise(row) is None:
        return row
    row = dict(row)
    for name in others:
        value = row.pop(name)
        row.setdefault(f"{media[name]}s", []).extend(value if isinstance(value, list) else [value])
    return row


_SPLITS = ("train", "validation", "valid", "val", "dev", "test", "eval")


def splits_of(folder: Path) -> dict[str, list[Path]]:
    """The files of each split of a dataset in a folder; empty where its files name none.

    Raises:
        ConfigError: What `save_to_disk` wrote is damaged.
    """
    if (folder / "dataset_dict.json").is_file():
        return {path.parent.name: files_of(path.parent) for path in sorted(folder.glob("*/state.json"))}
    if (folder / "state.json").is_file():
        return {}
    found: dict[str, list[Path]] = {}
    for path in files_of(folder):
        words = [*path.relative_to(folder).parts[:-1], re.split(r"[-._]", path.name)[0]]
        split = next((word for word in words if word in _SPLITS), None)
        if split is None:
            return {}
        found.setdefault(split, []).append(path)
    return found


def files_of(folder: Path) -> list[Path]:
    """The files of a dataset in a folder, in order: those that `save_to_disk` wrote, or all Parquet and Arrow files.

    Raises:
        ConfigError: What `save_to_disk` wrote is damaged.
    """
    state = folder / "state.json"
    if not state.is_file():
        found = [sorted(folder.rglob(f"*{ending}")) for ending in ENDINGS]
        return next((files for files in found if files), [])
    try:
        names = [one["filename"] for one in json.loads(state.read_text())["_data_files"]]
        if not all(isinstance(name, str) and name == Path(name).name for name in names):
            raise ValueError("names no files")
    except (ValueError, KeyError, TypeError, OSError):
        raise ConfigError(f"{state}: does not say which files there are. Save the dataset again") from None
    return [folder / name for name in names]
