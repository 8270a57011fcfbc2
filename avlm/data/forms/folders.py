"""Where the media of a row are: files in folders, members of tars, addresses, or bytes in the row itself."""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from avlm.config.data import DataConfig, DataSet
from avlm.data.forms.tars import Member, TarFolder
from avlm.errors import ConfigError, DataError
from avlm.samples import MediaItem, MediaKind

KINDS: tuple[MediaKind, ...] = ("image", "audio", "video")


@dataclass(frozen=True, slots=True)
class Folders:
    """What the media paths of a row are relative to.

    A folder may be a tar: media are then looked for among its members.
    """

    base: Path = Path()
    sets: Mapping[str, str | DataSet] = field(default_factory=dict)
    tars: Mapping[Path, TarFolder] = field(default_factory=dict)
    """The folders that are tars."""

    def folder(self, kind: MediaKind, name: str) -> Path:
        """The folder of one kind of media of a set; of rows without a set, and sets without a folder, the base."""
        found = self.sets.get(name)
        if found is None or isinstance(found, str):
            return self.base if found is None else Path(found)
        own = (found.sounds or found.folder) if kind == "audio" else found.folder
        return self.base if own is None else Path(own)

    def ratio(self, name: str) -> float:
        """Share of a set's rows that is read."""
        found = self.sets.get(name)
        return found.ratio if isinstance(found, DataSet) else 1.0

    def item(self, kind: MediaKind, path: str, name: str = "", **more: Any) -> MediaItem:
        """A medium by its path, its address, or as a data URL.

        Args:
            name: The set that it is from.
            more: More of a `MediaItem`: its alt, its cut.

        Raises:
            DataError: There can be no such path, or a tar has no such member.
        """
        if path.startswith("data:"):
            return MediaItem(kind, data=decoded(path.partition(",")[2], kind), **more)
        if "://" in path[:32]:
            return self._at(kind, path, **more)
        _possible(path, kind)
        folder = self.folder(kind, name)
        tar = self.tars.get(folder)
        if tar is None or path.startswith("/"):
            return MediaItem(kind, path=folder / path, **more)
        span = tar.span(os.path.normpath(path))
        if span is None:
            cut = f" (it {tar.cut})" if tar.cut else ""
            raise DataError(
                f"the tar {folder.name} has no member {path}{cut}, so there is no such {kind}. "
                "Put it there, or correct the path"
            )
        return MediaItem(kind, path=folder, span=span, title=path, **more)

    def _at(self, kind: MediaKind, url: str, **more: Any) -> MediaItem:
        _possible(url, kind)
        try:
            parts = urlsplit(url)
        except ValueError:
            raise DataError(f"the address of a part of type {kind} is none ({url[:60]}). Correct it") from None
        if parts.scheme != "file":
            return MediaItem(kind, url=url, **more)
        if parts.netloc not in ("", "localhost"):
            raise DataError(
                f"a part of type {kind} is a file of another machine ({url[:60]}), and those are not reached. "
                "Write file:///PATH, or the path alone"
            )
        return MediaItem(kind, path=Path(unquote(parts.path)), **more)


@dataclass(frozen=True, slots=True)
class Beside:
    """Media that lie beside a row in the same tar, and behind those the folders that a row's paths may also mean."""

    tar: Path
    key: str
    """What the members of the sample have in common."""
    members: Mapping[str, Member]
    """By what follows the key's dot."""
    folders: Folders

    def item(self, kind: MediaKind, path: str, name: str = "", **more: Any) -> MediaItem:
        """As `Folders.item`; a path may be the name of a member, or what follows the dot of it."""
        bare = path.removeprefix("./")
        for ending, member in self.members.items():
            if bare.lower() == ending or bare in (member.name, member.name.rpartition("/")[2]):
                return self.medium(kind, member, **more)
        return self.folders.item(kind, path, name, **more)

    def medium(self, kind: MediaKind, member: Member, **more: Any) -> MediaItem:
        """A member as a medium."""
        return MediaItem(kind, path=self.tar, span=(member.offset, member.size), title=member.name, **more)


Whereabouts = Folders | Beside


def folders_of(path: Path, data: DataConfig) -> Folders:
    """The folders of a data file's media.

    Raises:
        ConfigError: One of them is a tar that cannot be read.
    """
    base = path.parent if data.folder is None else Path(data.folder)
    named = [base, *(Path(folder) for given in data.sets.values() for folder in _folders_in(given))]
    tars = {folder: TarFolder(folder) for folder in named if folder.suffix == ".tar" and folder.is_file()}
    missing = [folder for folder in named if folder.suffix == ".tar" and not folder.exists()]
    if missing:
        raise ConfigError(f"{missing[0]}: there is no such tar. Correct data.folder or data.sets")
    return Folders(base, data.sets, tars)


def _folders_in(given: str | DataSet) -> list[str]:
    if isinstance(given, str):
        return [given]
    return [folder for folder in (given.folder, given.sounds) if folder is not None]


def _possible(path: str, kind: str) -> None:
    """Refuse what cannot be a path.

    Raises:
        DataError: It cannot.
    """
    if "\0" in path:
        raise DataError(f"the path of a part of type {kind} holds a zero character. Correct it")
    unbroken(path, "path")


def unbroken(text: str, what: str) -> str:
    """A text that can be written as UTF-8: JSON can hold half of a character, and no tokenizer takes that."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise DataError(f"its {what} holds half of a character ({half}). Write the whole one") from None
    return text


def decoded(text: str, name: str) -> bytes:
    """Bytes that were written as base64.

    Raises:
        DataError: They were not.
    """
    try:
        return base64.b64decode("".join(text.split()), validate=True)  # in lines, as many programs write it
    except (binascii.Error, ValueError):
        raise DataError(f"the data of a part of type {name} are not base64. Encode the file's bytes") from None
