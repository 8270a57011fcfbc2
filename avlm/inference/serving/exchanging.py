"""One request from its first byte to the last of its answer: places, clocks, and a client that may leave."""

from __future__ import annotations

import asyncio
import time
from abc import abstractmethod
from contextlib import aclosing, suppress
from typing import Literal

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from avlm.inference.serving.answering import DONE, Choice, Usage, event
from avlm.inference.serving.bodies import GoneError, body_of, while_there
from avlm.inference.serving.reading import Body, Question
from avlm.inference.serving.refusing import RefusedError
from avlm.inference.serving.service import Service

LEFT = 499
"""What is counted for a client that left; it is sent nothing (nginx's word for it)."""


class Exchange(Response):
    """What a route returns: it receives, has read, asks and answers, all within one block.

    So nothing that a request took (a place, memory, its answers in the batch) can outlive it.
    """

    kind: Literal["chat", "transcription"]
    takes: tuple[str, ...]
    """Content types of its body."""

    def __init__(self, request: Request, service: Service) -> None:
        super().__init__()
        self.request, self.service = request, service
        self._started = False

    @abstractmethod
    async def reply(self, question: Question, send: Send) -> None:
        """Answer a question that was read."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service, begun = self.service, time.monotonic()

        async def sending(message: dict[str, object]) -> None:
            self._started = True
            await send(message)

        try:
            async with asyncio.timeout(service.settings.request_s):
                with service.places.take():
                    await self._conduct(sending)  # type: ignore[arg-type]
        except GoneError:
            service.counts.requests[scope["path"], LEFT] += 1
        except (RefusedError, TimeoutError) as error:
            refused = error if isinstance(error, RefusedError) else _too_long(service.settings.request_s)
            if not self._started:
                raise refused from None
            await _last_words(refused, send)
        finally:
            service.counts.request_s.add(time.monotonic() - begun)

    async def _conduct(self, send: Send) -> None:
        request, service = self.request, self.service
        async with body_of(request, self.takes, service.settings, service.places) as data:
            body = Body(self.kind, data, request.headers.get("content-type", ""))
            question = await while_there(request.receive, service.read(body))
        del data, body
        with service.places.take(question.wishes.choices - 1):
            await while_there(request.receive, self.reply(question, send))

    async def gathered(self, question: Question, usage: Usage) -> list[Choice]:
        """All answers, when all of them are there."""
        choices = [Choice() for _ in range(question.wishes.choices)]
        async with aclosing(self.service.answers(question, usage)) as updates:
            async for number, update in updates:
                choices[number].add(update.pieces)
                choices[number].finish = update.finish
        return choices


async def start_stream(send: Send) -> None:
    """Begin to send events; a proxy in between is asked not to gather them."""
    headers = {
        "content-type": "text/event-stream; charset=utf-8",
        "cache-control": "no-cache",
        "x-accel-buffering": "no",
    }
    raw = [(key.encode(), value.encode()) for key, value in headers.items()]
    await send({"type": "http.response.start", "status": 200, "headers": raw})


async def send_events(send: Send, data: bytes, *, more: bool = True) -> None:
    """Send some events; nothing where there are none, unless it is the end."""
    if data or not more:
        await send({"type": "http.response.body", "body": data, "more_body": more})


async def _last_words(refused: RefusedError, send: Send) -> None:
    """A stream that cannot go on says so, as OpenAI's clients look for it."""
    with suppress(TimeoutError):
        async with asyncio.timeout(1.0):
            await send_events(send, event(refused.body()) + DONE, more=False)


def _too_long(seconds: float) -> RefusedError:
    return RefusedError(
        504, f"The answer took longer than {seconds:g} s, so it was given up. Ask for a shorter one", code="timeout"
    )
