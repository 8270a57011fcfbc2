"""Vision encoders: one record for each family, and one call for all of them.

Everything a family does its own way stands in its record: how many prefix tokens it puts
before the picture, which layer is read, what its input looks like. Adding a family is
adding a record to the table below.

Shapes in this file:
    N  pictures    C  encoder width    n  embeddings of one picture
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from avlm.config.media import VisionSpec
from avlm.config.model import VisionPart
from avlm.errors import ConfigError
from avlm.models.records import check_layer, unknown_family

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _patch(config: Any) -> int:
    patch = config.patch_size
    return int(patch[0] if isinstance(patch, (list, tuple)) else patch)


def _convnext_stride(config: Any) -> int:
    return int(config.patch_size) * 2 ** (len(config.hidden_sizes) - 1)


def _bit_stride(config: Any) -> int:
    return min(4 * 2 ** (len(config.hidden_sizes) - 1), int(config.output_stride))


@dataclass(frozen=True, slots=True)
class VisionFamily:
    """What is particular about one family of vision encoders."""

    model_type: str
    """transformers' name of the encoder's configuration."""
    inside: tuple[str, ...] = ()
    """Names of composite configurations that hold one as `vision_config`."""
    held_as: tuple[str, ...] = ()
    """Where in a composite checkpoint its weights stand, when transformers does not find them by itself."""
    prefix_tokens: int = 0
    """Class and register tokens before the picture's own; they are dropped."""
    layer: int | None = None
    """Hidden state that feeds the connector; None is the encoder's last one with its final norm."""
    feature_map: bool = False
    """The output is a map (C, h, w) rather than a sequence."""
    whole_cells: bool = False
    """A picture's side must be a whole number of cells: what is left over would make one more."""
    cell_px: Callable[[Any], int] = _patch
    image_size_px: int | None = None
    """Used when the configuration does not name one."""
    mean: tuple[float, float, float] = HALF
    std: tuple[float, float, float] = HALF


VISION_FAMILIES = (
    VisionFamily("clip_vision_model", inside=("clip",), prefix_tokens=1, layer=-2, mean=CLIP_MEAN, std=CLIP_STD),
    VisionFamily("siglip_vision_model", inside=("siglip",)),
    VisionFamily(
        "internvl_vision",
        inside=("internvl",),
        held_as=("model.vision_tower", "vision_tower"),
        prefix_tokens=1,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    ),
    VisionFamily("bit", feature_map=True, whole_cells=True, cell_px=_bit_stride, image_size_px=224),
    VisionFamily(
        "convnext", feature_map=True, cell_px=_convnext_stride, image_size_px=224, mean=IMAGENET_MEAN, std=IMAGENET_STD
    ),
)


def vision_family(config: PreTrainedConfig) -> VisionFamily:
    """The record of a vision encoder's configuration.

    Raises:
        ConfigError: avlm has no record of this family.
    """
    for family in VISION_FAMILIES:
        if config.model_type == family.model_type:
            return family
    raise ConfigError(unknown_family("vision", config.model_type, [f.model_type for f in VISION_FAMILIES]))


def vision_spec(config: PreTrainedConfig, part: VisionPart, preprocessor: dict[str, Any]) -> VisionSpec:
    """What the encoder wants to see, from its configuration and its released preprocessing.

    Args:
        config: The encoder's own configuration.
        part: The run's wishes; what it does not say is the encoder's own choice.
        preprocessor: Contents of ``preprocessor_config.json``, or nothing.

    Raises:
        ConfigError: The picture's side does not fit the encoder's cells, or the encoder has no such layer.
    """
    family = vision_family(config)
    given: Any = part.image_size_px or getattr(config, "image_size", None) or family.image_size_px
    size = int(given[0] if isinstance(given, (list, tuple)) else given)
    cell = family.cell_px(config)
    if size < cell:
        raise ConfigError(
            f"model.vision.image_size_px={size} is smaller than one cell of the encoder ({cell} px). "
            f"Use at least {cell}"
        )
    if family.whole_cells and size % cell:
        raise ConfigError(
            f"model.vision.image_size_px={size} is not a whole number of the encoder's cells ({cell} px). "
            f"Use {size - size % cell} or {size - size % cell + cell}"
        )
    check_layer("vision", part.layer, len(config.hidden_sizes) if family.feature_map else config.num_hidden_layers)
    if family.feature_map and part.layer not in (None, -1):
        raise ConfigError(
            f"model.vision.layer={part.layer}: the layers of {config.model_type} differ in size, and only the last one "
            "fits the count of its tokens. Use -1, or leave it out"
        )
    return VisionSpec(
        image_size_px=size,
        cell_px=cell,
        mean=tuple(preprocessor.get("image_mean") or family.mean),
        std=tuple(preprocessor.get("image_std") or family.std),
        fit=part.fit,
        reduction=part.connector.reduction(),
    )


def encode_images(encoder: PreTrainedModel, pixel_values: Tensor, layer: int | None) -> Tensor:
    """Look at pictures.

    Args:
        encoder: A vision encoder with a record.
        pixel_values: (N, 3, height, width), normalised.
        layer: Hidden state to read; None is the family's choice.

    Returns:
        (N, n, C), without prefix tokens, in raster order.
    """
    family = vision_family(encoder.config)
    layer = family.layer if layer is None else layer
    pixel_values = pixel_values.to(encoder.dtype)
    if family.feature_map:
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)  # a third faster on a processor
    kwargs = _other_size(encoder, pixel_values)
    if layer is None:
        states = encoder(pixel_values, **kwargs).last_hidden_state
    else:
        states = encoder(pixel_values, output_hidden_states=True, **kwargs).hidden_states[layer]
    if family.feature_map:
        return states.flatten(2).transpose(1, 2)
    return states[:, family.prefix_tokens :]


def _other_size(encoder: PreTrainedModel, pixel_values: Tensor) -> dict[str, bool]:
    """What the encoder must be told about pictures of another size than it was trained on."""
    own = getattr(encoder.config, "image_size", None)
    own = tuple(own) if isinstance(own, (list, tuple)) else (own, own)
    can = "interpolate_pos_encoding" in inspect.signature(encoder.forward).parameters
    return {"interpolate_pos_encoding": True} if can and own != tuple(pixel_values.shape[-2:]) else {}
