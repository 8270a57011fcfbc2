"""A conversation by voice over a WebSocket, as a router that any FastAPI application takes in with one line.

    app.include_router(live_router(make_session))

In: binary messages of PCM (16 bits, little-endian, mono, 16 kHz), and text messages of JSON:

    {"type": "text", "text": "..."}     typed
    {"type": "image", "url": "data:image/jpeg;base64,..."}     what the camera shows from now on; without url: nothing
    {"type": "stop"}     no more of this answer
    {"type": "played"}   the spoken answer has been heard to its end
    {"type": "end"}      nothing more comes; what is being answered is answered

Out: one JSON message for each event of the session; behind an event `speech` one binary message
with its PCM. What a client sends is held against limits; one that goes beyond them is told so
in an event `error`, and the connection is closed.

The model works in a thread of its own, or in whatever `run` says, so that a conversation never
holds up the loop. Keys and origins are whoever's this router is mounted in.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from avlm.data.decoding.decode import decode_image
from avlm.data.decoding.files import Limits
from avlm.data.voice.gate import SAMPLE_RATE_HZ
from avlm.errors import AvlmError, MissingExtraError
from avlm.inference.live.drive import from_pcm, to_pcm
from avlm.inference.live.session import Event, Session
from avlm.samples import MediaItem

if TYPE_CHECKING:
    from fastapi import APIRouter, WebSocket

T = TypeVar("T")
Run = Callable[[Callable[[], T]], Awaitable[T]]
PATH = "/v1/live"
PROTOCOL = "avlm-live"
"""Said to a client that offers protocols; a browser that offers some wants one of them back."""
POLICY, TOO_LARGE, LATER, FAULT = 1008, 1009, 1013, 1011
"""Why a connection is closed (RFC 6455, section 7.4.1, and IANA's registry)."""

_NOTHING = np.zeros(0, np.float32)


@dataclass(frozen=True, kw_only=True, slots=True)
class SocketLimits:
    """How much one conversation may have."""

    sessions: int = 4
    """Conversations at once."""
    session_s: float = 1800.0
    """Length of one."""
    idle_s: float = 60.0
    """Time without a message, after which nobody is thought to be there."""
    sound_bytes: int = 2 * SAMPLE_RATE_HZ * 2
    """Of one binary message; two seconds."""
    ahead_s: float = 5.0
    """Sound may come so much earlier than it can have been spoken."""
    text_chars: int = 4000
    """Of one typed text."""
    json_chars: int = 3 * 2**20
    """Of one message, pictures included."""
    pixels: int = 16_000_000
    """Of one picture."""
    messages_per_s: float = 200.0
    """On average, over the conversation and one second."""


class _RefusedError(Exception):
    """A client went too far, or is not understood."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def live_router(
    make_session: Callable[[], Session], *, limits: SocketLimits | None = None, run: Run[Any] | None = None
) -> APIRouter:
    """The route `/v1/live`.

    Args:
        make_session: Makes a session for each conversation, in real time (without costs). Called where `run` runs.
        run: Runs a function where the model may be used, and gives its result; default: a thread of the router's own.

    Raises:
        MissingExtraError: fastapi is not installed.
    """
    try:
        from fastapi import APIRouter, WebSocket
    except ImportError:
        raise MissingExtraError("fastapi", "serve", "Talking over a WebSocket") from None
    router, most = APIRouter(), limits or SocketLimits()
    work: Run[Any] = run or _own_thread()
    open_now: set[object] = set()

    async def live(socket: WebSocket) -> None:
        offered = socket.scope.get("subprotocols") or []
        await socket.accept(subprotocol=PROTOCOL if PROTOCOL in offered else None)
        if len(open_now) >= most.sessions:
            await _refuse(socket, _RefusedError(LATER, "as many talk here as can at once. Come again later"))
            return
        ticket = object()
        open_now.add(ticket)
        try:
            await _Conversation(socket, most, work).hold(make_session)
        finally:
            open_now.discard(ticket)

    live.__annotations__["socket"] = WebSocket  # postponed annotations are looked up where this function does not stand
    router.add_api_websocket_route(PATH, live)
    return router


def _own_thread() -> Run[Any]:
    pool = ThreadPoolExecutor(1, thread_name_prefix="avlm-live")

    async def run(function: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(pool, function)

    return run


class _Conversation:
    """One client."""

    def __init__(self, socket: WebSocket, limits: SocketLimits, run: Run[Any]) -> None:
        self.socket, self.limits, self.run = socket, limits, run
        self.began = time.monotonic()
        self.heard_s = 0.0
        self.messages = 0

    async def hold(self, make_session: Callable[[], Session]) -> None:
        """Talk until one side has enough."""
        from starlette.websockets import WebSocketDisconnect

        receiving: asyncio.Task[dict[str, Any]] | None = None
        session: Session | None = None
        try:
            session = await self.run(make_session)
            while True:
                receiving = receiving or asyncio.create_task(self._receive())
                if session.working and not receiving.done():
                    await self._tell(await self.run(lambda: session.hear(_NOTHING)))
                    continue
                message = await self._wait(receiving)
                receiving = None
                if message["type"] == "websocket.disconnect":
                    return
                if not await self._take(session, message):
                    await self.socket.close()
                    return
        except WebSocketDisconnect:
            return
        except _RefusedError as refused:
            await _refuse(self.socket, refused)
        except Exception:
            await _refuse(self.socket, _RefusedError(FAULT, "something went wrong here. Begin again"))
            raise
        finally:
            if receiving is not None:
                receiving.cancel()
            if session is not None:
                await _to_its_end(self.run(session.stop))

    async def _receive(self) -> dict[str, Any]:
        return dict(await self.socket.receive())

    async def _wait(self, receiving: asyncio.Task[dict[str, Any]]) -> dict[str, Any]:
        left = min(self.limits.idle_s, self.began + self.limits.session_s - time.monotonic())
        done, _ = await asyncio.wait({receiving}, timeout=max(0.0, left))
        if not done:
            over = time.monotonic() - self.began >= self.limits.session_s
            why = "the conversation is as long as one may be" if over else "nothing came for a while"
            raise _RefusedError(POLICY, f"{why}. Begin another")
        return receiving.result()

    async def _take(self, session: Session, message: dict[str, Any]) -> bool:
        """One message of the client's; false: it was the last."""
        self._count()
        data, text = message.get("bytes"), message.get("text")
        if data is not None:
            self._check_sound(data)
            await self._tell(await self.run(lambda: session.hear(from_pcm(data))))
            return True
        given = self._parsed(text or "")
        if given["type"] == "end":
            await self._tell(await self.run(session.finish))
            return False
        await self._tell(await self._control(session, given))
        return True

    async def _control(self, session: Session, given: dict[str, Any]) -> list[Event]:
        kind = given["type"]
        if kind == "text":
            text = given.get("text")
            if not isinstance(text, str) or not text.strip() or len(text) > self.limits.text_chars:
                raise _RefusedError(
                    POLICY, f"a typed text has 1 to {self.limits.text_chars} characters. Send such a one"
                )
            return list(await self.run(lambda: session.type(text)))
        if kind == "image":
            picture = None if given.get("url") is None else self._picture(given["url"])
            await self.run(lambda: session.show(picture))
            return []
        if kind in ("stop", "played"):
            return list(await self.run(session.stop if kind == "stop" else session.played))
        raise _RefusedError(POLICY, "a message has a type that is none. Use text, image, stop, played or end")

    def _count(self) -> None:
        self.messages += 1
        if self.messages > self.limits.messages_per_s * (time.monotonic() - self.began + 1):
            raise _RefusedError(POLICY, "more messages come than anybody can mean. Send fewer, longer ones")

    def _check_sound(self, data: bytes) -> None:
        if len(data) > self.limits.sound_bytes:
            raise _RefusedError(
                TOO_LARGE, f"a piece of sound has at most {self.limits.sound_bytes} bytes. Send less at once"
            )
        if len(data) % 2:
            raise _RefusedError(
                POLICY, "a piece of sound has an odd number of bytes, and samples have two. Send whole ones"
            )
        self.heard_s += len(data) / 2 / SAMPLE_RATE_HZ
        if self.heard_s > time.monotonic() - self.began + self.limits.ahead_s:
            raise _RefusedError(POLICY, "sound comes faster than it can be spoken. Send it as it is heard")

    def _parsed(self, text: str) -> dict[str, Any]:
        if len(text) > self.limits.json_chars:
            raise _RefusedError(
                TOO_LARGE, f"a message has at most {self.limits.json_chars} characters. Send a smaller one"
            )
        try:
            given = json.loads(text)
        except (ValueError, RecursionError):
            given = None
        if not isinstance(given, dict) or not isinstance(given.get("type"), str):
            raise _RefusedError(POLICY, 'a text message is an object of JSON with a "type". Send such a one')
        return given

    def _picture(self, url: Any) -> MediaItem:
        """A picture from a data URL, and from nowhere else."""
        head, _, data = url.partition(",") if isinstance(url, str) else ("", "", "")
        if head not in ("data:image/jpeg;base64", "data:image/png;base64"):
            raise _RefusedError(POLICY, "a picture is a data URL of a JPEG or a PNG in base64. Send such a one")
        try:
            item = MediaItem("image", data=base64.b64decode(data, validate=True))
            limits = Limits(max_bytes=self.limits.json_chars, max_pixels=self.limits.pixels)
            return MediaItem("image", decoded=decode_image(item, limits))
        except (binascii.Error, AvlmError):
            raise _RefusedError(POLICY, "the picture cannot be read, or is too large. Send another") from None

    async def _tell(self, events: list[Event]) -> None:
        for event in events:
            wave = event.get("wave")
            await self.socket.send_json({key: value for key, value in event.items() if key != "wave"})
            if wave is not None:
                await self.socket.send_bytes(to_pcm(wave))


_ending: set[asyncio.Future[Any]] = set()
"""What is on its way to its end, so that nobody forgets it before."""


async def _to_its_end(work: Awaitable[Any]) -> None:
    """Wait for something that is done also where whoever waits is cancelled again and again, as anyio does it."""
    task = asyncio.ensure_future(work)
    _ending.add(task)
    task.add_done_callback(_ending.discard)
    await asyncio.shield(task)


async def _refuse(socket: WebSocket, refused: _RefusedError) -> None:
    """Say why and close; a client that has gone is not told."""
    from starlette.websockets import WebSocketDisconnect

    try:
        await socket.send_json({"event": "error", "message": str(refused)})
        await socket.close(refused.code)
    except (WebSocketDisconnect, RuntimeError, OSError):
        return
