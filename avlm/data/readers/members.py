"""One sample of a tar: members that stand next to each other and share what is before the first dot of their names.

Source:
    The WebDataset format (github.com/webdataset/webdataset, "The WebDataset Format").
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from avlm.data.forms.folders import KINDS, Beside
from avlm.data.forms.parse import recognise
from avlm.data.forms.tars import Member, Tar
from avlm.data.readers.endings import CLASSES, TEXTS, kind_by
from avlm.data.readers.jsonlines import loaded
from avlm.errors import DataError
from avlm.samples import MediaItem

NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)
"""What its members have in common, and the rest, which says what each is."""
NO_SAMPLE = re.compile(r"(?:\./)?__[^/]*__(?:$|/)")
"""Members that say something about the whole tar."""
_MAX_TEXT = 64 * 2**20


def split_name(name: str) -> tuple[str, str] | None:
    """A member's key, and what it is of its sample; None where it is of none."""
    found = NAME.fullmatch(name)
    if found is None or NO_SAMPLE.match(name):
        return None
    return found[1], found[2].lower()


class Fields(Mapping[str, Any]):
    """The members of a sample by what follows their key: texts and JSON as what they hold, media as media items.

    Only what is asked for is read.

    Raises:
        DataError: What is asked for is no JSON, or no text.
    """

    def __init__(self, tar: Tar, beside: Beside, where: str) -> None:
        self.tar, self.beside, self.where = tar, beside, where

    def __getitem__(self, ending: str) -> Any:
        member = self.beside.members[ending.lower()]
        last = ending.rpartition(".")[2].lower()
        if last == "json":
            return loaded(self.read(member), f"{self.where} {member.name}", "Write one JSON value")
        if last in TEXTS or last in CLASSES:
            return self.text(member)
        kind = kind_by(ending)
        return self.read(member) if kind is None else self.beside.medium(kind, member)

    def read(self, member: Member) -> bytes:
        """A member's bytes."""
        if member.size > _MAX_TEXT:
            raise DataError(
                f"has {member.size} bytes, and at most {_MAX_TEXT} are read as text. Give media an ending of theirs",
                where=f"{self.where} {member.name}",
            )
        return self.tar.read(member.offset, member.size)

    def text(self, member: Member) -> str:
        """A member's words. The line break that ends a text file is none of them."""
        try:
            words = self.read(member).decode()
        except UnicodeDecodeError as error:
            raise DataError(
                f"is not UTF-8 (byte {error.start + 1}). Write it in UTF-8", where=f"{self.where} {member.name}"
            ) from None
        return words.removesuffix("\n").removesuffix("\r")

    def media(self) -> list[MediaItem]:
        """All its media, in their order."""
        kinds = ((kind_by(ending), member) for ending, member in self.beside.members.items())
        return [self.beside.medium(kind, member) for kind, member in kinds if kind is not None]

    def __iter__(self) -> Iterator[str]:
        return iter(self.beside.members)

    def __contains__(self, ending: object) -> bool:
        return isinstance(ending, str) and ending.lower() in self.beside.members

    def __len__(self) -> int:
        return len(self.beside.members)

    def __repr__(self) -> str:
        return f"the members {', '.join(self)}"


def natural_row(fields: Fields) -> dict[str, Any]:
    """The row that a sample is when nobody says what its members are: its JSON if that is one, else media and words.

    Media that a row of JSON does not list are all those of its sample.

    Raises:
        DataError: There are no words to learn.
    """
    told = _json_of(fields)
    if recognise(told) is not None:
        return _with_media(told, fields)
    words = _words(told, fields)
    if words is None:
        raise DataError(
            f"has {', '.join(fields) or 'no members'} and no words to learn. Add a json with messages or a txt, or say "
            "with data.columns what its members are"
        )
    row = {"query": "", "response": words}
    if isinstance(told, dict):
        row |= {key: told[key] for key in ("id", "task") if isinstance(told.get(key), (str, int))}
    return _with_media(row, fields)


def _json_of(fields: Fields) -> Any:
    endings = [ending for ending in fields if ending == "json" or ending.endswith(".json")]
    chosen = "json" if "json" in endings else endings[0] if endings else None
    return None if chosen is None else fields[chosen]


def _words(told: Any, fields: Fields) -> str | None:
    by_last = {ending.rpartition(".")[2]: ending for ending in fields}
    for last in TEXTS:
        if last in by_last:
            return str(fields[by_last[last]])
    if isinstance(told, dict):
        for key in ("caption", "text", "transcript"):
            if isinstance(told.get(key), str):
                return str(told[key])
    for last in CLASSES:
        if last in by_last:
            return str(fields[by_last[last]]).strip()
    return None


def _with_media(row: dict[str, Any], fields: Fields) -> dict[str, Any]:
    """A row with the media of its sample, where it says of no medium which it is."""
    said = row.get("messages")
    if isinstance(said, list) and any(isinstance(m, dict) and not isinstance(m.get("content"), str) for m in said):
        return row  # typed parts say it themselves
    row = dict(row)
    listed = {kind for kind in KINDS if row.get(kind) or row.get(f"{kind}s")}
    for item in fields.media():
        if item.kind not in listed:
            row.setdefault(f"{item.kind}s", [])
            row[f"{item.kind}s"] = [*(row[f"{item.kind}s"] or []), item]
    return row
