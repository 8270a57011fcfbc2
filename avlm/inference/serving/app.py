"""All of the server put together."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from avlm.config.data import Fetch
from avlm.config.serve import Serve
from avlm.data.fetching.fetch import Fetcher
from avlm.inference.chat import Chat
from avlm.inference.serving import about, completions, talking, transcribing
from avlm.inference.serving.gate import Gate, Keys
from avlm.inference.serving.pages import page_router
from avlm.inference.serving.refusing import RefusedError, refuse, refuse_fault, refuse_route
from avlm.inference.serving.service import Service


def create_app(
    model: Path | str | Chat, settings: Serve | None = None, *, make_fetcher: Callable[[Fetch], Fetcher] = Fetcher
) -> FastAPI:
    """The server as an ASGI application; workers and the model's thread begin and end with its lifespan.

    Args:
        model: A model directory, or a model that is loaded.
        settings: Of the server.
        make_fetcher: Makes what fetches URLs.

    Raises:
        ConfigError, WeightsError: It is not a whole model directory.
    """
    settings = settings or Serve()
    service = Service(model, settings, make_fetcher)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with service.open():
            yield

    # No pages of documentation: they would load their scripts from elsewhere.
    app = FastAPI(title="avlm", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = service
    app.include_router(completions.router(service))
    app.include_router(transcribing.router(service))
    app.include_router(about.router(service, live=talking.converses(service.engine)))
    if talking.converses(service.engine):
        app.include_router(talking.router(service))
    if settings.ui:
        app.include_router(page_router())
    app.add_exception_handler(RefusedError, refuse)
    app.add_exception_handler(HTTPException, refuse_route)
    app.add_exception_handler(Exception, refuse_fault)
    app.add_middleware(Keys, settings=settings)
    if settings.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.origins,
            allow_methods=("GET", "POST"),
            allow_headers=("authorization", "content-type"),
            expose_headers=("x-request-id", "retry-after"),
        )
    app.add_middleware(Gate, settings=settings, counts=service.counts)
    return app
