"""Who may be asked: hosts that the user named, at addresses of the public internet.

A name says nothing about where it leads. So it is resolved once, what comes out is checked, and the connection goes to
the address that was checked.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from avlm.config.data import Fetch
from avlm.config.hosts import Address, address_of, host_matches
from avlm.data.fetching.urls import WEB, NotFetchedError, Url

Resolve = Callable[[str, int], Sequence[str]]
"""Addresses of a name, for a port."""

_NOT_PUBLIC_4 = tuple(
    ipaddress.IPv4Network(net)
    for net in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
        "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24", "192.168.0.0/16", "192.175.48.0/24",
        "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4",
        "168.63.129.16/32",  # a public number that every virtual machine of Azure reaches its host at
    )
)  # fmt: skip
"""Special purposes (IANA's registry of special IPv4 addresses, RFC 6890) and multicast."""

_UNICAST_6 = ipaddress.IPv6Network("2000::/3")
_NOT_PUBLIC_6 = tuple(
    ipaddress.IPv6Network(net)
    for net in (
        "2001::/23",  # protocols: Teredo, which holds an IPv4 address, and others
        "2001:db8::/32",
        "2002::/16",  # 6to4, which holds an IPv4 address
        "2620:4f:8000::/48",
        "3fff::/20",
    )
)
"""What of the unicast space has a special purpose (IANA's registry of special IPv6 addresses)."""

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
"""Holds an IPv4 address in its last four bytes (RFC 6052); how networks without IPv4 reach it."""


@dataclass(frozen=True, slots=True)
class Hop:
    """A host that was asked on the way to a file."""

    scheme: str
    host: str
    port: int
    private: bool
    """Whether it was at an address that is not public."""


def is_public(address: Address) -> bool:
    """Whether an address is one of the public internet. Of IPv6 only what is known to be so."""
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in net for net in _NOT_PUBLIC_4)
    if address.scope_id is not None:
        return False
    if address in _NAT64:
        return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return address in _UNICAST_6 and not any(address in net for net in _NOT_PUBLIC_6)


def admit(hop: Hop | Url, settings: Fetch) -> None:
    """Check that a host may be asked, by what the URL says.

    Raises:
        NotFetchedError: It may not.
    """
    if hop.scheme not in settings.schemes:
        raise NotFetchedError(
            f"is at {hop.scheme}://, and {', '.join(settings.schemes)} may be fetched. "
            f"Add {hop.scheme} to data.fetch.schemes, or download the file and give its path"
        )
    if not host_matches(hop.host, (*settings.hosts, *settings.private_hosts)):
        raise NotFetchedError(
            f"is on {hop.host}, which is none of the hosts that may be asked. "
            f"Add it: data.fetch.hosts, now {_listed(settings.hosts)}"
        )
    if hop.port not in (0, WEB.get(hop.scheme), *settings.ports):
        raise NotFetchedError(
            f"is at port {hop.port}, and that of {hop.scheme} is {WEB[hop.scheme]}. "
            f"Add it: data.fetch.ports, now {_listed(settings.ports)}"
        )
    if isinstance(hop, Hop) and hop.private and not host_matches(hop.host, settings.private_hosts):
        raise _private(hop.host)


def addresses_of(url: Url, settings: Fetch, resolve: Resolve) -> tuple[list[str], Hop]:
    """The addresses that a host may be asked at, of one resolution.

    Raises:
        NotFetchedError: It has none, or one of them is not public and the user did not open that host.
    """
    literal = address_of(url.host)
    try:
        found = [url.host] if literal is not None else list(resolve(url.host, url.port))
        addresses = [ipaddress.ip_address(text) for text in found]
    except ValueError:
        raise NotFetchedError(f"is on {url.host}, which has an address that is none. Download it") from None
    if not addresses:
        raise NotFetchedError(f"is on {url.host}, which has no address. Correct its URL", passing=True)
    private = not all(map(is_public, addresses))
    if private and not host_matches(url.host, settings.private_hosts):
        raise _private(url.host)
    return [str(address) for address in addresses], Hop(url.scheme, url.host, url.port, private)


def resolve_name(host: str, port: int) -> list[str]:
    """Ask the system for the addresses of a name.

    Raises:
        NotFetchedError: It has none.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        passing = isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN
        raise NotFetchedError(f"is on {host}, whose address is not found. Correct its URL", passing=passing) from None
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _private(host: str) -> NotFetchedError:
    return NotFetchedError(
        f"is on {host}, whose address is not one of the public internet. "
        f"If it may be asked all the same, add it to data.fetch.private_hosts"
    )


def _listed(values: Sequence[str | int]) -> str:
    return ", ".join(map(str, values)) or "empty"
