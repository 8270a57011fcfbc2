"""The process that serves: where it listens, what it says, and how it ends."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from avlm.config.serve import Serve
from avlm.errors import ConfigError

HEAD = 32 * 1024
"""Bytes of a request's line and headers."""
MESSAGE = 2**20
"""Bytes of one message of a WebSocket."""


class Server(uvicorn.Server):
    """A server that tells where it listens, once it does.

    Args:
        listening: Told the URL.
    """

    def __init__(self, config: uvicorn.Config, listening: Callable[[str], None]) -> None:
        super().__init__(config)
        self._listening = listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            address = self.servers[0].sockets[0].getsockname()
            host = f"[{address[0]}]" if ":" in address[0] else address[0]
            self._listening(f"http://{host}:{address[1]}")


def server_of(app: Any, settings: Serve, listening: Callable[[str], None] = lambda url: None) -> Server:
    """A server for an application, with the limits of the settings; it runs when it is told to."""
    config = uvicorn.Config(
        app,
        host=settings.host.strip("[]"),
        port=settings.port,
        loop="asyncio",
        http=_patience(settings.head_s),
        ws_max_size=MESSAGE,
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=settings.connections,
        timeout_graceful_shutdown=settings.stop_s,
        h11_max_incomplete_event_size=HEAD,
    )
    return Server(config, listening)


def serve(app: Any, settings: Serve, listening: Callable[[str], None]) -> None:
    """Serve until a signal says to stop: then nothing new is taken, and what runs has `stop_s` to finish.

    Args:
        listening: Told the URL, once the server can be asked.
    """
    with _stopped_by_signals():
        server_of(app, settings, listening).run()


def check_address(settings: Serve) -> None:
    """Refuse an address that cannot be listened at before a model is loaded for it.

    Raises:
        ConfigError: It cannot.
    """
    host = settings.host.strip("[]")
    try:
        family = socket.getaddrinfo(host, settings.port, type=socket.SOCK_STREAM)[0][0]
        with socket.create_server((host, settings.port), family=family):
            pass
    except OSError as error:
        raise ConfigError(
            f"host={settings.host} port={settings.port} cannot be listened at ({error.strerror or error}). "
            "Choose another port, or 0 for one that is free"
        ) from None


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """uvicorn raises the signal that stopped it once more when all is done; to be stopped is no failure here."""
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(kind, lambda number, frame: None) for kind in kinds]
    try:
        yield
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)


def _patience(head_s: float) -> type[H11Protocol]:
    """A protocol that waits for a request's headers so long and no longer, however slowly they drip in."""

    class Patience(H11Protocol):
        _clock: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._wind()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is h11.IDLE:
                self._wind()
            else:
                self._rest()

        def connection_lost(self, exc: Exception | None) -> None:
            self._rest()
            super().connection_lost(exc)

        def _wind(self) -> None:
            if self._clock is None:
                self._clock = self.loop.call_later(head_s, self.transport.close)

        def _rest(self) -> None:
            if self._clock is not None:
                self._clock.cancel()
                self._clock = None

    return Patience
