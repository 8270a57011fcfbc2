"""Who may ask: by the key that they have, the name that they ask for, and the page that they come from.

A page in somebody's browser can send requests to this machine. It is kept out twice: its own name, pointed at this
machine, is not a name of this server's (rebinding), and what it sends says where it comes from (Origin).
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from avlm.config.hosts import address_of, canonical_host, host_matches
from avlm.config.serve import Serve, is_loopback
from avlm.inference.serving.bodies import discard
from avlm.inference.serving.counting import Counts
from avlm.inference.serving.refusing import RefusedError

KNOWN = ("/v1/chat/completions", "/v1/audio/transcriptions", "/v1/models", "/health", "/metrics")
"""Paths that are counted by name."""
KEY_PROTOCOL = "avlm-key."
"""A WebSocket of a page cannot send a key in a header; it may name it behind this, as one of its protocols."""
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; media-src 'self' data: blob:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
"""What the page may load: nothing from elsewhere. And no other page may put it into itself."""
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"content-security-policy", POLICY.encode()),
)

SLOW = 408
"""The refusal of a sender that has been waited for long enough."""


class Gate:
    """Outermost: the server's names, where a request comes from, its number, and its count."""

    def __init__(self, app: ASGIApp, settings: Serve, counts: Counts) -> None:
        self.app, self.settings, self.counts = app, settings, counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        number = f"req_{secrets.token_hex(8)}"
        wire = _Wire(receive, send, number, self._count(scope))
        try:
            check_name(scope, self.settings)
            check_origin(scope, self.settings)
        except RefusedError as refused:
            await turn_away(refused, scope, wire.receive, wire.send)
            return
        await self.app(scope, wire.receive, wire.send)

    def _count(self, scope: Scope) -> Callable[[int], None]:
        path = scope["path"] if scope["path"] in KNOWN else "other"

        def count(status: int) -> None:
            self.counts.requests[path, status] += 1

        return count


class Keys:
    """Asks for a key. The page's own files and `/health` are for everybody: there is nothing of the model in them."""

    def __init__(self, app: ASGIApp, settings: Serve) -> None:
        self.app = app
        self._keys = [hashlib.sha256(key.encode()).digest() for key in settings.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._keys and scope["type"] != "lifespan" and not self._open(scope):
            given = _key_of(Headers(scope=scope))
            if given is None or not self._is_one(given):
                await turn_away(_no_key(given is None), scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _open(self, scope: Scope) -> bool:
        if scope["type"] != "http" or scope["method"] not in ("GET", "HEAD"):
            return False
        path: str = scope["path"]
        return path == "/health" or not path.startswith(("/v1", "/metrics"))

    def _is_one(self, given: str) -> bool:
        """Compared with every key in a time that says nothing about where they differ."""
        digest = hashlib.sha256(given.encode("utf-8", "surrogateescape")).digest()
        return sum([hmac.compare_digest(digest, key) for key in self._keys]) > 0


def _key_of(headers: Headers) -> str | None:
    kind, _, key = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer" and key:
        return key.strip()
    protocols = [name.strip() for name in headers.get("sec-websocket-protocol", "").split(",")]
    return next((name.removeprefix(KEY_PROTOCOL) for name in protocols if name.startswith(KEY_PROTOCOL)), None)


def _no_key(missing: bool) -> RefusedError:
    words = "comes without a key" if missing else "has a key that is none of this server's"
    code = "missing_api_key" if missing else "invalid_api_key"
    return RefusedError(401, f"The request {words}. Send `Authorization: Bearer KEY`", code=code)


def check_name(scope: Scope, settings: Serve) -> None:
    """Refuse what asks for a name that is not this server's.

    Names of addresses cannot be pointed elsewhere, so a server that listens beyond this machine goes by them, and where
    there is a key and no list of names, by any.

    Raises:
        RefusedError: It does.
    """
    hosts = Headers(scope=scope).getlist("host")
    try:
        (given,) = hosts
        host = _host_of(given)
    except ValueError:
        raise RefusedError(400, "The request does not say once which host it asks for. Set Host") from None
    if host_matches(host, settings.names) or host in ("localhost", settings.host.lower().strip("[]")):
        return
    address = address_of(host)
    if is_loopback(settings.host):
        known = address is not None and address.is_loopback
    else:
        known = address is not None or (bool(settings.keys) and not settings.names)
    if not known:
        raise RefusedError(
            421,
            "The server does not go by the name that it was asked for. Ask for localhost or its address; whoever runs "
            "it can add names (names=[...])",
            code="unknown_host",
        )


def _host_of(authority: str) -> str:
    """The host of a Host header, in the one way that it is written here."""
    name, colon, port = authority.rpartition(":")
    if colon and port.isascii() and (port.isdigit() or not port) and not authority.endswith("]"):
        authority = name
    return canonical_host(authority)


def check_origin(scope: Scope, settings: Serve) -> None:
    """Refuse what a page of another origin sends.

    Raises:
        RefusedError: It comes from one.
    """
    headers = Headers(scope=scope)
    origin = headers.get("origin")
    if origin is None or origin.lower() in settings.origins:
        return
    scheme, _, authority = origin.lower().partition("://")
    if scheme in ("http", "https") and authority == headers.get("host", "").lower():
        return
    raise RefusedError(
        403,
        "The request comes from a web page of another origin. Whoever runs the server can let it in (origins=[...])",
        code="unknown_origin",
    )


async def turn_away(refused: RefusedError, scope: Scope, receive: Receive, send: Send) -> None:
    """Refuse a request, or a WebSocket before it is one."""
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1008, "reason": ""})
        return
    await refused.response()(scope, receive, send)


class _Wire:
    """What goes in and out of one request: numbered, counted, and heard out before it is refused."""

    def __init__(self, receive: Receive, send: Send, number: str, count: Callable[[int], None]) -> None:
        self._receive, self._send, self._number, self._count = receive, send, number, count
        self._came_whole = False

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] != "http.request" or not message.get("more_body", False):
            self._came_whole = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._count(message["status"])
            if message["status"] >= 400 and message["status"] != SLOW and not self._came_whole:
                await discard(self.receive)
            given = list(message.get("headers", ()))
            said = {name for name, _ in given}  # the page is stricter with itself
            own = [(name, value) for name, value in HEADERS if name not in said]
            message["headers"] = [*given, (b"x-request-id", self._number.encode()), *own]
        await self._send(message)
