"""A server of a tiny model in this process, and what tests ask it with."""

from __future__ import annotations

import base64
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest

from avlm.config.serve import Serve
from avlm.inference.chat import Chat
from avlm.inference.engine import Engine
from avlm.inference.serving.app import create_app
from avlm.inference.serving.listening import server_of
from avlm.inference.serving.service import Service

KEY = "sesame-sesame"


class Served:
    """A server that runs.

    Attributes:
        url: Where.
    """

    def __init__(self, url: str, service: Service) -> None:
        self.url, self.service = url, service
        self.port = int(url.rpartition(":")[2])
        self.key = service.settings.keys[0] if service.settings.keys else "none-is-needed"

    def client(self, **how: Any) -> openai.OpenAI:
        """The official client, as anybody makes it."""
        return openai.OpenAI(
            **{"base_url": f"{self.url}/v1", "api_key": self.key, "max_retries": 0, "timeout": 30, **how}
        )

    def ask(self, text: str = "What is it?", *media: dict[str, Any], **how: Any) -> Any:
        content = [*media, {"type": "text", "text": text}]
        how = {"model": "avlm", "max_tokens": 8, **how}
        return self.client().chat.completions.create(messages=[{"role": "user", "content": content}], **how)

    def post(self, body: Any, path: str = "/v1/chat/completions", **headers: str) -> httpx.Response:
        """Whatever a client could send."""
        sent = {"authorization": f"Bearer {self.key}", "content-type": "application/json", **headers}
        content = body if isinstance(body, bytes) else httpx.Request("POST", "http://a", json=body).content
        return httpx.post(self.url + path, content=content, headers=sent, timeout=30)

    def socket(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def is_empty(self) -> bool:
        """Whether nobody has a place, or memory, or an answer in the batch."""
        service = self.service
        return not (service.places.taken or service.places.held or service.running.running or service.running.waiting)


@contextmanager
def served(chat: Chat, make_fetcher: Callable[..., Any] | None = None, **settings: Any) -> Iterator[Served]:
    """A server for as long as the block lasts; it must be empty in the end."""
    given = Serve(**{"port": 0, "workers": 1, "answer_tokens": 8, **settings})
    app = create_app(chat, given, **({} if make_fetcher is None else {"make_fetcher": make_fetcher}))
    begun: list[str] = []
    server = server_of(app, given, begun.append)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: begun or not thread.is_alive(), 60)
    found = Served(begun[0], app.state.service)
    try:
        yield found
        until(found.is_empty)
    finally:
        server.should_exit = True
        thread.join(60)
    assert not thread.is_alive()


def slow_steps(monkeypatch: pytest.MonkeyPatch, seconds: float = 0.005) -> None:
    """Let every step of every engine take so much longer."""
    step = Engine.step

    def slow(self: Engine) -> Any:
        time.sleep(seconds)
        return step(self)

    monkeypatch.setattr(Engine, "step", slow)


def until(so: Callable[[], Any], seconds: float = 20) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not so():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.01)


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def image(data: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(data)}}


def audio(data: bytes) -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": "wav"}}


def video(data: bytes) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": data_url(data, "video/mp4")}}


def at(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def said(text: str = "What is it?", *media: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The body of a request."""
    message = {"role": "user", "content": [*media, {"type": "text", "text": text}]}
    return {"model": "avlm", "messages": [message], "max_tokens": 4, **more}
