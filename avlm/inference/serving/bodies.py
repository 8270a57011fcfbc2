"""What comes in: so many bytes, within so much time, for as long as the client is there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

from avlm.config.serve import Serve
from avlm.inference.serving.places import Places
from avlm.inference.serving.refusing import RefusedError

T = TypeVar("T")

DISCARDED = 16 * 2**20
DISCARD_S = 2.0
"""What of a request that is refused unread is still taken in, so that its sender comes to read the refusal."""


class GoneError(Exception):
    """The client is not there any more."""


@asynccontextmanager
async def body_of(request: Request, kinds: tuple[str, ...], settings: Serve, places: Places) -> AsyncIterator[bytes]:
    """A request's body, whose memory is counted while the block lasts.

    Args:
        kinds: Content types that it may have.

    Raises:
        RefusedError: It is too large, too slow or of another kind, or there is no memory for it.
        GoneError: The client left.
    """
    _check_head(request, kinds, settings)
    held = 0
    data = bytearray()
    try:
        try:
            async with asyncio.timeout(settings.body_s):
                async for chunk in request.stream():
                    places.hold(len(chunk))
                    held += len(chunk)
                    if held > settings.max_body:
                        raise _too_large(settings)
                    data += chunk
        except TimeoutError:
            raise RefusedError(408, f"The request did not come within {settings.body_s:g} s. Send it faster") from None
        except ClientDisconnect:
            raise GoneError from None
        yield bytes(data)
    finally:
        places.let_go(held)


def _check_head(request: Request, kinds: tuple[str, ...], settings: Serve) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in kinds:
        raise RefusedError(415, f"The body is not said to be {' or '.join(kinds)}. Set Content-Type")
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise RefusedError(415, "The body is packed (Content-Encoding), and is read as it is. Send it plain")
    length = request.headers.get("content-length", "0")
    if length.isascii() and length.isdigit() and (len(length) > 18 or int(length) > settings.max_body):
        raise _too_large(settings)


def _too_large(settings: Serve) -> RefusedError:
    return RefusedError(
        413, f"The request has more than {settings.max_body} bytes, which are the most. Send less", code="too_large"
    )


async def discard(receive: Receive) -> None:
    """Take in a little of what still comes, and forget it.

    A connection that is closed on a client which is still sending is broken off, and the client never reads why.
    """
    count = 0
    try:
        async with asyncio.timeout(DISCARD_S):
            while count < DISCARDED:
                message = await receive()
                count += len(message.get("body", b""))
                if message["type"] != "http.request" or not message.get("more_body", False):
                    return
    except TimeoutError:
        pass


async def while_there(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do something for a client for as long as it is there.

    Args:
        receive: Behind the request's body.

    Raises:
        GoneError: It left, and the work was cancelled.
    """
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise GoneError
    finally:
        for one in (task, watch):
            one.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
