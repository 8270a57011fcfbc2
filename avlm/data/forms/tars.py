"""What is in a tar, read off its headers alone: where each member's bytes lie, so that they can be read in any order.

Names longer than a header holds are understood in both ways that they are written (GNU's and POSIX's).

Source:
    POSIX.1-2017, pax, "ustar Interchange Format" and "pax Interchange Format"; GNU tar's manual, "Basic Tar Format".
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from avlm.data.rownumbers import Columns
from avlm.errors import ConfigError, DataError

BLOCK = 512
_WINDOW = 16 * 2**10
"""Bytes that are read at once: a header, and what is small behind it."""
_LONGEST_NAME = 2**20
"""Of the records before a header; what claims to be longer is damage."""
_FILES = b"0\x007"
_NO_FILES = b"123456"
"""Links, devices, folders and pipes: members without bytes of their own."""


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a tar."""

    name: str
    begins: int
    """Where its first header lies."""
    offset: int
    """Where its bytes lie."""
    size: int

    @property
    def ends(self) -> int:
        """Where the next member's header may begin."""
        return self.offset + -(-self.size // BLOCK) * BLOCK


class CutError(DataError):
    """A tar ends, or stops being one, before its end."""

    def __init__(self, message: str, *, where: str = "", name: str = "") -> None:
        super().__init__(message, where=where)
        self.name = name
        """Of the member that is not whole, where its header is."""


class Tar:
    """A tar as a file to read parts of.

    Raises:
        ConfigError: It cannot be opened, is no regular file, or is compressed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
                raise ConfigError(f"{path}: is not a regular file. Give a tar")
            self._number = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise ConfigError(f"{path}: not readable ({error.strerror}). Give an existing tar") from None
        self.size = os.fstat(self._number).st_size
        self._window, self._at = b"", 0
        if self.read(0, 3)[:3] in (b"\x1f\x8b\x08", b"BZh", b"\xfd7z", b"\x28\xb5\x2f"):
            self.close()
            raise ConfigError(
                f"{path}: is a compressed tar, in which nothing can be read without reading all before it. Unpack it "
                "to a plain .tar (media are compressed already)"
            )

    def close(self) -> None:
        os.close(self._number)

    def __enter__(self) -> Tar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, offset: int, count: int) -> bytes:
        """Bytes of the file; fewer where it ends."""
        if not (self._at <= offset and offset + count <= self._at + len(self._window)):
            self._window, self._at = os.pread(self._number, max(count, _WINDOW), offset), offset
        start = offset - self._at
        return self._window[start : start + count]

    def members(self, start: int = 0, stop: int | None = None) -> Iterator[Member]:
        """Its files from a header on, in order; folders and links are left out.

        Raises:
            CutError: It is truncated or damaged. What was whole has come before.
        """
        at = begins = start
        name, size = "", -1
        while at < (self.size if stop is None else stop):
            header = self.read(at, BLOCK)
            if len(header) < BLOCK:
                raise self._cut(at)
            if not any(header):
                return
            kind, length = header[156], self._size_in(header, at)
            if kind in b"LxKg":
                if length > _LONGEST_NAME:
                    raise self._damaged(at)
                record = self.read(at + BLOCK, length)
                if len(record) < length:
                    raise self._cut(at)
                if kind == ord("L"):
                    name = _text(record.split(b"\0", 1)[0])
                elif kind == ord("x"):
                    path, bytes_in = _pax(record)
                    name, size = path or name, size if bytes_in is None else bytes_in
                at += BLOCK + -(-length // BLOCK) * BLOCK
                continue
            member = Member(
                name or _name_in(header), begins, at + BLOCK, 0 if kind in _NO_FILES else length if size < 0 else size
            )
            name, size = "", -1
            if member.offset + member.size > self.size:
                raise self._cut(at, member.name)
            at = begins = member.ends
            if kind in _FILES and not member.name.endswith("/"):
                yield member
        if stop is None and at > self.size:
            raise self._cut(self.size)

    def _size_in(self, header: bytes, at: int) -> int:
        """The size that a header tells, if it is one: its sum must be right."""
        try:
            told = int(header[148:156].rstrip(b" \0") or b"0", 8)
            if told != sum(header) - sum(header[148:156]) + 256 and told != _signed_sum(header):
                raise ValueError("its sum is another")
            field = header[124:136]
            size = int.from_bytes(field[1:], "big") if field[0] == 0x80 else int(field.strip(b" \0") or b"0", 8)
            if size < 0:
                raise ValueError("less than nothing")
            return size
        except ValueError:
            raise self._damaged(at) from None

    def _cut(self, at: int, name: str = "") -> CutError:
        what = f"in the middle of {name}" if name else f"in the middle of a block, at byte {at}"
        return CutError(
            f"ends {what}, so nothing from there on can be read. Copy or write the tar again",
            where=self.path.name,
            name=name,
        )

    def _damaged(self, at: int) -> CutError:
        return CutError(
            f"has no tar header at byte {at} where one belongs, so nothing from there on can be read. "
            "Copy or write the tar again",
            where=self.path.name,
        )


def _signed_sum(header: bytes) -> int:
    """Some old tars were written with signed bytes."""
    signed = np.frombuffer(header, np.int8).astype(np.int64)
    return int(signed.sum() - signed[148:156].sum()) + 256


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


def _name_in(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    before = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return _text(before + b"/" + name if before else name)


def _pax(record: bytes) -> tuple[str, int | None]:
    """A member's name and size, as far as an extended header tells them."""
    name, size, at = "", None, 0
    while at < len(record):
        length, blank, _ = record[at:].partition(b" ")
        if not (blank and length.isdigit() and int(length) > len(length) + 1):
            break
        entry = record[at + len(length) + 1 : at + int(length) - 1]
        key, _, value = entry.partition(b"=")
        if key == b"path":
            name = _text(value)
        elif key == b"size" and value.isdigit():
            size = int(value)
        at += int(length)
    return name, size


class TarFolder:
    """A tar of media that are asked for by name: 24 bytes for each of its files.

    Raises:
        ConfigError: It cannot be opened, is compressed, or nothing can be read in it.

    Attributes:
        cut: What is wrong with it, where it is truncated or damaged and was read as far as it goes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cut = ""
        found = Columns(key="q", offset="q", size="q")
        with Tar(path) as tar:
            try:
                for member in tar.members():
                    found.append(_key(member.name), member.offset, member.size)
            except CutError as error:
                self.cut = error.reason
        if self.cut and not len(found):
            raise ConfigError(f"{path}: {self.cut}")
        keys, offsets, sizes = found["key"], found["offset"], found["size"]
        order = np.argsort(keys, kind="stable")
        self._keys = keys[order]
        self._columns = Columns.of({"key": self._keys, "offset": offsets[order], "size": sizes[order]})

    def __len__(self) -> int:
        return len(self._columns)

    def span(self, name: str) -> tuple[int, int] | None:
        """First byte and number of bytes of a file; None where there is none of that name. The last of several."""
        key = _key(name)
        at = int(np.searchsorted(self._keys, key, "right")) - 1
        if at < 0 or self._keys[at] != key:
            return None
        _, offset, size = self._columns.row(at)
        return offset, size

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "cut": self.cut, "columns": self._columns}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path, self.cut, self._columns = state["path"], state["cut"], state["columns"]
        self._keys = self._columns["key"]


def _key(name: str) -> int:
    """64 bits of a name's digest: two names of one tar have the same once in 10^7 tars of a million files."""
    return int.from_bytes(blake2b(name.removeprefix("./").encode(), digest_size=8).digest(), "big", signed=True)
