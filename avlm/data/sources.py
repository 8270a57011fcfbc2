"""Whatever rows can be read from, opened by what is there.

JSON lines, a JSON list        a file                                    `readers.jsonlines`
several of any of these        a pattern with stars                      `readers.joined`
tars of samples (WebDataset)   a tar, a folder, a pattern with braces    `readers.webdataset`
Parquet, Arrow, save_to_disk   a file, a folder                          `readers.tables`
an Energon dataset, a blend    a prepared folder, a metadataset's YAML   `readers.energon`
LLaMA-Factory's lists          dataset_info.json:NAME                    `readers.lists`
a reader of one's own          FILE.py:CLASS, MODULE:CLASS               `readers.own`
"""

from __future__ import annotations

import glob
import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

from avlm.config.data import DataConfig
from avlm.data.forms.fields import Field
from avlm.data.forms.folders import folders_of
from avlm.data.locks import alone
from avlm.data.readers import energon, own, tables
from avlm.data.readers.joined import JoinedSource
from avlm.data.readers.jsonlines import JsonLines
from avlm.data.readers.lists import Listed, is_list_of_sets, listed
from avlm.data.readers.taking import Parser, Progress, Reshape, columns_of
from avlm.data.readers.webdataset import WebDataset, tars_in
from avlm.data.rows import RowSource
from avlm.data.writers import ROWS, write_rows
from avlm.errors import ConfigError, DataError
from avlm.samples import Sample

SPLITS = {"train": ("train",), "eval": ("val", "validation", "eval", "dev", "test")}
"""What the part of a dataset is called that is learned from, and what is held out: the first that is there."""
_CODE = re.compile(r"(?:.*\.py|[A-Za-z_][\w.]*):[A-Za-z_]\w*")
_BINARY = {
    b"\x1f\x8b": "compressed with gzip. Unpack it",
    b"BZh": "compressed with bzip2. Unpack it",
    b"\xfd7zXZ": "compressed with xz. Unpack it",
    b"\x28\xb5\x2f\xfd": "compressed with zstd. Unpack it",
    b"PK\x03\x04": "a zip archive. Unpack it",
}


def open_source(
    path: str | Path,
    data: DataConfig | None = None,
    *,
    use: Literal["train", "eval"] = "train",
    progress: Progress | None = None,
) -> RowSource:
    """The rows of whatever is there; `kind` of what comes says what it was taken for.

    Args:
        path: What the table above says. ``PATH:NAME`` is a part of it: a split, or a data set of a list.
        data: Where media lie, what columns are called, and which share of each set is read.
        use: Which split is meant where none is named.
        progress: Called with what is done and all there is, where that takes longer than two seconds.

    Raises:
        ConfigError: There is nothing, nothing that can be read, or no such part; or no folder of media.
        MissingExtraError: A library that reads such files is not installed.
    """
    data = data or DataConfig()
    if data.folder is not None and not Path(data.folder).exists():
        raise ConfigError(
            f"{data.folder}: there is no such folder, and data.folder names it, so no medium would be found. Correct it"
        )
    columns = columns_of(data)
    found, name = _part(str(path))
    if name is not None and (found.endswith(".py") or not Path(found).exists()):
        return _own(str(path), data, columns, progress)
    try:
        source = _Opening(data, columns, (name,) if name else SPLITS[use], name, progress).open(found)
        if use == "train" and not (isinstance(data.train, (list, tuple)) and len(data.train) > 1):
            _check_columns(source, columns)
        return source
    except OSError as error:  # of a folder that nobody may look into, say
        told = error.strerror or type(error).__name__
        at = "" if error.filename in (None, found) else f" at {error.filename}"
        raise ConfigError(f"{found}: not readable ({told}{at}). Give rows that you may read") from None


def _check_columns(source: RowSource, columns: Mapping[str, Field]) -> None:
    """Refuse a name in `data.columns` that no row has; of several files each may have columns of its own.

    Raises:
        ConfigError: There is one.
    """
    met: set[str] = getattr(getattr(source, "parser", None), "met", set())
    missing = [name for name in columns if name not in met]
    if met and missing:
        raise ConfigError(
            f"{source.name}: no row has {columns[missing[0]].text}, which data.columns.{missing[0]} names, so its rows "
            "would be read without. Correct the name, or leave it out"
        )
    unread = sorted(getattr(getattr(source, "parser", None), "unread", ()))
    if unread:
        name = unread[0]
        warnings.warn(
            f"{source.name}: has {name}, and data.columns names other columns alone, so {name} is not read. "
            f"Add {name}: {name} to data.columns if it is meant",
            stacklevel=3,
        )


def _part(path: str) -> tuple[str, str | None]:
    """A path, and what is named behind its colon."""
    if Path(path).exists():
        return path, None
    before, _, name = path.rpartition(":")
    if before and "/" not in name and (Path(before).exists() or _CODE.fullmatch(path)):
        return before, name
    return path, None


