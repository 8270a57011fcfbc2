"""``/v1/chat/completions``."""

from __future__ import annotations

from contextlib import aclosing

from fastapi import APIRouter, Request, Response
from starlette.types import Send

from avlm.inference.serving.answering import DONE, Choice, Completion, Usage, event
from avlm.inference.serving.exchanging import Exchange, send_events, start_stream
from avlm.inference.serving.reading import Question
from avlm.inference.serving.refusing import encoded
from avlm.inference.serving.service import Service


class ChatExchange(Exchange):
    """A conversation and what the model says next."""

    kind = "chat"
    takes = ("application/json",)

    async def reply(self, question: Question, send: Send) -> None:
        wishes, usage = question.wishes, Usage()
        completion = Completion(self.service.name, wishes.sampling.logprobs is not None, wishes.usage)
        if wishes.stream:
            await self._stream(question, completion, usage, send)
            return
        choices = await self.gathered(question, usage)
        body = encoded(completion.whole(choices, usage))
        await Response(body, media_type="application/json")(self.request.scope, self.request.receive, send)

    async def _stream(self, question: Question, completion: Completion, usage: Usage, send: Send) -> None:
        choices: dict[int, Choice] = {}
        async with aclosing(self.service.answers(question, usage)) as updates:
            async for number, update in updates:
                events = b""
                if not choices:
                    await start_stream(send)
                if number not in choices:
                    choices[number] = Choice()
                    events += event(completion.begin(number))
                text, logprobs = choices[number].add(update.pieces)
                if text or logprobs:
                    events += event(completion.more(number, text, logprobs))
                if update.finish is not None:
                    events += event(completion.end(number, update.finish))
                await send_events(send, events)
        last = event(completion.used(usage)) if question.wishes.usage else b""
        await send_events(send, last + DONE, more=False)


def router(service: Service) -> APIRouter:
    """The route."""
    found = APIRouter()

    @found.post("/v1/chat/completions", response_class=Response)
    async def complete(request: Request) -> Response:
        return ChatExchange(request, service)

    return found
