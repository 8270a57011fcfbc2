"""What a client is told when it gets no answer: OpenAI's form of an error, in words that give nothing away.

A client is told about what it sent, and about limits. It is never told a path, an address, a name inside the network,
what a decoder said or where the code stood: those go to the server's log, under the request's number.
"""

from __future__ import annotations

import json
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from avlm.errors import AvlmError, DataError

LONGEST = 600
"""Characters of a message; what a client sent is quoted in some."""

_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class RefusedError(Exception):
    """A request that is not answered. It travels between processes.

    Args:
        status: Of HTTP.
        message: What is so, why that cannot work, what to do.
        param: The field that is wrong.
        code: A word that programs go by.
        wait_s: After so many seconds another try may do better.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, wait_s: int | None = None
    ) -> None:
        super().__init__(status, message, param, code, wait_s)
        self.status, self.param, self.code, self.wait_s = status, param, code, wait_s
        self.message = message if len(message) <= LONGEST else message[:LONGEST] + "..."

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (self.status, self.message, self.param, self.code, self.wait_s)

    def body(self) -> dict[str, Any]:
        """As JSON says it.

        Source:
            OpenAI's API reference, "Errors".
        """
        kind = "server_error" if self.status >= 500 else _KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Whether and when to try again; OpenAI's clients go by `x-should-retry` before they go by the status."""
        if self.wait_s is not None:
            return {"Retry-After": str(self.wait_s)}
        found = {"x-should-retry": "false"}
        return {**found, "WWW-Authenticate": "Bearer"} if self.status == 401 else found

    def response(self) -> Response:
        return Response(encoded(self.body()), self.status, self.headers(), "application/json")


def _again(status: int, message: str, param: str | None, code: str | None, wait_s: int | None) -> RefusedError:
    return RefusedError(status, message, param=param, code=code, wait_s=wait_s)


def encoded(value: Any) -> bytes:
    """JSON as it goes over the wire. Half a character, which a client may have sent, becomes JSON's escape for it."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":")).encode()


def wrong(param: str, message: str, code: str = "invalid_value") -> RefusedError:
    """The refusal of a field."""
    return RefusedError(400, message, param=param, code=code)


def our_fault() -> RefusedError:
    """What is told of a mistake of ours: nothing."""
    return RefusedError(
        500, "The server could not answer this request. It is not the request's fault; look into its log"
    )


def about_media(error: DataError, param: str | None = None) -> RefusedError:
    """What is told of media, or a conversation, that cannot be read.

    Where a decoder raised something, its kind of error stands in our message, and it is left out here.
    """
    cause: BaseException | None = error
    while isinstance(cause, AvlmError):
        cause = cause.__cause__
    name = getattr(error, "file", "") or "a medium"
    message = error.reason if cause is None else f"{name}: is not readable as what it was sent as. Send another file"
    return RefusedError(
        400, message, param=param, code="invalid_media" if getattr(error, "file", "") else "invalid_value"
    )


async def refuse(request: Request, error: Exception) -> Response:
    """The answer to a request that was refused."""
    assert isinstance(error, RefusedError)
    return error.response()


async def refuse_route(request: Request, error: Exception) -> Response:
    """The answer to a path or a method that there is not."""
    status = getattr(error, "status_code", 404)
    words = {
        404: f"There is nothing at {request.url.path[:100]}. See /v1/models, /v1/chat/completions, "
        "/v1/audio/transcriptions",
        405: f"{request.method} is not what {request.url.path[:100]} takes. Use another method",
    }
    message = words.get(status, "The request is not understood. Correct it")
    refused = RefusedError(status, message, code="unknown_url" if status == 404 else None)
    response = refused.response()
    response.headers.update(getattr(error, "headers", None) or {})
    return response


async def refuse_fault(request: Request, error: Exception) -> Response:
    """The answer after a mistake of ours; the log has the rest."""
    return our_fault().response()
