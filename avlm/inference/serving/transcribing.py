"""``/v1/audio/transcriptions``."""

from __future__ import annotations

from contextlib import aclosing

from fastapi import APIRouter, Request, Response
from starlette.types import Send

from avlm.inference.serving.answering import DONE, Choice, Usage, event, transcript
from avlm.inference.serving.exchanging import Exchange, send_events, start_stream
from avlm.inference.serving.reading import Question
from avlm.inference.serving.refusing import encoded
from avlm.inference.serving.service import Service


class TranscriptionExchange(Exchange):
    """A recording and its words."""

    kind = "transcription"
    takes = ("multipart/form-data",)

    async def reply(self, question: Question, send: Send) -> None:
        wishes, usage = question.wishes, Usage()
        if wishes.stream:
            await self._stream(question, usage, send)
            return
        (choice,) = await self.gathered(question, usage)
        text = choice.text.strip()
        if wishes.form == "text":
            response = Response(f"{text}\n", media_type="text/plain")
        else:
            found = transcript(text, wishes.form, wishes.language, question.heard_s, usage)
            response = Response(encoded(found), media_type="application/json")
        await response(self.request.scope, self.request.receive, send)

    async def _stream(self, question: Question, usage: Usage, send: Send) -> None:
        choice = Choice()
        await_first = True
        async with aclosing(self.service.answers(question, usage)) as updates:
            async for _, update in updates:
                if await_first:
                    await start_stream(send)
                    await_first = False
                text, _ = choice.add(update.pieces)
                await send_events(send, event({"type": "transcript.text.delta", "delta": text}) if text else b"")
        last = {"type": "transcript.text.done", "text": choice.text.strip(), "usage": usage.heard()}
        await send_events(send, event(last) + DONE, more=False)


def router(service: Service) -> APIRouter:
    """The route."""
    found = APIRouter()

    @found.post("/v1/audio/transcriptions", response_class=Response)
    async def transcribe(request: Request) -> Response:
        return TranscriptionExchange(request, service)

    return found
