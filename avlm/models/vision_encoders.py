"""Vision encoders: one record for each family, and one call for all of them.

Everything a family does its own way stands in its record: how many prefix tokens it puts
before the picture, which layer is read, what its input looks like. Adding a family is
adding a record to the table below, or calling `add_family` with one.

Shapes in this file:
    N  pictures, or tiles of them    C  encoder width    n  embeddings of one
    P  patches, of side p
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from avlm.config.io import build
from avlm.config.media import VisionSpec
from avlm.config.model import VisionPart
from avlm.errors import ConfigError, LayoutError
from avlm.layout import Size
from avlm.models.depth import read_layer
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


def _registers(config: Any) -> int:
    """The class token and the register tokens behind it."""
    return 1 + int(config.num_register_tokens)


def _native(config: Any) -> bool:
    return bool(config.is_native)


@dataclass(frozen=True, slots=True)
class VisionFamily:
    """What is particular about one family of vision encoders."""

    model_type: str
    """transformers' name of the encoder's configuration."""
    inside: tuple[str, ...] = ()
    """Names of composite configurations that hold one as `vision_config`."""
    held_as: tuple[str, ...] = ()
    """Where in a composite checkpoint its weights stand, when transformers does not find them by itself."""
    prefix_tokens: int | Callable[[Any], int] = 0
    """Class and register tokens before the picture's own, which are dropped; a number, or how to read it from the
    encoder's configuration."""
    layer: int | None = None
    """Hidden state that feeds the connector, as it leaves its layer; None is the encoder's output: the last layer with
    the final norm, where there is one."""
    feature_map: bool = False
    """The output is a map (C, h, w) rather than a sequence."""
    patches: bool = False
    """It takes patches with their rows and columns, so that a picture keeps its aspect ratio (NaFlex)."""
    any_size: bool | Callable[[Any], bool] = True
    """It sees squares of other sizes than its own, or only of as many cells."""
    whole_cells: bool = False
    """A picture's side must be a whole number of cells: what is left over would make one more."""
    cell_px: Callable[[Any], int] = _patch
    image_size_px: int | None = None
    """Used when the configuration does not name one."""
    mean: tuple[float, float, float] = HALF
    std: tuple[float, float, float] = HALF
    resample: Literal["bicubic", "bilinear"] = "bicubic"
    """How its pictures were resized, where its preprocessing does not say."""


LLAVAS = ("llava", "llava_next", "llava_onevision", "vipllava")
TOWER = ("model.vision_tower", "vision_tower")
"""Where LLaVA and its kin keep their vision encoder, in today's names and in the released ones."""

VISION_FAMILIES = [
    VisionFamily(
        "clip_vision_model",
        inside=("clip", *LLAVAS),
        held_as=TOWER,
        prefix_tokens=1,
        layer=-2,
        mean=CLIP_MEAN,
        std=CLIP_STD,
    ),
    # SigLIP 2's checkpoints of one size are of this family too.
    VisionFamily("siglip_vision_model", inside=("siglip", "paligemma", "gemma3", *LLAVAS), held_as=TOWER),
    VisionFamily("siglip2_vision_model", inside=("siglip2",), patches=True, resample="bilinear"),
    VisionFamily(
        "internvl_vision",
        inside=("internvl",),
        held_as=TOWER,
        prefix_tokens=1,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    ),
    VisionFamily("dinov2", prefix_tokens=1, mean=IMAGENET_MEAN, std=IMAGENET_STD),
    VisionFamily("dinov2_with_registers", prefix_tokens=_registers, mean=IMAGENET_MEAN, std=IMAGENET_STD),
    VisionFamily("dinov3_vit", prefix_tokens=_registers, mean=IMAGENET_MEAN, std=IMAGENET_STD, resample="bilinear"),
    VisionFamily(
        "aimv2_vision_model",
        inside=("aimv2",),
        held_as=("vision_model",),
        any_size=_native,
        mean=CLIP_MEAN,
        std=CLIP_STD,
    ),
    VisionFamily("bit", feature_map=True, whole_cells=True, cell_px=_bit_stride, image_size_px=224),
    VisionFamily(
        "convnext", feature_map=True, cell_px=_convnext_stride, image_size_px=224, mean=IMAGENET_MEAN, std=IMAGENET_STD
    ),
]


