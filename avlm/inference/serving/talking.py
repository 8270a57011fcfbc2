"""``/v1/live``: conversations by voice, where the model hears and can tell whether it was meant."""

from __future__ import annotations

from importlib.util import find_spec

from fastapi import APIRouter

from avlm.config.serve import Serve
from avlm.inference.engine import Engine
from avlm.inference.live.mind import ModelMind
from avlm.inference.live.session import Session
from avlm.inference.live.socket import live_router
from avlm.inference.live.voice import EspeakVoice, Voice
from avlm.inference.sampling import Sampling
from avlm.inference.serving.service import Service


def converses(engine: Engine) -> bool:
    """Whether people can talk with the model: it hears, and has learned who is meant."""
    return engine.processor.media_spec().audio is not None and engine.model.state_head is not None


def router(service: Service) -> APIRouter:
    """The route of a server whose model `converses`; its sessions share the model's thread with all other requests."""
    settings = service.settings
    voice = EspeakVoice() if find_spec("espeakng_loader") is not None else None
    return live_router(lambda: _session(service.engine, settings, voice), run=service.running.run)


def _session(engine: Engine, settings: Serve, voice: Voice | None) -> Session:
    sampling = Sampling(max_tokens=settings.answer_tokens)
    return Session(ModelMind(engine, ask=settings.listen, sampling=sampling), voice=voice)
