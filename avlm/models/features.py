"""Media one at a time, so that what a frozen encoder made of one can be kept and found again.

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
from transformers import PreTrainedModel

from avlm.config.media import AudioSpec
from avlm.layout import Size
from avlm.models.audio_encoders import encode_sounds, sound_lengths
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
        """Embeddings of each medium (n, C), found or made: to the bit what ``encode`` gives, on the medium's device."""


def look(
    store: FeatureStore | None, encoder: PreTrainedModel, pixel_values: Tensor, layer: int | None, grids: Sequence[Size]
) -> list[Tensor]:
    """As `vision_encoders.encode_images`, through the store where it keeps this encoder's outputs."""
    if store is None or encoder.training or not store.keeps("vision"):
        return encode_images(encoder, pixel_values, layer, grids)
    pixel_values = pixel_values.to(encoder.dtype)
    if vision_family(encoder.config).patches:
        media = [Medium(p[: r * c], (r, c)) for p, (r, c) in zip(pixel_values, grids, strict=True)]
    else:
        media = [Medium(pixels) for pixels in pixel_values]

    def encode(one: Medium) -> Tensor:
        rows, columns = one.facts or (0, 0)
        return encode_images(encoder, _alone(one.values), layer, [(rows, columns)])[0]

    return store.recall("vision", media, encode)


def hear(
    store: FeatureStore | None,
    part: Literal["audio", "audio_beside"],
    encoder: PreTrainedModel,
    features: Tensor,
    mask: Tensor,
    spec: AudioSpec,
    layer: int | None = None,
) -> list[Tensor]:
    """As `audio_encoders.encode_sounds`, through the store where it keeps this encoder's outputs."""
    if store is None or encoder.training or not store.keeps(part):
        return encode_sounds(encoder, features, mask, spec, layer)
    lengths = sound_lengths(features, mask, spec)
    media = [Medium(f[:, : spec.window_frames or own], (own,)) for f, own in zip(features, lengths, strict=True)]

    def encode(one: Medium) -> Tensor:
        values = _alone(one.values)
        inside = torch.arange(values.shape[2], device=values.device) < one.facts[0]
        return encode_sounds(encoder, values, inside[None], spec, layer)[0]

    return store.recall(part, media, encode)


def _alone(values: Tensor) -> Tensor:
    """A batch of one, in memory of its own: where in a larger tensor it stood is not to be seen either."""
    return values[None].clone(memory_format=torch.contiguous_format)
