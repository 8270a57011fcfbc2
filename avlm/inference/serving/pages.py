"""The chat page: plain files that the server hands out, and what the browser may do with them.

The page speaks the API of the server it came from and nothing else: its policy forbids every other origin, inline
scripts and styles, and making HTML of texts. It holds no secrets, so no key is asked for it.
"""

from __future__ import annotations

import hashlib
from importlib.resources import files
from typing import NamedTuple

from fastapi import APIRouter, Request, Response

TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
"""By ending, and not from the machine's own table, which on some of them calls a script a text."""
POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob:",
        "media-src blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(self), geolocation=(), payment=(), usb=()",
    "Cache-Control": "no-cache",  # kept by the browser, and asked after each time: an update is seen at once
}


class PageFile(NamedTuple):
    """A file of the page, as it is sent."""

    body: bytes
    type: str
    tag: str
    """By which a browser asks whether its own copy is still right."""


def page_files() -> dict[str, PageFile]:
    """Every file of the page by its name. There are no folders, so no path leads out of it."""
    found = {}
    for entry in files("avlm.inference.serving").joinpath("page").iterdir():
        kind = TYPES.get(entry.name.rpartition(".")[2])
        if kind is not None:
            body = entry.read_bytes()
            found[entry.name] = PageFile(body, kind, f'"{hashlib.sha256(body).hexdigest()[:32]}"')
    return found


def page_router() -> APIRouter:
    """The page at ``/`` and its files below ``/page/``: ``app.include_router(page_router())``."""
    router = APIRouter(include_in_schema=False)
    known = page_files()

    def sent(name: str, request: Request) -> Response:
        found = known.get(name)
        if found is None:
            return Response("there is no such file", 404, media_type="text/plain", headers=HEADERS)
        headers = HEADERS | {"ETag": found.tag}
        if found.tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(found.body, media_type=found.type, headers=headers)

    @router.api_route("/", methods=["GET", "HEAD"])
    def index(request: Request) -> Response:
        return sent("index.html", request)

    @router.api_route("/page/{name}", methods=["GET", "HEAD"])
    def file(name: str, request: Request) -> Response:
        return sent(name, request)

    return router
