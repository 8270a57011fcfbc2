"""Names of hosts, and patterns for them: the one place that says what a host is.

Settings are checked with it when they are made, and every URL when it is read, so the two cannot differ.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable

_LABEL = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")
_NUMBER = re.compile(r"(0[xX][0-9a-fA-F]*|[0-9]+)")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def canonical_host(text: str) -> str:
    """A host in the one way that it is written here: a name in small letters, or an address without brackets.

    Args:
        text: A name of ASCII labels, an IPv4 address of four decimal numbers, or an IPv6 address in brackets.

    Raises:
        ValueError: It is none of those; the message says what is so and what to do.

    Source:
        What ends in a number is an address and never a name, as in the URL standard of the WHATWG (section 3.5); its
        other forms of IPv4 (octal, hexadecimal, one number, a dot at the end) are refused here.
    """
    if text.startswith("[") and text.endswith("]"):
        inside = text[1:-1]
        try:
            if "%" in inside:
                raise ValueError
            return str(ipaddress.IPv6Address(inside))
        except ValueError:
            raise ValueError("has no IPv6 address in its brackets. Write it as [2001:db8::1], without a zone") from None
    if not text.isascii():
        raise ValueError("has letters outside of ASCII in its host. Write the host in its ASCII form (xn--...)")
    labels = text.split(".")
    if len(text) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError(
            "has a host that is no name: labels of letters, digits and hyphens with a dot between two of them. "
            "Write it as www.example.org"
        )
    if _NUMBER.fullmatch(labels[-1]):
        try:
            return str(ipaddress.IPv4Address(text))
        except ValueError:
            raise ValueError(
                "has a number at the end of its host, which is no IPv4 address. Write four decimal numbers: 192.0.2.1"
            ) from None
    return text.lower()


def address_of(host: str) -> Address | None:
    """The address that a canonical host is; None for a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def pattern_of(text: str) -> str:
    """A pattern in the one way that it is written here.

    Args:
        text: A host, ``*.example.org`` for every name below that one, or ``*`` for every host.

    Raises:
        ValueError: It is none of those.
    """
    try:
        if text == "*":
            return text
        if text.startswith("*."):
            name = canonical_host(text[2:])
            if address_of(name) is not None:
                raise ValueError("has a star before an address")
            return f"*.{name}"
        return canonical_host(text if ":" not in text or text.startswith("[") else f"[{text}]")
    except ValueError:
        raise ValueError(
            f"{text!r} is no pattern for hosts. Write a name (images.example.org), every name below one "
            "(*.example.org), an address, or * for every host; no scheme, port or path"
        ) from None


def host_matches(host: str, patterns: Iterable[str]) -> bool:
    """Whether a canonical host fits one of the patterns, by whole labels."""
    for pattern in patterns:
        if pattern == "*" or pattern == host:
            return True
        if pattern.startswith("*.") and host.endswith(pattern[1:]) and address_of(host) is None:
            return True
    return False
