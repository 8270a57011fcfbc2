"""Prompts, whose media are known by their content: what was encoded once is not decoded or encoded again.

A medium is known by a digest of its bytes and of how the model has media prepared. Where that is remembered, its
embeddings and the facts that its layout follows from are taken from memory, and its file is only read to be compared.

Shapes in this file:
    T  tokens    n  places of one medium    D  language-model width
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from avlm.data.decoding.files import opened
from avlm.data.encode import add_tensors
from avlm.data.media.reader import Prepared
from avlm.data.processor import AvlmProcessor
from avlm.inference.kept import Kept
from avlm.layout import Facts, Kind
from avlm.models.modeling import AvlmForConditionalGeneration
from avlm.samples import IGNORE, Clip, Encoded, MediaItem, Picture, Place, Sample, Sound, Turn

AT_ONCE = 2**26
"""Bytes of pixels and sound that go through the encoders together."""
BLOCK = 2**20

Embeddings = dict[str, Tensor]
"""Of one medium, by kind of place: (n, D)."""


@dataclass(frozen=True, slots=True)
class Known:
    """What is remembered of a medium."""

    facts: Facts | None
    embeddings: Embeddings

    def size(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.embeddings.values())


@dataclass(slots=True)
class Medium:
    """One medium of a prompt."""

    digest: bytes
    """Of its content; empty where nothing is remembered."""
    place: Place
    span: tuple[int, int]
    facts: Facts | None = None
    embeddings: Embeddings | None = None
    fresh: Encoded | None = None
    """Its placeholders and what its encoders take, where its embeddings are to be made."""


@dataclass(frozen=True)
class Prompt:
    """A prompt, as it is read."""

    ids: list[int]
    media: list[Medium] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def array(self) -> np.ndarray:
        """Its tokens: int64 [T]."""
        return np.array(self.ids, np.int64)

    @cached_property
    def media_tokens(self) -> dict[str, int]:
        """Places of its media, by kind."""
        found: Counter[str] = Counter()
        for segment in (segment for medium in self.media for segment in medium.place.segments):
            if segment.kind != "text":
                found[segment.kind] += segment.count
        return dict(found)

    @cached_property
    def marks(self) -> list[tuple[int, int, bytes]]:
        """Where its media are, and which ones."""
        return [(*medium.span, medium.digest) for medium in self.media]


class Prompts:
    """Makes prompts, and their embeddings, and remembers those of media.

    Args:
        capacity: Bytes of embeddings that are remembered; 0 for none.
    """

    def __init__(self, model: AvlmForConditionalGeneration, processor: AvlmProcessor, capacity: int) -> None:
        self.model, self.processor = model, processor
        self.known: Kept[bytes, Known] = Kept(capacity)
        self.encoded_media = 0
        """How many media went through the encoders."""

    # ------------------------------------------------------------ writing down

    def of_sample(self, sample: Sample) -> Prompt:
        """Write a conversation down; what is remembered of its media is not decoded. Safe for several threads.

        Raises:
            MediaError: A medium cannot be read.
            DataError: There is nothing to be answered.
        """
        if not self.known.capacity:
            return self.of_encoded(self.processor.encode(sample, prompt_only=True))
        items = sample.media()
        stamps = [_stamp(item) for item in items]
        digests = [self._digest(item) for item in items]
        known = [None if digest is None else self.known.get(digest) for digest in digests]
        missing = [number for number, one in enumerate(known) if one is None or one.facts is None]
        asked = Sample(sample.id, (Turn("user", tuple(items[i] for i in missing)),), where=sample.where)
        prepared = dict(zip(missing, self.processor.prepare(asked), strict=True))
        for i in missing:  # what was decoded may be another file than the one that was looked at before
            digests[i] = digests[i] if _stamp(items[i]) == stamps[i] else None
        facts = [prepared[i].facts if i in prepared else _facts(one) for i, one in enumerate(known)]
        laid_out = self.processor.lay_out(sample, facts, prompt_only=True)
        media = []
        for place, span in zip(laid_out.places, laid_out.spans, strict=True):
            own, found = prepared.get(place.item), known[place.item]
            medium = Medium(digests[place.item] or b"", place, span, facts[place.item])
            if own is not None:
                medium.fresh = self._fresh(laid_out, place, own)
                medium.digest = medium.digest or self._digest_of_tensors(medium.fresh)
            else:
                medium.embeddings = None if found is None else found.embeddings
            media.append(medium)
        return Prompt(laid_out.ids, media)

    def of_encoded(self, encoded: Encoded) -> Prompt:
        """A prompt that was encoded elsewhere, with the tensors of all its media."""
        media = []
        for one in _apart(encoded):
            fresh = self._with_ids(one)
            digest = self._digest_of_tensors(fresh) if self.known.capacity else b""
            media.append(Medium(digest, fresh.places[0], fresh.spans[0], None, None, fresh))
        return Prompt(encoded.ids, media)

    def _fresh(self, laid_out: Encoded, place: Place, prepared: Prepared) -> Encoded:
        """One medium of a prompt as if it were all of it."""
        own = Encoded(laid_out.id, [], [], places=[place])
        add_tensors(own, [prepared] * (place.item + 1), self.processor.media_spec())  # it is asked for by its number
        return self._with_ids(own)

    def _with_ids(self, medium: Encoded) -> Encoded:
        """One medium with its placeholders and no other token."""
        own = self.processor.tokens().placeholders
        ids = [own[s.kind] for s in medium.places[0].segments if s.kind != "text" for _ in range(s.count)]
        return replace(medium, ids=ids, labels=[IGNORE] * len(ids))

    # ------------------------------------------------------------ content

    def _base(self) -> hashlib.blake2b:
        return hashlib.blake2b(json.dumps(self.processor.media, sort_keys=True).encode(), digest_size=32)

    def _digest(self, item: MediaItem) -> bytes | None:
        """Of a medium's bytes; None where they are not at hand, or cannot be read: whoever decodes it says why."""
        content = self._base()
        content.update(repr((item.kind, item.start_s, item.end_s)).encode())
        if item.decoded is not None:
            for part in _parts(item.decoded):
                content.update(part)
        elif item.data is not None:
            content.update(item.data)
        elif item.path is None:
            if item.url[:5].lower() != "data:":
                return None
            content.update(item.url.encode())
        else:
            try:
                with opened(item, self.processor.reader().limits) as file:
                    while block := file.read(BLOCK):
                        content.update(block)
            except Exception:
                return None
        return content.digest()

    def _digest_of_tensors(self, medium: Encoded) -> bytes:
        """Of what the encoders take of a medium."""
        content = self._base()
        content.update(repr((medium.ids, medium.image_sizes)).encode())
        sounds = [h for chunk in medium.sounds for h in (chunk, chunk.beside) if h is not None]
        for tensor in (*medium.images, *medium.frames, *(h.features for h in sounds)):
            content.update(repr(tuple(tensor.shape)).encode() + tensor.contiguous().numpy().tobytes())
        content.update(repr([h.frames for h in sounds]).encode())
        return content.digest()

    # ------------------------------------------------------------ embeddings

    def embed(self, asked: Sequence[tuple[Prompt, int]]) -> list[Tensor]:
        """Embeddings (T - start, D) of prompts from a token on, their media encoded where nothing is remembered.

        Raises:
            LayoutError: An encoder made more or fewer embeddings of a medium than it has places.
        """
        behind = [medium for prompt, start in asked for medium in prompt.media if medium.span[1] > start]
        self._encode([medium for medium in behind if medium.embeddings is None])
        table, device = self.model.get_input_embeddings(), self.model.device
        ids = torch.tensor([token for prompt, start in asked for token in prompt.ids[start:]], device=device)
        found = table(ids).split([len(prompt) - start for prompt, start in asked])
        return [self._filled(*one, embeds) for one, embeds in zip(asked, found, strict=True)]

    def _filled(self, prompt: Prompt, start: int, embeds: Tensor) -> Tensor:
        media = [medium for medium in prompt.media if medium.span[1] > start]
        if not media:
            return embeds
        ids = prompt.array
        for medium in media:
            assert medium.embeddings is not None
            first, end = medium.span
            for kind, own in medium.embeddings.items():
                token = getattr(self.model.config, f"{kind}_token_id")
                at = torch.from_numpy(np.flatnonzero(ids[first:end] == token) + first - start).to(embeds.device)
                embeds = embeds.index_copy(0, at, own.to(embeds))
        return embeds

    def _encode(self, media: Sequence[Medium]) -> None:
        """Embeddings of media; one that several prompts have is encoded once."""
        waiting: dict[bytes, Medium] = {}
        for number, medium in enumerate(media):
            known = self.known.get(medium.digest)
            if known is not None:  # since it was asked for, another prompt had it encoded
                medium.embeddings = known.embeddings
                continue
            waiting.setdefault(medium.digest or b"%d" % number, medium)
        for group in _groups(list(waiting.values())):
            self._encode_group(group)
        for medium in media:
            if medium.embeddings is None:
                medium.embeddings = waiting[medium.digest].embeddings
            medium.fresh = None
            assert medium.embeddings is not None
            if medium.digest:
                made = Known(medium.facts, medium.embeddings)
                self.known.put(medium.digest, made, made.size())

    def _encode_group(self, media: Sequence[Medium]) -> None:
        fresh = [medium.fresh for medium in media if medium.fresh is not None]
        self.encoded_media += len(fresh)
        inputs = {k: v.to(self.model.device) for k, v in self.processor.collate(fresh).items()}
        ids = inputs.pop("input_ids")
        tensors = {k: v for k, v in inputs.items() if k not in ("labels", "attention_mask")}
        _, features = self.model.model.embed(ids, places=[medium.place for medium in media], **tensors)
        done = dict.fromkeys(get_args(Kind), 0)
        for medium in media:
            medium.embeddings = {}
            for kind in get_args(Kind):
                count = medium.place.count(kind)
                if count:
                    # In memory of its own: what is remembered must not hold on to its neighbours.
                    medium.embeddings[kind] = features[kind][done[kind] : done[kind] + count].clone()
                    done[kind] += count


