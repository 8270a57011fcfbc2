"""URLs of media, read by the one parser that every check and every connection goes by.

What two readers could take in two ways (a backslash, a user before the host, an address in octal) is refused and not
repaired.
"""

from __future__ import annotations

import base64
import binascii
import re
from contextlib import suppress
from dataclasses import dataclass
from typing import get_args
from urllib.parse import quote, unquote_to_bytes, urljoin

from avlm.config.data import Scheme
from avlm.config.hosts import canonical_host

WEB = {"http": 80, "https": 443}
"""Schemes that are fetched over the web, and their ports."""

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)([^#]*)(?:#.*)?", re.DOTALL)
_PORT = re.compile(r"(.*?)(?::([0-9]{1,5}))?", re.DOTALL)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_KEPT = "!$&'()*+,;=:@/?~-._%[]"
"""Characters of a path and a query that go over the wire as they are; all others are escaped."""


class NotFetchedError(Exception):
    """Why something is not fetched.

    Args:
        reason: What is so and what to do, as the rest of a sentence that begins with the medium.
        passing: Whether another try may do better.
        wait_s: How long the host asks to wait before that.
    """

    def __init__(self, reason: str, *, passing: bool = False, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.passing = passing
        self.wait_s = wait_s


@dataclass(frozen=True, slots=True)
class Url:
    """Where something is fetched from."""

    scheme: str
    host: str
    """In small letters, or an address without brackets; of a bucket its name as it is."""
    port: int
    """0 where the scheme has none."""
    target: str
    """Path and query, as they go over the wire."""

    def text(self) -> str:
        return f"{self.scheme}://{self.authority()}{self.target}"

    def authority(self) -> str:
        """Host and port as they stand in a URL, the port left out where it is the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port in (0, WEB.get(self.scheme)) else f"{host}:{self.port}"


def parse_url(text: str) -> Url:
    """Read a URL.

    Raises:
        NotFetchedError: It is none, or one that could be read in two ways.
    """
    found = _URL.fullmatch(text)
    if found is None:
        raise NotFetchedError("is no URL. Write it as https://host/path")
    if _CONTROL.search(text) or "\\" in text:
        raise NotFetchedError("has a backslash or a control character in its URL. Write it without")
    scheme, authority, target = found[1].lower(), found[2], found[3]
    if scheme not in get_args(Scheme):
        raise NotFetchedError(f"is at {scheme}://, which is not fetched. Download the file and give its path")
    if "@" in authority:
        raise NotFetchedError("has a user or a password in its URL, and none is sent. Write it without")
    if scheme not in WEB:
        return _stored(scheme, authority, target)
    split = _PORT.fullmatch(authority)
    assert split is not None
    try:
        host, port = canonical_host(split[1]), int(split[2] or WEB[scheme])
    except ValueError as error:
        raise NotFetchedError(str(error)) from None
    if not 0 < port < 65536:
        raise NotFetchedError(f"has the port {port} in its URL, and ports are from 1 to 65535. Correct it")
    try:
        target = quote(target, safe=_KEPT)
    except UnicodeEncodeError:
        raise NotFetchedError("has half of a character in its URL. Write the whole one") from None
    return Url(scheme, host, port, target if target.startswith("/") else "/" + target)


def _stored(scheme: str, bucket: str, key: str) -> Url:
    """A URL of an object store: its key is taken as it is."""
    if "::" in key or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", bucket):
        raise NotFetchedError(f"has no plain name of a bucket in its URL. Write it as {scheme}://bucket/key")
    return Url(scheme, bucket, 0, key)


def next_url(url: Url, location: str) -> Url:
    """Where a redirect leads.

    Raises:
        NotFetchedError: To no URL.
    """
    with suppress(UnicodeError):
        location = location.encode("latin-1").decode()  # headers arrive as Latin-1, and people write UTF-8
    if _CONTROL.search(location):
        raise NotFetchedError("is redirected to a URL with a control character. Download it and give its path")
    try:
        joined = urljoin(url.text(), location)
    except ValueError:
        raise NotFetchedError("is redirected to what is no URL. Download it and give its path") from None
    return parse_url(joined)


def is_data_url(url: str) -> bool:
    """Whether the medium stands in the URL itself, so that nothing is fetched."""
    return url[:5].lower() == "data:"


def data_url_bytes(url: str) -> bytes:
    """The bytes that stand in a data URL.

    Raises:
        NotFetchedError: It is not written as one.

    Source:
        RFC 2397.
    """
    head, comma, body = url.partition(",")
    try:
        if not comma:
            raise ValueError
        if head.lower().endswith(";base64"):
            plain = unquote_to_bytes(body) if "%" in body else body.encode("ascii")
            return base64.b64decode(b"".join(plain.split()), validate=True)
        return unquote_to_bytes(body)
    except (binascii.Error, ValueError):
        raise NotFetchedError(
            "is a data URL whose data are not base64. Write data:TYPE;base64, and the file's bytes in base64"
        ) from None
