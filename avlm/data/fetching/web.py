"""Files over http and https: one connection for each, to an address that was checked, under limits of size and time.

The standard library speaks the protocol. The socket is ours: it is connected to the address that passed the check, so
no second resolution can lead elsewhere, and the certificate is checked against the name. Nothing is taken from the
environment (no proxy, no password file) and nothing is remembered (no cookie).
"""

from __future__ import annotations

import email.utils
import http.client
import io
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, BinaryIO

from avlm.config.data import Fetch
from avlm.data.fetching.addresses import Hop, Resolve, addresses_of, admit
from avlm.data.fetching.deadline import Deadline, within
from avlm.data.fetching.urls import WEB, NotFetchedError, Url, next_url

BLOCK = 2**16
REDIRECTS = (301, 302, 303, 307, 308)
PASSING = (408, 425, 429, 500, 502, 503, 504)
"""Answers after which another try may do better."""
HEADERS = {"User-Agent": "avlm", "Accept": "*/*", "Accept-Encoding": "identity", "Connection": "close"}

Connect = Callable[[str, int, float], socket.socket]
"""A connection to an address (never a name), a port, within so many seconds."""


@dataclass(slots=True)
class Body:
    """What a host answers with, in pieces, and who was asked on the way."""

    blocks: Iterator[memoryview]
    hops: list[Hop] = field(default_factory=list)


class Web:
    """Fetches over http and https.

    Args:
        settings: What may be fetched.
        resolve: Gives the addresses of a name.
        connect: Connects to an address.
        tls: Checks certificates; default: by the system's authorities.
    """

    def __init__(
        self, settings: Fetch, resolve: Resolve, connect: Connect | None = None, tls: ssl.SSLContext | None = None
    ) -> None:
        self.settings = settings
        self.resolve = resolve
        self.connect = connect or connected
        self._tls = tls

    @contextmanager
    def body(self, url: Url, deadline: Deadline) -> Iterator[Body]:
        """What is at a URL.

        Raises:
            NotFetchedError: It may not be asked for, or is not given.
        """
        hops: list[Hop] = []
        for _ in range(self.settings.redirects + 1):
            if url.scheme not in WEB:
                raise NotFetchedError(f"is redirected to {url.scheme}://, which is not followed. Give that URL instead")
            admit(url, self.settings)
            addresses, hop = within(deadline, partial(addresses_of, url, self.settings, self.resolve))
            hops.append(hop)
            with self._asked(url, addresses, deadline) as response:
                if response.status not in REDIRECTS:
                    self._check(response)
                    yield Body(self._blocks(response), hops)
                    return
                url = next_url(url, response.headers.get("Location") or "")
        raise NotFetchedError(
            f"is redirected more than {self.settings.redirects} times. Give its last URL, or raise data.fetch.redirects"
        )

    @contextmanager
    def _asked(self, url: Url, addresses: Sequence[str], deadline: Deadline) -> Iterator[http.client.HTTPResponse]:
        """The answer to a request, its body not read."""
        sock = self._connected(url, addresses, deadline)
        try:
            wire = _Wire(sock, deadline, self.settings.read_s)
            connection = _Connection(url.host, url.port)
            connection.sock = wire
            with _told():
                connection.request("GET", url.target, headers={"Host": url.authority(), **HEADERS})
                response = connection.getresponse()
            try:
                yield response
            finally:
                response.close()
        finally:
            with suppress(OSError):
                sock.close()

    def _connected(self, url: Url, addresses: Sequence[str], deadline: Deadline) -> socket.socket:
        """A connection to the first of the addresses that takes one."""
        failure: NotFetchedError | None = None
        for address in addresses:
            try:
                with _told():
                    sock = self.connect(address, url.port, deadline.at_most(self.settings.connect_s))
                    return self._secured(sock, url, deadline) if url.scheme == "https" else sock
            except NotFetchedError as error:
                if not error.passing:
                    raise
                failure = error
        assert failure is not None  # there is at least one address
        raise failure

    def _secured(self, sock: socket.socket, url: Url, deadline: Deadline) -> socket.socket:
        if self._tls is None:
            self._tls = ssl.create_default_context()
        try:
            sock.settimeout(deadline.at_most(self.settings.connect_s))
            return self._tls.wrap_socket(sock, server_hostname=url.host)
        except BaseException:
            sock.close()
            raise

    def _check(self, response: http.client.HTTPResponse) -> None:
        """Refuse what is no file, is packed, or announces too much."""
        if response.status != 200:
            wait_s = wait_of(response.headers.get("Retry-After"), time.time())
            raise NotFetchedError(
                f"is not given by its host (status {response.status}). Correct its URL, or remove it from the sample",
                passing=response.status in PASSING,
                wait_s=wait_s,
            )
        coding = response.headers.get("Content-Encoding", "identity").strip().lower()
        transfer = response.headers.get("Transfer-Encoding", "chunked").strip().lower()
        if coding not in ("", "identity") or transfer != "chunked":
            raise NotFetchedError("is sent packed, which was not asked for. Download it and give its path")
        if response.length is not None:
            check_size(response.length, self.settings)

    def _blocks(self, response: http.client.HTTPResponse) -> Iterator[memoryview]:
        """The body in pieces, held against the size allowed and the size announced."""
        announced, count = response.length, 0
        buffer = memoryview(bytearray(BLOCK))  # filled in place: what a chunk claims to hold is never asked for at once
        while True:
            with _told():
                num = response.readinto(buffer)
            if not num:
                break
            count += num
            check_size(count, self.settings)
            yield buffer[:num]
        if announced is not None and count < announced:
            raise NotFetchedError(
                f"is cut off: {announced} bytes were announced and {count} came. Start the command again", passing=True
            )