class _Opening:
    """How something is opened.

    Args:
        splits: Names of the split that is wanted, the first that is there.
        name: What the user named behind the colon, if anything.
    """

    def __init__(
        self,
        data: DataConfig,
        columns: Mapping[str, Field],
        splits: tuple[str, ...],
        name: str | None,
        progress: Progress | None,
    ) -> None:
        self.data, self.columns, self.splits, self.name, self.progress = data, columns, splits, name, progress

    def open(self, path: str, reshape: Reshape | None = None) -> RowSource:
        """Open what is there.

        Args:
            reshape: Makes another form of each row first.
        """
        found = Path(path)
        if found.is_dir():
            return self._folder(found, reshape)
        if is_list_of_sets(found):
            return self._listed(listed(found, self.name))
        if energon.is_metadataset(found):
            return self._blend(found)
        self._no_parts(found)
        if not found.exists() and glob.has_magic(path):
            return self._each(path, reshape)
        if ("{" in path and not found.exists()) or found.suffix == ".tar":
            return self._tars(tars_in(path), Path(path).name)
        if found.suffix in tables.ENDINGS:
            return self._tables([found], found.name, reshape)
        _text_only(found)
        return JsonLines(found, self.data, columns=self.columns, reshape=reshape, progress=self.progress)

    def _folder(self, folder: Path, reshape: Reshape | None) -> RowSource:
        if energon.is_prepared(folder):
            split = chosen(energon.splits_of(folder), self.splits, folder)
            return energon.energon_dataset(folder, self.data, split, progress=self.progress)
        if is_list_of_sets(folder / "dataset_info.json"):
            return self._listed(listed(folder / "dataset_info.json", self.name))
        splits = tables.splits_of(folder)
        if splits:
            split = chosen(list(splits), self.splits, folder)
            return self._tables(splits[split], f"{folder.name}:{split}", reshape)
        self._no_parts(folder)
        files = tables.files_of(folder)
        if files:
            return self._tables(files, folder.name, reshape)
        lines = [folder / ROWS] if (folder / ROWS).is_file() else [*folder.glob("*.jsonl"), *folder.glob("*.json")]
        if len(lines) == 1:
            return JsonLines(lines[0], self.data, columns=self.columns, reshape=reshape, progress=self.progress)
        tars = tars_in(str(folder))
        if tars and not lines:
            return self._tars(tars, folder.name)
        what = "no rows in a form that is read"
        if lines:
            what = f"{len(lines)} files of JSON, and one is to be named, or all as {folder}/*{lines[0].suffix}"
        raise ConfigError(
            f"{folder}: is a folder with {what}. Give a file of JSON lines, or a folder with tars, with Parquet or "
            "Arrow files, or of an Energon dataset (docs/data.md)"
        )

    def _each(self, pattern: str, reshape: Reshape | None) -> RowSource:
        """All that a pattern names, in the order of their names."""
        names = sorted(glob.glob(pattern, recursive=True))
        if not names:
            raise ConfigError(f"{pattern}: no file is called like that. Correct the pattern")
        name, tars = Path(pattern).name, [Path(name) for name in names if name.endswith(".tar")]
        if len(tars) == len(names):
            return self._tars(tars, name)
        if len(names) == 1:
            return self.open(names[0], reshape)
        sources = [self.open(each, reshape) for each in names]
        return JoinedSource(sources, name=name, kind=f"{len(names)} files, one behind the other")

    def _no_parts(self, path: Path) -> None:
        if self.name is not None:
            raise ConfigError(f"{path}: has no parts, so there is no {self.name!r} in it. Give the path alone")

    def _tars(self, tars: list[Path], name: str) -> WebDataset:
        return WebDataset(tars, self.data, name=name, columns=self.columns, progress=self.progress)

    def _tables(self, files: list[Path], name: str, reshape: Reshape | None) -> tables.Tables:
        return tables.Tables(files, self.data, name=name, columns=self.columns, reshape=reshape, progress=self.progress)

    def _listed(self, wanted: Listed) -> RowSource:
        folder = self.data.folder or str(wanted.folder)
        inner = _Opening(self.data.model_copy(update={"folder": folder}), {}, SPLITS["train"], None, self.progress)
        if not wanted.path.exists():
            raise ConfigError(
                f"{wanted.path}: there is no such file, and dataset_info.json names it. Correct file_name"
            )
        source = inner.open(str(wanted.path), wanted)
        source.name, source.kind = str(self.name), f"a data set of LLaMA-Factory ({wanted.formatting}): {source.kind}"
        return source

    def _blend(self, path: Path) -> RowSource:
        split = chosen(energon.splits_of(path), self.splits, path)
        leaves, epochs = energon.leaves(path, split)
        leaves = [leaf for leaf in leaves if leaf.weight > 0]  # what weighs nothing is never read
        if not leaves:
            raise ConfigError(f"{path}: every weight of split {split} is 0, so nothing is read. Give one more")
        sources = [self._leaf(leaf) for leaf in leaves]
        weights = [leaf.weight * (len(source) if epochs else 1) for leaf, source in zip(leaves, sources, strict=True)]
        kind = f"an Energon blend of {len(sources)}, split {split}"
        return JoinedSource(sources, weights, name=path.name, kind=kind)

    def _leaf(self, leaf: energon.Leaf) -> RowSource:
        if leaf.path.suffix == ".jsonl":
            media = leaf.media()
            folder = self.data.folder if media is None else str(leaf.path.parent / media)
            data = self.data.model_copy(update={"folder": folder})
            return JsonLines(leaf.path, data, columns=self.columns, progress=self.progress)
        if not energon.is_prepared(leaf.path):
            raise ConfigError(f"{leaf.path}: is no Energon dataset, and a blend names it. Run `energon prepare` on it")
        return energon.energon_dataset(
            leaf.path,
            self.data,
            leaf.split,
            dataset_config=leaf.reference.get("dataset_config"),
            split_config=leaf.reference.get("split_config"),
            subset=leaf.subset,
            progress=self.progress,
        )


