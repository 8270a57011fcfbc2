"""Media one at a time, so that what an encoder makes of one can be kept and found again, or made elsewhere.

A batch's neighbours move the last bits of a matrix product. So where a store stands behind the model, every medium goes
through its encoder alone and without padding: what is kept is a function of the medium, and the same whether it was
made now, in another step, or by another process. The model asks the store; where that keeps things is not its business.

Shapes in this file:
    N  pictures, or tiles of them    A  chunks of sound    P  patches, of side p
    B  bins    M  frames of features    n  embeddings of one    C  encoder width
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from avlm.config.media import AudioSpec
from avlm.layout import Size
from avlm.models.hearing import encode_sounds, sound_lengths
from avlm.models.vision_encoders import encode_images, vision_family

EncoderPart = Literal["vision", "audio", "audio_beside"]


@dataclass(frozen=True, slots=True)
class Medium:
    """One tile of a picture, frame of a video or chunk of a sound, as its encoder takes it."""

    values: Tensor
    """(3, height, width), (P, p * p * 3) or (B, M), nobody else's padding in it."""
    facts: tuple[int, ...] = ()
    """Whole numbers that the encoder is told beside: rows and columns of patches, frames that are sound."""


Encode = Callable[[Medium], Tensor]
"""From one medium to its embeddings (n, C)."""


class FeatureStore(Protocol):
    """Knows some encoders' outputs already."""

    def keeps(self, part: EncoderPart) -> bool:
        """Whether this encoder's media are to be asked for here."""

    def recall(self, part: EncoderPart, media: Sequence[Medium], encode: Encode) -> list[Tensor]:
        """Embeddings of each medium (n, C) on its device, found or made: what ``encode`` gives, to the bit where it was
        kept, up to the order of additions where it was made in other company."""


def look(
    store: FeatureStore | None, encoder: PreTrainedModel, pixel_values: Tensor, layer: int | None, grids: Sequence[Size]
) -> list[Tensor]:
    """As `vision_encoders.encode_images`, through the store where it keeps this encoder's outputs."""
    if store is None or not store.keeps("vision"):
        return encode_images(encoder, pixel_values, layer, grids)

    def encode(one: Medium) -> Tensor:
        rows, columns = one.facts or (0, 0)
        return encode_images(encoder, _alone(one.values), layer, [(rows, columns)])[0]

    return store.recall("vision", tiles(encoder, pixel_values.to(encoder.dtype), grids), encode)


def hear(
    store: FeatureStore | None,
    part: Literal["audio", "audio_beside"],
    encoder: PreTrainedModel,
    features: Tensor,
    mask: Tensor,
    spec: AudioSpec,
    layer: int | None = None,
) -> list[Tensor]:
    """As `hearing.encode_sounds`, through the store where it keeps this encoder's outputs."""
    if store is None or not store.keeps(part):
        return encode_sounds(encoder, features, mask, spec, layer)

    def encode(one: Medium) -> Tensor:
        values = _alone(one.values)
        inside = torch.arange(values.shape[2], device=values.device) < one.facts[0]
        return encode_sounds(encoder, values, inside[None], spec, layer)[0]

    return store.recall(part, chunks(features, mask, spec), encode)


def tiles(encoder: PreTrainedModel, pixel_values: Tensor, grids: Sequence[Size]) -> list[Medium]:
    """The pictures of a batch one by one."""
    if vision_family(encoder.config).patches:
        return [Medium(p[: r * c], (r, c)) for p, (r, c) in zip(pixel_values, grids, strict=True)]
    return [Medium(pixels) for pixels in pixel_values]


def chunks(features: Tensor, mask: Tensor, spec: AudioSpec) -> list[Medium]:
    """The sounds of a batch (A, B, longest M) one by one."""
    lengths = sound_lengths(features, mask, spec)
    return [Medium(f[:, : spec.window_frames or own], (own,)) for f, own in zip(features, lengths, strict=True)]


def encode_tiles(
    store: FeatureStore | None, encoder: PreTrainedModel, media: Sequence[Medium], layer: int | None
) -> list[Tensor]:
    """Embeddings (n, C) of pictures from anywhere, in one batch."""
    longest = max(len(one.values) for one in media)
    values = [F.pad(one.values, (0, 0, 0, longest - len(one.values))) if one.facts else one.values for one in media]
    grids = [(one.facts[0], one.facts[1]) if one.facts else (0, 0) for one in media]
    return look(store, encoder, torch.stack(values), layer, grids)


def encode_chunks(
    store: FeatureStore | None,
    part: Literal["audio", "audio_beside"],
    encoder: PreTrainedModel,
    media: Sequence[Medium],
    spec: AudioSpec,
    layer: int | None = None,
) -> list[Tensor]:
    """Embeddings (n, C) of sounds from anywhere, in one batch."""
    longest = max(one.values.shape[1] for one in media)
    features = torch.stack([F.pad(one.values, (0, longest - one.values.shape[1])) for one in media])
    frames = torch.tensor([one.facts[0] for one in media], device=features.device)
    mask = torch.arange(longest, device=features.device) < frames[:, None]
    return hear(store, part, encoder, features, mask, spec, layer)


def _alone(values: Tensor) -> Tensor:
    """A batch of one, in memory of its own: where in a larger tensor it stood is not to be seen either."""
    return values[None].clone(memory_format=torch.contiguous_format)