def check_size(count: int, settings: Fetch) -> None:
    """Refuse a file that is too large.

    Raises:
        NotFetchedError: It is.
    """
    if count > settings.max_bytes:
        raise NotFetchedError(
            f"has more than {settings.max_bytes} bytes, which are the most that are fetched. "
            "Raise data.fetch.max_bytes, or give a smaller file"
        )


def connected(address: str, port: int, timeout_s: float) -> socket.socket:
    """A connection to an address; it resolves nothing."""
    sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout_s)
        sock.connect((address, port))
        return sock
    except BaseException:
        sock.close()
        raise


def wait_of(header: str | None, now: float) -> float:
    """How long a host asks to wait, in seconds, in a number or until a date; 0 where that is not said.

    Args:
        now: Seconds since the epoch.

    Source:
        RFC 9110, section 10.2.3.
    """
    text = (header or "").strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - now)
    except (ValueError, OverflowError):
        return 0.0


@contextmanager
def _told() -> Iterator[None]:
    """Say in our words what goes wrong on a connection."""
    try:
        yield
    except ssl.SSLCertVerificationError:
        raise NotFetchedError(
            "is on a host whose certificate is not one for its name that an authority signed. Download it"
        ) from None
    except TimeoutError:
        raise NotFetchedError("did not come in time. Raise data.fetch.read_s, or download it", passing=True) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise NotFetchedError(
            f"did not come, as the connection broke ({type(error).__name__}). Start the command again", passing=True
        ) from None


class _Connection(http.client.HTTPConnection):
    """A connection over the socket that it is given."""

    def connect(self) -> None:
        raise http.client.NotConnected  # never by itself, which would resolve the name again


class _Wire:
    """A socket as the protocol wants one, read and written against a deadline.

    Each read waits for no longer than is left, so a host that sends one byte at a time cannot put the end off.
    """

    def __init__(self, sock: socket.socket, deadline: Deadline, silence_s: float) -> None:
        self.sock = sock
        self.deadline = deadline
        self.silence_s = silence_s

    def hurry(self) -> socket.socket:
        """The socket, to wait for no longer than is left."""
        self.sock.settimeout(self.deadline.at_most(self.silence_s))
        return self.sock

    def sendall(self, data: Any) -> None:
        self.hurry().sendall(data)

    def makefile(self, mode: str) -> BinaryIO:
        return io.BufferedReader(_Incoming(self), BLOCK)

    def close(self) -> None:
        """Nothing: an answer is read after its connection was given up, and whoever made the socket closes it."""


class _Incoming(io.RawIOBase):
    """What comes in."""

    def __init__(self, wire: _Wire) -> None:
        self.wire = wire

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self.wire.hurry().recv_into(buffer)