def _stamp(item: MediaItem) -> tuple[int, ...] | None:
    """What changes when a medium's file does."""
    if item.path is None or item.data is not None or item.decoded is not None:
        return None
    try:
        found = os.stat(item.path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _facts(known: Known | None) -> Facts:
    assert known is not None and known.facts is not None
    return known.facts


def _parts(decoded: Picture | Sound | Clip) -> Iterator[bytes]:
    """The bytes of a medium that is decoded already."""
    if isinstance(decoded, Picture):
        yield repr(decoded.pixels.shape).encode() + np.ascontiguousarray(decoded.pixels).tobytes()
    elif isinstance(decoded, Sound):
        yield repr(decoded.sample_rate_hz).encode() + np.ascontiguousarray(decoded.waveform).tobytes()
    else:
        yield repr((decoded.duration_s, len(decoded.frames), decoded.sound is None)).encode()
        for frame in decoded.frames:
            yield from _parts(frame)
        if decoded.sound is not None:
            yield from _parts(decoded.sound)


def _apart(encoded: Encoded) -> Iterator[Encoded]:
    """Each medium of a prompt with its own tensors."""
    images, frames, sounds = iter(encoded.images), iter(encoded.frames), iter(encoded.sounds)
    tiles, chunks, sizes = iter(encoded.tiles), iter(encoded.chunks), iter(encoded.image_sizes)
    for place, span in zip(encoded.places, encoded.spans, strict=True):
        own = Encoded(encoded.id, [], [], places=[place], spans=[span], colours=encoded.colours)
        if place.count("image"):
            own.tiles = [next(tiles)]
            own.images = [next(images) for _ in range(own.tiles[0])]
            own.image_sizes = [next(sizes)] if encoded.image_sizes else []
        if place.count("video"):
            own.frames = [next(frames) for segment in place.segments if segment.kind == "video"]
        if place.count("audio"):
            own.chunks = [next(chunks)]
            own.sounds = [next(sounds) for _ in range(own.chunks[0])]
        yield own


def _groups(media: Sequence[Medium]) -> Iterator[list[Medium]]:
    """Media that go through the encoders together: as many as are not too large."""
    group: list[Medium] = []
    size = 0
    for medium in media:
        assert medium.fresh is not None
        tensors = (*medium.fresh.images, *medium.fresh.frames, *(chunk.features for chunk in medium.fresh.sounds))
        own = sum(t.numel() * t.element_size() for t in tensors)
        if group and size + own > AT_ONCE:
            yield group
            group, size = [], 0
        group.append(medium)
        size += own
    if group:
        yield group