def add_family(family: VisionFamily) -> None:
    """Make a family known that avlm has no record of, or replace its record.

    Args:
        family: Its record. What transformers builds for its `model_type` (`AutoConfig` and `AutoModel`, where other
            people's classes are registered too) returns `last_hidden_state`.
    """
    VISION_FAMILIES[:] = [*(f for f in VISION_FAMILIES if f.model_type != family.model_type), family]


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
        ConfigError: The picture's size does not fit the encoder's cells, or the encoder has no such layer.
    """
    family = vision_family(config)
    cell = family.cell_px(config)
    size, patches = (
        _patches(family, config, part, preprocessor) if family.patches else (_side(family, config, part), None)
    )
    if part.max_patches is not None and not family.patches:
        raise ConfigError(
            f"model.vision.max_patches={part.max_patches}: {config.model_type} sees squares of one size, not patches. "
            "Leave it out, or use an encoder that keeps a picture's aspect ratio (siglip2_vision_model)"
        )
    _check_layer(family, config, part)
    resample = {2: "bilinear", 3: "bicubic"}.get(preprocessor.get("resample", 0), family.resample)
    spec = {
        "image_size_px": size,
        "cell_px": cell,
        "mean": preprocessor.get("image_mean") or family.mean,
        "std": preprocessor.get("image_std") or family.std,
        "fit": part.fit,
        "resample": resample,
        "tiling": None if part.tiling is None else part.tiling.model_dump(),
        "max_patches": patches,
        "wrap": part.wrap,
        "reduction": part.connector.reduction().model_dump(),
    }
    return build(VisionSpec, spec, where="model.vision")


def _side(family: VisionFamily, config: Any, part: VisionPart) -> int:
    """Side of the square that an encoder is shown."""
    own = _square(getattr(config, "image_size", None) or family.image_size_px)
    size = part.image_size_px or own
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
    any_size = family.any_size(config) if callable(family.any_size) else family.any_size
    if not any_size and size // cell != own // cell:
        raise ConfigError(
            f"model.vision.image_size_px={size} makes {size // cell} x {size // cell} cells, and {config.model_type} "
            f"knows the places of {own // cell} x {own // cell} only. Use {own}, or leave it out"
        )
    return size


def _patches(family: VisionFamily, config: Any, part: VisionPart, preprocessor: dict[str, Any]) -> tuple[int, int]:
    """Side of a frame, and most patches of a picture, for an encoder that keeps the aspect ratio."""
    if part.image_size_px is not None:
        raise ConfigError(
            f"model.vision.image_size_px={part.image_size_px}: {config.model_type} keeps a picture's aspect ratio, so "
            "its size is bounded by the number of patches. Use model.vision.max_patches instead"
        )
    if part.tiling is not None:
        raise ConfigError(
            f"model.vision.tiling: {config.model_type} keeps a picture's aspect ratio and sees it whole, so there is "
            "nothing to cut. Use model.vision.max_patches for more detail"
        )
    most = int(part.max_patches or preprocessor.get("max_num_patches") or config.num_patches)
    return math.isqrt(most) * family.cell_px(config), most


def _square(size: Any) -> int:
    return int(size[0] if isinstance(size, (list, tuple)) else size)


def _check_layer(family: VisionFamily, config: Any, part: VisionPart) -> None:
    if part.layer is None:
        return
    check_layer("vision", part.layer, len(config.hidden_sizes) if family.feature_map else config.num_hidden_layers)
    if family.feature_map and part.layer != -1:
        raise ConfigError(
            f"model.vision.layer={part.layer}: the layers of {config.model_type} differ in size, and only the last one "
            "fits the count of its tokens. Use -1, or leave it out"
        )


def encode_images(
    encoder: PreTrainedModel, pixel_values: Tensor, layer: int | None, grids: Sequence[Size] | None = None
) -> list[Tensor]:
    """Look at pictures, or at tiles of them, each as if it were alone.

    Args:
        encoder: A vision encoder with a record.
        pixel_values: (N, 3, height, width), normalised; for an encoder that takes patches (N, P, p * p * 3).
        layer: Hidden state to read; None is the family's choice.
        grids: Rows and columns of each one's patches, for an encoder that takes patches.

    Returns:
        N tensors (n, C), without prefix tokens, in raster order.

    Raises:
        LayoutError: Patches were given without their rows and columns, or squares to an encoder of patches.
    """
    family = vision_family(encoder.config)
    layer = family.layer if layer is None else layer
    pixel_values = pixel_values.to(encoder.dtype)
    kwargs: dict[str, Any]
    if family.patches:
        kwargs = _patch_inputs(pixel_values, grids)
    else:
        if family.feature_map:
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)  # a third faster on a processor
        kwargs = _other_size(encoder, pixel_values)
    if layer is None:
        states = encoder(pixel_values, **kwargs).last_hidden_state
    else:
        states = read_layer(encoder, layer, pixel_values, **kwargs)
    if family.feature_map:
        return list(states.flatten(2).transpose(1, 2))
    if family.patches:
        return [state[: r * c] for state, (r, c) in zip(states, grids or (), strict=True)]
    prefix = family.prefix_tokens
    return list(states[:, prefix(encoder.config) if callable(prefix) else prefix :])


def _patch_inputs(pixel_values: Tensor, grids: Sequence[Size] | None) -> dict[str, Tensor]:
    """What an encoder of patches is told about them."""
    if grids is None or pixel_values.ndim != 3 or len(grids) != len(pixel_values):
        raise LayoutError(
            f"pixels of shape {tuple(pixel_values.shape)} were given with the rows and columns of "
            f"{0 if grids is None else len(grids)} pictures, and the vision encoder takes patches (pictures, patches, "
            "values) with theirs. Prepare the data with the model's own processor"
        )
    shapes = torch.tensor(grids, device=pixel_values.device)
    inside = torch.arange(pixel_values.shape[1], device=shapes.device) < shapes.prod(1)[:, None]
    return {"pixel_attention_mask": inside.long(), "spatial_shapes": shapes}


def _other_size(encoder: PreTrainedModel, pixel_values: Tensor) -> dict[str, bool]:
    """What the encoder must be told about pictures of another size than it was trained on."""
    own = getattr(encoder.config, "image_size", None)
    own = tuple(own) if isinstance(own, (list, tuple)) else (own, own)
    can = "interpolate_pos_encoding" in inspect.signature(encoder.forward).parameters
    return {"interpolate_pos_encoding": True} if can and own != tuple(pixel_values.shape[-2:]) else {}
