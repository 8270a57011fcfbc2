"""A multipart body: texts, and files, by their names.

Source:
    RFC 7578.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from avlm.inference.serving.refusing import RefusedError

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

MOST = 64
"""Parts of one body."""
LONGEST = 64 * 1024
"""Bytes of one that is no file."""


@dataclass(slots=True)
class _Part:
    name: str = ""
    is_file: bool = False
    data: bytearray = field(default_factory=bytearray)


@dataclass(slots=True)
class Form:
    """What a form holds."""

    texts: dict[str, list[str]] = field(default_factory=dict)
    """By name, in the order that they came in."""
    files: dict[str, list[bytes]] = field(default_factory=dict)


def form_of(body: bytes, content_type: str) -> Form:
    """Read a form.

    Raises:
        RefusedError: It is none.
    """
    try:
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or b"boundary" not in options:
            raise _no_form()
        parts = _Parts()
        parser = MultipartParser(options[b"boundary"], parts.callbacks())
        parser.write(body)
        parser.finalize()
        if not parts.whole:
            raise _no_form()
        return parts.form
    except (FormParserError, ValueError, LookupError):
        raise _no_form() from None


class _Parts:
    """The parts of a body as they are met."""

    def __init__(self) -> None:
        self.form = Form()
        self.whole = False
        self._count = 0
        self._part = _Part()
        self._header, self._value = b"", b""

    def callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._header_name,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_part_data": self._data,
            "on_part_end": self._end,
            "on_end": self._whole,
        }

    def _begin(self) -> None:
        self._part = _Part()
        self._count += 1
        if self._count > MOST:
            raise RefusedError(400, f"The form has more than {MOST} parts. Send fewer")

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            options = parse_options_header(self._value)[1]
            self._part.name = options.get(b"name", b"").decode("utf-8", "replace")
            self._part.is_file = b"filename" in options
        self._header, self._value = b"", b""

    def _data(self, data: bytes, start: int, end: int) -> None:
        self._part.data += data[start:end]
        if not self._part.is_file and len(self._part.data) > LONGEST:
            raise RefusedError(400, f"A field of the form has more than {LONGEST} bytes and is no file. Send less")

    def _end(self) -> None:
        part = self._part
        if part.is_file:
            self.form.files.setdefault(part.name, []).append(bytes(part.data))
        else:
            self.form.texts.setdefault(part.name, []).append(part.data.decode("utf-8"))

    def _whole(self) -> None:
        self.whole = True


def _no_form() -> RefusedError:
    return RefusedError(400, "The body is not a form. Send multipart/form-data with its boundary, and texts in UTF-8")
