"""Where media may come from: files in the folders that are open to a run, and URLs that may be fetched.

A path in a row is a stranger's word. What it leads to is asked of the file that was opened, so no link can be laid in
between the check and the reading.
"""

from __future__ import annotations

import io
import os
import stat
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from avlm.config.data import DataConfig, DataSet
from avlm.data.fetching.fetch import Fetcher
from avlm.data.fetching.urls import NotFetchedError, data_url_bytes, is_data_url
from avlm.errors import MediaError
from avlm.samples import MediaItem

_READ = os.O_RDONLY
for _flag in ("O_BINARY", "O_CLOEXEC", "O_NOCTTY", "O_NONBLOCK"):  # a pipe that took the file's place is not waited for
    _READ |= getattr(os, _flag, 0)


@dataclass(frozen=True, slots=True)
class Doors:
    """Where media may come from."""

    roots: tuple[str, ...] | None = None
    """Folders that files may lie in, as `roots_of` writes them; None: anywhere."""
    fetcher: Fetcher | None = None
    """What fetches URLs; None: nothing is fetched."""

    def opened(self, item: MediaItem) -> BinaryIO:
        """An item's file, or what is at its URL.

        Raises:
            MediaError: There is none, it may not be read, or it is no file.
        """
        if item.path is not None:
            return open_file(item.path, self.roots, item)
        if is_data_url(item.url):
            try:
                return io.BytesIO(data_url_bytes(item.url))
            except NotFetchedError as error:
                raise MediaError(f"{item.name()}: {error.reason}") from None
        if self.fetcher is None:
            raise MediaError(
                f"{item.name()}: is a URL, and nothing is fetched unless that is allowed. "
                "Download the file and give its path, or allow its host (data.fetch.hosts)"
            )
        return self.fetcher.open(item)


ANYWHERE = Doors()
"""Any file and no URL: for a person who names files of his own."""


def doors_of(data: DataConfig, files: Iterable[str | Path]) -> Doors:
    """Where the media of a run may come from.

    Args:
        data: Settings of the run's data.
        files: The data files that it reads, folders of them, or patterns; their own folders are open.

    Raises:
        MissingExtraError: A scheme may be fetched whose library is not installed.
    """
    folders = [_folder(Path(file)) for file in files]
    folders += [Path(folder) for folder in (data.folder, *data.roots) if folder is not None]
    for found in data.sets.values():
        given = (found.folder, found.sounds) if isinstance(found, DataSet) else (found,)
        folders += [Path(folder) for folder in given if folder is not None]
    return Doors(roots_of(folders), None if data.fetch is None else Fetcher(data.fetch))


def _folder(file: Path) -> Path:
    """A folder itself, the folder of a file, and of a pattern the one above its first star."""
    starred = next((i for i, part in enumerate(file.parts) if set(part) & set("*?[{")), None)
    if starred is not None and not file.exists():
        return Path(*file.parts[:starred])
    return file if file.is_dir() else file.parent


def roots_of(folders: Iterable[str | Path]) -> tuple[str, ...]:
    """Folders as they are compared: whole, and without links."""
    return tuple(dict.fromkeys(os.path.realpath(folder) for folder in folders))


def open_file(path: Path, roots: tuple[str, ...] | None, item: MediaItem) -> BinaryIO:
    """Open a file, if it is one and lies where files may be read from.

    Raises:
        MediaError: It is none, or lies elsewhere.
    """
    try:
        if roots is not None:
            _check_place(os.path.realpath(path), path, roots)  # before it is opened: opening a device can do harm
        number = os.open(path, _READ) if stat.S_ISREG(path.stat().st_mode) else None
    except PermissionError:
        raise MediaError(f"{path}: may not be read by you. Change its permissions") from None
    except OSError:
        raise MediaError(f"{path}: there is no such file. Check the path; it is relative to the data file") from None
    if number is None:
        raise _no_file(path, item)
    # By number, so that it has no name: FFmpeg would choose its reader by the ending and not by what is in the file.
    file = os.fdopen(number, "rb")
    try:
        if not stat.S_ISREG(os.fstat(number).st_mode):
            raise _no_file(path, item)
        if roots is not None:
            _check_place(_place_of(number, path), path, roots)
        return file
    except BaseException:
        file.close()
        raise


def _place_of(number: int, path: Path) -> str:
    """Where an open file lies, by the system's word for it; where that has none, by its path once more."""
    try:
        if sys.platform == "darwin":
            import fcntl

            return os.fsdecode(fcntl.fcntl(number, fcntl.F_GETPATH, bytes(1024)).rstrip(b"\0"))
        return os.readlink(f"/proc/self/fd/{number}")
    except OSError:
        place = os.path.realpath(path)
    same = os.path.samestat(os.fstat(number), os.lstat(place))
    return place if same else ""


def _check_place(place: str, path: Path, roots: tuple[str, ...]) -> None:
    if any(place == root or place.startswith(root.rstrip(os.sep) + os.sep) for root in roots):
        return
    given = os.path.abspath(path)
    inside = any(given.startswith(root.rstrip(os.sep) + os.sep) for root in roots)
    how = f"leads to {place}, outside of" if inside and place else "is not in"
    folder = os.path.dirname(place or given)
    raise MediaError(
        f"{path}: {how} the folders that media are read from ({', '.join(roots) or 'none'}). "
        f"If its own may be read too, add it: data.roots=[{folder}] (avlm eval: --root {folder})"
    )


def _no_file(path: Path, item: MediaItem) -> MediaError:
    return MediaError(f"{path}: is not a regular file. Give the path of {article(item.kind)}")


def article(kind: str) -> str:
    """A kind of medium, in a sentence."""
    return {"image": "a picture", "audio": "a recording", "video": "a video"}[kind]
