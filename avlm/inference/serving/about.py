"""``/v1/models``, ``/health`` and ``/metrics``: what is served here, and how it is."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response

from avlm.inference.serving.refusing import encoded
from avlm.inference.serving.service import Service


def router(service: Service, *, live: bool) -> APIRouter:
    """The routes.

    Args:
        live: Whether people can talk with the model by voice, which a page looks for.
    """
    found = APIRouter()
    model = {"id": service.name, "object": "model", "created": service.created, "owned_by": "avlm", "live": live}

    @found.get("/v1/models")
    async def models() -> Response:
        return _json({"object": "list", "data": [model]})

    @found.get("/v1/models/{name:path}")
    async def one(name: str) -> Response:
        service.check_name(name)
        return _json(model)

    @found.get("/health")
    async def health() -> Response:
        return _json({"status": "ok"}) if service.well() else _json({"status": "failing"}, 503)

    @found.get("/metrics")
    async def metrics() -> Response:
        gauges = {
            "answers_running": service.running.running,
            "answers_waiting": service.running.waiting,
            "places_taken": service.places.taken,
            "bytes_held": service.places.held,
        }
        return Response(service.counts.text(gauges), media_type="text/plain; version=0.0.4")

    return found


def _json(value: dict[str, Any], status: int = 200) -> Response:
    return Response(encoded(value), status, media_type="application/json")
