"""A server that speaks OpenAI's API as `avlm serve` does, and says what a test wants: for the page's own states.

What it does is written in the last question: "slow" streams a word every 50 ms, "busy" is refused with 429, "wrong"
with 400, "large" with 413, "broken" ends in the middle of the answer, "spoiled" tells an error within the stream,
"markup" answers in Markdown. Everything else is answered by what was given.
"""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, Request, Response, WebSocket, WebSocketDisconnect
from fastapi.responses import JSONResponse, StreamingResponse

from avlm.inference.serving.pages import page_router

TOKENS = {"image": 196, "audio": 25, "video": 400}
MARKUP = """Three things are *certain*:

1. The circle is **red**.
2. `x < 3` holds.
   - so it ends

```python
print("<b>not bold</b>")
```

<img src=x onerror=alert(1)> stays as it is, and so does 2 * 3 * 4.
"""


@dataclass
class Fake:
    """What it was asked, and how it is to behave."""

    url: str = ""
    key: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    live: bool = False
    """Whether it can be talked to."""
    told: list[str] = field(default_factory=list)
    """What came over the WebSocket, but for the sound."""
    left: int = 0
    """How many clients went away in the middle of an answer."""


def refusal(status: int, message: str, **headers: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": "x", "param": None, "code": None}}, status, headers)


def parts_of(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def usage_of(asked: dict[str, Any], words: int) -> dict[str, Any]:
    kinds = {"image_url": "image", "input_audio": "audio", "video_url": "video"}
    parts = [part for message in asked["messages"] for part in parts_of(message)]
    details = {f"{kind}_tokens": 0 for kind in TOKENS}
    for part in parts:
        if part["type"] in kinds:
            details[f"{kinds[part['type']]}_tokens"] += TOKENS[kinds[part["type"]]]
    details["text_tokens"] = sum(len(part["text"].split()) for part in parts if part["type"] == "text")
    details["cached_tokens"] = 12 if len(asked["messages"]) > 1 else 0
    prompt = sum(details.values()) - details["cached_tokens"]
    return {
        "prompt_tokens": prompt,
        "completion_tokens": words,
        "total_tokens": prompt + words,
        "prompt_tokens_details": details,
    }


def answer_to(asked: dict[str, Any], question: str) -> str:
    """It tells how many turns, pictures, sounds and videos it was given, and the sizes of their bytes."""
    if "markup" in question:
        return MARKUP
    if "slow" in question:
        return " ".join(f"word{i}" for i in range(400))
    sizes = []
    for part in parts_of(asked["messages"][-1]):
        if part["type"] == "input_audio":
            data = base64.b64decode(part["input_audio"]["data"], validate=True)
            sizes.append(f"{part['input_audio']['format']} of {len(data)} bytes")
        elif part["type"] != "text":
            head, _, data = part[part["type"]]["url"].partition(",")
            sizes.append(f"{head.removeprefix('data:').removesuffix(';base64')} of {len(base64.b64decode(data))} bytes")
    return f"Turn {len(asked['messages'])}: {question!r}" + (f" with {' and '.join(sizes)}" if sizes else "")


def fake_app(fake: Fake) -> FastAPI:
    app = FastAPI()
    app.include_router(page_router())

    def locked(request: Request) -> bool:
        return bool(fake.key) and request.headers.get("authorization") != f"Bearer {fake.key}"

    @app.get("/v1/models")
    def models(request: Request) -> Response:
        if locked(request):
            return refusal(401, "the key is not the one that the server was started with. Give it as a bearer token")
        return JSONResponse({"object": "list", "data": [{"id": "tiny-demo", "object": "model", "live": fake.live}]})

    @app.websocket("/v1/live")
    async def live(socket: WebSocket) -> None:
        await socket.accept(subprotocol="avlm-live")
        fake.told.append(",".join(socket.scope["subprotocols"]))
        with suppress(WebSocketDisconnect):
            for number in (1, 2):
                await heard(socket)
                for event in spoken(number):
                    await socket.send_json(event)
                await socket.send_bytes(b"\0\1" * 4800)
                kind = await control(socket, fake)
                await socket.send_json({"event": "interrupted" if kind == "stop" else "answer_ends", "number": number})
            await control(socket, fake)
        fake.told.append("closed")

    @app.post("/v1/chat/completions")
    async def completions(request: Request) -> Response:
        if locked(request):
            return refusal(401, "the key is not the one that the server was started with. Give it as a bearer token")
        asked = await request.json()
        fake.asked.append(asked)
        question = next((p["text"] for p in reversed(parts_of(asked["messages"][-1])) if p["type"] == "text"), "")
        if "busy" in question:
            return refusal(429, "32 requests wait already, which is what the queue holds.", **{"Retry-After": "3"})
        if "wrong" in question:
            return refusal(400, "messages[0]: the picture cannot be decoded, it is cut off. Send the whole file")
        if "large" in question:
            return Response("<html>nginx</html>", 413)
        return StreamingResponse(streamed(request, asked, question), media_type="text/event-stream")

    async def streamed(request: Request, asked: dict[str, Any], question: str) -> AsyncIterator[str]:
        def event(**chunk: Any) -> str:
            return f"data: {json.dumps({'object': 'chat.completion.chunk', 'choices': [], **chunk})}\n\n"

        await asyncio.sleep(2 if "late" in question else 0.03)
        words = answer_to(asked, question).split(" ")
        finished = False
        try:
            for i, word in enumerate(words):
                if i == 2 and "broken" in question:
                    await asyncio.sleep(0.2)  # what came is read; a browser lets go of what it has not given out yet
                    raise ConnectionError("as asked for")
                if i == 2 and "spoiled" in question:
                    yield event(error={"message": "the model was taken away. Ask again", "code": None})
                    return
                yield event(choices=[{"index": 0, "delta": {"content": (" " if i else "") + word}}])
                await asyncio.sleep(0.05 if "slow" in question else 0.01)
            finished = True
        finally:
            fake.left += not finished
        reason = "length" if len(words) >= asked["max_tokens"] else "stop"
        yield event(choices=[{"index": 0, "delta": {}, "finish_reason": reason}])
        yield event(usage=usage_of(asked, len(words)))
        yield "data: [DONE]\n\n"

    return app


def spoken(number: int) -> list[dict[str, Any]]:
    """The events of one answer, as `avlm live` tells them."""
    events = [{"event": "heard"}, {"event": "state", "state": "question", "probability": 0.9}]
    events += [{"event": "answer_begins"}, {"event": "piece", "text": " You said"}]
    events += [{"event": "piece", "text": f" *{number}*."}, {"event": "speech", "text": f"You said {number}."}]
    return [{**event, "number": number} for event in events]


async def heard(socket: WebSocket) -> None:
    """Wait until half a second of sound came that is not silent."""
    loud = 0
    while loud < 8_000:
        data = (await socket.receive()).get("bytes")
        if data is None:
            raise WebSocketDisconnect
        wave = np.frombuffer(data, "<i2")
        loud += len(wave) if loud or abs(wave).max() > 1000 else 0


async def control(socket: WebSocket, fake: Fake) -> str:
    """The type of the next message that is no sound."""
    while True:
        message = await socket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect
        if message.get("text"):
            fake.told.append(json.loads(message["text"])["type"])
            return fake.told[-1]


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """Serve an app on a free port of this machine. The address is given when it answers."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
