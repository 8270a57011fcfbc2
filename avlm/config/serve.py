"""How a model is served: where, to whom, and how much of everything one request may have."""

from __future__ import annotations

import ipaddress
import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from avlm.config.base import Settings
from avlm.config.data import Fetch, Limits
from avlm.config.hosts import pattern_of

_KEY = re.compile(r"[\x21-\x7e]{8,512}")
_ORIGIN = re.compile(r"https?://[^/\s?#@]+")


class Serve(Settings):
    """An HTTP server for one model. Whatever a request brings is a stranger's word and is held against these limits."""

    host: str = "127.0.0.1"
    """Address to listen at. Beyond this machine (another address than loopback) a key is needed."""
    port: int = Field(8000, ge=0, le=65535)
    """0: one that is free."""
    keys: tuple[str, ...] = Field((), repr=False)
    """Clients must send one of them (`Authorization: Bearer KEY`); none: nobody is asked."""
    anyone: bool = False
    """Listen beyond this machine without a key all the same."""
    names: tuple[str, ...] = ()
    """Names that the server may be asked by (the Host header). Those of this machine always may where it listens at
    loopback; other names are refused there, since a web page could point a name of its own at this server."""
    origins: tuple[str, ...] = ()
    """Origins of web pages that may ask, such as `https://chat.example.org`. The server's own page always may."""
    name: str | None = None
    """What clients call the model; default: the name of its directory."""
    ui: bool = False
    """Also serve the chat page, at `/`."""
    device: str = "cpu"
    """Where the model runs."""
    quant: Literal["none", "int8"] = "none"
    """How the language model's weights are kept: as they are, or in eight bits."""

    slots: int = Field(8, ge=1)
    """Answers that are made at once."""
    waiting: int = Field(64, ge=0)
    """Answers that may wait beside them; what comes then is told to try again (status 429)."""
    kept_mb: int = Field(512, ge=0)
    """Memory for what is remembered between requests: embeddings of media, and keys and values of what was read."""
    connections: int = Field(512, ge=1)
    """Connections that may be open at once."""

    answer_tokens: int = Field(1024, ge=1)
    """Longest answer to a request that does not say; at most `max_tokens`."""
    max_tokens: int = Field(8192, ge=1)
    """Longest answer that may be asked for."""
    max_choices: int = Field(8, ge=1)
    """Most answers to one request (`n`)."""
    temperature: float = Field(0.0, ge=0, le=2)
    """Of requests that do not say; 0 answers as `avlm chat` does."""
    transcribe: str = Field("Write down what is said.", min_length=1)
    """What the model is asked about a recording that is to be transcribed."""
    listen: str = "Answer the spoken question."
    """Words beside each sound of a conversation by voice, as the model was trained with."""

    max_body: int = Field(64 * 2**20, ge=1024)
    """Bytes of one request."""
    held_mb: int = Field(512, ge=1)
    """Memory for all requests that are being received and read."""
    max_media: int = Field(32, ge=0)
    """Pictures, sounds and videos in one request."""
    max_text: int = Field(2_000_000, ge=1)
    """Characters of text in one request; how many tokens it may have is up to the model."""
    limits: Limits = Limits(
        max_bytes=64 * 2**20,
        max_pixels=50_000_000,
        max_frames=50_000,
        max_samples=48_000 * 900,
        max_seconds=900.0,
        max_decode_s=30.0,
    )
    """What a picture, a sound or a video may be."""
    fetch: Fetch | None = None
    """What may be fetched for media that are given by URL; default: nothing. Data URLs are always read."""

    head_s: float = Field(15.0, gt=0)
    """Time in which a connection must have said what it wants."""
    body_s: float = Field(60.0, gt=0)
    """Time in which a request must have come."""
    read_s: float = Field(60.0, gt=0)
    """Time that reading a request may take: its media fetched and decoded. Who takes longer is ended."""
    request_s: float = Field(600.0, gt=0)
    """Time for one request altogether."""
    stop_s: int = Field(30, ge=0)
    """Time that running requests have to finish once the server is to stop."""

    workers: int = Field(2, ge=1)
    """Processes that read requests."""
    worker_mb: int = Field(2048, ge=256)
    """Memory of one of them."""

    @field_validator("keys")
    @classmethod
    def _are_keys(cls, keys: tuple[str, ...]) -> tuple[str, ...]:
        if not all(map(_KEY.fullmatch, keys)):  # the message must not show it
            raise ValueError("holds what is no key. Use at least 8 letters, digits and signs of ASCII, without a space")
        return keys

    @field_validator("names")
    @classmethod
    def _are_names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(pattern_of, names))

    @field_validator("origins")
    @classmethod
    def _are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(f"{origin!r} is no origin. Write scheme, name and port: https://chat.example.org:8443")
        return tuple(origin.lower() for origin in origins)

    @model_validator(mode="after")
    def _is_guarded(self) -> Serve:
        if not is_loopback(self.host) and not self.keys and not self.anyone:
            raise ValueError(
                f"host={self.host} can be reached from other machines, and there is no key, so anybody there could use "
                "the model. Give a key (--key, or AVLM_KEY in the environment), or say anyone=true"
            )
        return self

    @model_validator(mode="after")
    def _answers_fit(self) -> Serve:
        if self.answer_tokens > self.max_tokens:
            raise ValueError(
                f"answer_tokens={self.answer_tokens} is more than max_tokens={self.max_tokens}, the most that may be "
                "asked for. Lower the one or raise the other"
            )
        return self


def is_loopback(host: str) -> bool:
    """Whether what listens at this host can be reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