def chosen(known: list[str], wanted: tuple[str, ...], path: Path) -> str:
    """The first split that is wanted and there.

    Raises:
        ConfigError: None is.
    """
    for name in wanted:
        if name in known:
            return name
    raise ConfigError(
        f"{path}: has no split {' or '.join(wanted)} (it has {', '.join(known) or 'none'}). "
        f"Write {path}:SPLIT with one of those"
    )


def _text_only(path: Path) -> None:
    """Refuse what cannot be lines of JSON, by its first bytes.

    Raises:
        ConfigError: It cannot.
    """
    if not path.is_file():
        return  # who reads it says so
    with path.open("rb") as file:
        begins = file.read(512)
    if begins.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ConfigError(f"{path}: is text in UTF-16, and rows are read in UTF-8. Write it in UTF-8")
    for start, what in _BINARY.items():
        if begins.startswith(start):
            raise ConfigError(f"{path}: is {what}, and give what is in it")
    if b"\0" in begins:
        raise ConfigError(
            f"{path}: is no text, and its name does not say what it is. Give JSON lines, .tar, .parquet or .arrow "
            "(docs/data.md)"
        )


# ---------------------------------------------------------------- readers of one's own


def _own(text: str, data: DataConfig, columns: Mapping[str, Field], progress: Progress | None) -> RowSource:
    reader = own.made_reader(text, data)
    if hasattr(reader, "__getitem__") and hasattr(reader, "__len__"):
        return own.OwnSource(text, data, columns=columns, reader=reader, progress=progress)
    if not hasattr(reader, "__iter__"):
        raise ConfigError(f"{text}: has neither __getitem__ and __len__ nor __iter__, so it reads nothing. Write them")
    return _spooled(text, reader, data, columns, progress)


def _spooled(
    text: str, reader: Any, data: DataConfig, columns: Mapping[str, Field], progress: Progress | None
) -> RowSource:
    """Rows that come in their order only, written to tars once and read from there.

    Each reader has a folder of its own below `data.spool`. Of several processes one writes, and the others wait for it.
    """
    if data.spool is None:
        raise ConfigError(
            f"{text}: reads rows in their order only, and training reads them in any. Give the reader __len__ and "
            "__getitem__, or a folder that its rows are written to once: data.spool=FOLDER"
        )
    name = text.rpartition(":")[2]
    file = Path(text.rpartition(":")[0])
    where = str(file.resolve()) if file.suffix == ".py" else str(file)
    known_by = repr((where, name, data.folder, data.sets, data.columns))
    folder = Path(data.spool) / f"{name}-{blake2b(known_by.encode(), digest_size=4).hexdigest()}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with alone(folder.with_name(f".{folder.name}.lock")):
        if not (folder / UNREAD).is_file():
            _spool(reader, name, folder, Parser(folders_of(Path("here"), data), columns), progress)
    source = WebDataset(tars_in(str(folder)), data, name=name, progress=progress)
    source.kind = f"a reader of your own ({text}), from {folder}"
    source.errors += [DataError(reason, where=where) for where, reason in json.loads((folder / UNREAD).read_text())]
    return source


UNREAD = "unread.json"
"""Beside the tars: the rows that the reader gave and that could not be read, with what is wrong with each."""


def _spool(reader: Any, name: str, folder: Path, parser: Parser, progress: Progress | None) -> None:
    """Write all rows of a reader; the folder is there when all of them are."""
    shutil.rmtree(folder, ignore_errors=True)  # of one who did not come to its end

    def each() -> Iterator[tuple[Sample, str] | DataError]:
        for number, row in enumerate(own.rows_of(reader, name, parser)):
            if progress is not None and number % 256 == 255:
                progress(number + 1, 0)
            yield row

    bad = write_rows(each(), folder, to="webdataset").bad
    written = folder / f".{UNREAD}"
    written.write_text(json.dumps([(error.where, error.reason) for error in bad]))
    written.replace(folder / UNREAD)


__all__ = ["JoinedSource", "JsonLines", "open_source"]
