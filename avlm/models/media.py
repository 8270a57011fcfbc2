"""A row's media apart from the row: what its encoders take, in order; and embeddings of media from anywhere.

A process may have its media encoded by another one. What it asks for, and what the other makes, are taken apart and put
together here as `modeling` would do it, so neither has to know of the other.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from avlm.config.media import AudioSpec
from avlm.layout import encoded_count, square_grid, work
from avlm.models.features import EncoderPart, Medium, chunks, encode_chunks, encode_tiles, tiles
from avlm.models.modeling import AvlmModel
from avlm.models.tiles import picture_grids
from avlm.samples import Row

ENCODERS: tuple[EncoderPart, ...] = ("vision", "audio", "audio_beside")


def encoder_of(model: AvlmModel, part: EncoderPart) -> PreTrainedModel | None:
    """The encoder of a part, if the model has one."""
    encoder: PreTrainedModel | None = getattr(model, f"{part}_tower")
    return encoder


def row_media(model: AvlmModel, row: Row) -> dict[EncoderPart, list[Medium]]:
    """What each encoder takes of a row, in the order in which the model asks for it.

    Raises:
        LayoutError: Its pictures have more or fewer tiles than their sizes say, or a sound is empty or too long.
    """
    spec = model.config.media_spec()
    found: dict[EncoderPart, list[Medium]] = {part: [] for part in ENCODERS}
    if spec.vision is not None and model.vision_tower is not None:
        for pixels, sizes in ((row.pixel_values, row.image_sizes), (row.pixel_values_videos, None)):
            if pixels is not None and len(pixels):
                known = None if sizes is None else [(int(height), int(width)) for height, width in sizes.tolist()]
                grids = [grid for picture in picture_grids(spec.vision, len(pixels), known) for grid in picture]
                found["vision"] += tiles(model.vision_tower, pixels.to(model.vision_tower.dtype), grids)
    heard: tuple[tuple[EncoderPart, Tensor | None, Tensor | None], ...] = (
        ("audio", row.input_features, row.input_features_mask),
        ("audio_beside", row.input_features_beside, row.input_features_beside_mask),
    )
    for part, features, mask in heard:
        if features is not None and mask is not None and len(features) and encoder_of(model, part) is not None:
            found[part] = chunks(features, mask, _audio_spec(model, part))
    return found


def embeddings(model: AvlmModel, part: EncoderPart, media: Sequence[Medium]) -> list[Tensor]:
    """Embeddings (n, C) of each medium, as the model makes them of its own; at least one medium."""
    encoder = encoder_of(model, part)
    assert encoder is not None, "who asks for embeddings has media for the encoder"
    if part == "vision":
        return encode_tiles(model.features, encoder, media, model.config.vision_layer)
    layer = model.config.audio_layer if part == "audio" else None
    return encode_chunks(model.features, part, encoder, media, _audio_spec(model, part), layer)


def learns(model: AvlmModel, part: EncoderPart) -> bool:
    """Whether anything of an encoder is trained."""
    encoder = encoder_of(model, part)
    return encoder is not None and any(p.requires_grad for p in encoder.parameters())


def work_by_place(model: AvlmModel, part: EncoderPart) -> float:
    """Work of an encoder for each position: one for each of its weights, three where it learns from it (forward, and
    backward for its input and its weight)."""
    encoder = encoder_of(model, part)
    weights = 0 if encoder is None else sum(p.numel() for p in encoder.parameters())
    return float(weights * (3 if learns(model, part) else 1))


def positions_of(model: AvlmModel, part: EncoderPart, medium: Medium) -> int:
    """Positions that an encoder works through for a medium, attention included, as `layout.work` counts them."""
    if part != "vision":
        return work(encoded_count(medium.values.shape[1], _audio_spec(model, part)))
    spec = model.config.media_spec().vision
    assert spec is not None, "who has pictures has a model that sees"
    rows, columns = medium.facts or square_grid(spec)
    return work(rows * columns)


def _audio_spec(model: AvlmModel, part: EncoderPart) -> AudioSpec:
    spec = model.config.media_spec().audio
    spec = spec.beside if spec is not None and part == "audio_beside" else spec
    assert spec is not None, "a model with an audio encoder knows what it hears"
    return spec
