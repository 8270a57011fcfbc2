"""One record for each family of encoders, and one call for all of them.

Everything a family does its own way stands in its record: which released classes
it has, how many prefix tokens it puts before the picture, which layer is read,
what its input looks like. Adding a family is adding a record to a table below.

Shapes in this file:
    N  pictures or clips    C  encoder width    n  embeddings of one item
    B  mel bins             M  mel frames
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from avlm.config.media import AudioSpec, Convolution, VisionSpec
from avlm.config.model import AudioPart, VisionPart
from avlm.errors import ConfigError, LayoutError, WeightsError

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


@dataclass(frozen=True, slots=True)
class AudioFamily:
    """What is particular about one family of audio encoders."""

    model_type: str
    inside: tuple[str, ...] = ()
    held_as: tuple[str, ...] = ()
    """Where in a composite checkpoint its weights stand."""
    lengths: tuple[Literal["true", "window"], ...] = ("true", "window")
    """Which ways of hearing it has: each clip at its own length, or padded to the released window."""
    convolutions: tuple[Convolution, ...] = (Convolution(stride=1), Convolution(stride=2))
    sample_rate_hz: int = 16_000
    n_fft: int = 400
    hop: int = 160


# A released Whisper is a whole speech-to-text model; its decoder is never built.
AUDIO_FAMILIES = (AudioFamily("whisper", held_as=("model.encoder", "encoder")),)


def vision_family(config: PreTrainedConfig) -> VisionFamily:
    """The record of a vision encoder's configuration.

    Raises:
        ConfigError: avlm has no record of this family.
    """
    for family in VISION_FAMILIES:
        if config.model_type == family.model_type:
            return family
    raise ConfigError(_unknown("vision", config.model_type, [f.model_type for f in VISION_FAMILIES]))


def audio_family(config: PreTrainedConfig) -> AudioFamily:
    """The record of an audio encoder's configuration.

    Raises:
        ConfigError: avlm has no record of this family.
    """
    for family in AUDIO_FAMILIES:
        if config.model_type == family.model_type:
            return family
    raise ConfigError(_unknown("audio", config.model_type, [f.model_type for f in AUDIO_FAMILIES]))


def _unknown(sense: str, model_type: str, known: list[str]) -> str:
    article = {"vision": "a vision", "audio": "an audio"}[sense]
    return (
        f"{model_type} is not {article} encoder that avlm has a record of, so its tokens cannot be counted. "
        f"Use one of {', '.join(known)}, or add a record to avlm/models/encoders.py"
    )


def inner_config(config: PreTrainedConfig, sense: Literal["vision", "audio"]) -> PreTrainedConfig:
    """The encoder's own configuration, out of a composite one (CLIP's vision half, say) where needed."""
    families = VISION_FAMILIES if sense == "vision" else AUDIO_FAMILIES
    if any(config.model_type in family.inside for family in families):
        inner = getattr(config, f"{sense}_config")
        assert isinstance(inner, PreTrainedConfig)
        return inner
    return config


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
    _check_layer("vision", part.layer, len(config.hidden_sizes) if family.feature_map else config.num_hidden_layers)
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


def audio_spec(config: PreTrainedConfig, part: AudioPart) -> AudioSpec:
    """What the encoder wants to hear.

    Raises:
        ConfigError: The family cannot hear at the asked length, or has no such layer.
    """
    family = audio_family(config)
    if part.length not in family.lengths:
        raise ConfigError(
            f"model.audio.length={part.length} is not something {config.model_type} can do. "
            f"Use model.audio.length={family.lengths[0]}"
        )
    _check_layer("audio", part.layer, config.encoder_layers)
    longest = int(config.max_source_positions) * family.convolutions[-1].stride
    return AudioSpec(
        sample_rate_hz=family.sample_rate_hz,
        mel_bins=int(config.num_mel_bins),
        n_fft=family.n_fft,
        hop=family.hop,
        level=part.level,
        window_frames=longest if part.length == "window" else None,
        max_frames=longest,
        convolutions=family.convolutions,
        reduction=part.connector.reduction(),
    )


def _check_layer(sense: str, layer: int | None, layers: int) -> None:
    if layer is not None and not -layers - 1 <= layer <= layers:
        raise ConfigError(
            f"model.{sense}.layer={layer}: the encoder has {layers} layers, so its hidden states are 0 to {layers}, or "
            f"{-layers - 1} to -1 from behind. Use one of them"
        )


def build_encoder(config: PreTrainedConfig) -> PreTrainedModel:
    """An encoder with fresh weights, from its own configuration (never a whole speech-to-text model)."""
    if config.model_type == "whisper":
        return WhisperEncoder(config)
    model: PreTrainedModel = AutoModel.from_config(config)
    return model


def load_encoder(path: str, config: PreTrainedConfig) -> PreTrainedModel:
    """An encoder with its released weights, out of a composite checkpoint where needed.

    Args:
        path: Hub name or local folder in Hugging Face format.
        config: The encoder's own configuration, as `inner_config` gives it.

    Raises:
        WeightsError: The checkpoint lacks weights of the encoder.
    """
    kind = type(build_on_meta(config))
    families = (*VISION_FAMILIES, *AUDIO_FAMILIES)
    held = [name for family in families if family.model_type == config.model_type for name in family.held_as]
    model, info = kind.from_pretrained(
        path,
        config=config,
        key_mapping={rf"^{re.escape(name)}\.(.+)": r"\1" for name in held} or None,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are told below, with the missing ones
    )
    missing = {*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])}
    if missing:
        raise WeightsError(
            f"{path}: {len(missing)} weights of the {config.model_type} encoder are missing, {min(missing)} among "
            "them. Give the folder of a whole checkpoint"
        )
    return model


def build_on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    """The encoder's module tree without memory behind it."""
    with torch.device("meta"):
        return build_encoder(config)


def read_config(path: str, sense: Literal["vision", "audio"]) -> PreTrainedConfig:
    """Read an encoder's configuration from the hub or a folder."""
    return inner_config(AutoConfig.from_pretrained(path, trust_remote_code=False), sense)


def encoder_width(config: PreTrainedConfig) -> int:
    """C, the width of an encoder's embeddings."""
    if config.model_type == "bit" and config.width_factor != 1:
        return int(build_on_meta(config).encoder.stages[-1].layers[-1].conv3.out_channels)
    if hasattr(config, "hidden_sizes"):
        return int(config.hidden_sizes[-1])
    return int(getattr(config, "d_model", None) or config.hidden_size)


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


def encode_sounds(
    encoder: PreTrainedModel, features: Tensor, mask: Tensor, spec: AudioSpec, layer: int | None = None
) -> list[Tensor]:
    """Hear clips, each as if it were alone.

    Args:
        encoder: An audio encoder with a record.
        features: (N, B, M) log-mel frames, padded with zeros to the longest clip.
        mask: bool (N, M), True where there is sound.
        spec: The window, or true lengths.
        layer: Hidden state to read, counted as in `hidden_states`; None is the encoder's output.

    Returns:
        N tensors (n_i, C).

    Raises:
        LayoutError: A clip is empty or longer than the encoder hears.
    """
    features = features.to(encoder.dtype)
    lengths: list[int] = mask.sum(1).tolist()
    _check_lengths(lengths, features.shape[2], spec)
    if spec.window_frames is not None:
        if layer is None:
            return list(encoder(features).last_hidden_state)
        return list(encoder(features, output_hidden_states=True).hidden_states[layer])
    found: list[Tensor | None] = [None] * len(lengths)
    for members in _similar(lengths):
        longest = lengths[members[0]]
        states = _whisper_true_length(encoder, features[members, :, :longest], mask[members, :longest], layer)
        for i, state in zip(members, states, strict=True):
            found[i] = state
    return [state for state in found if state is not None]


def _check_lengths(lengths: list[int], padded: int, spec: AudioSpec) -> None:
    """Refuse clips that the encoder cannot hear, by their number in the batch."""
    if spec.window_frames is not None and padded != spec.window_frames:
        raise LayoutError(
            f"clips of {padded} mel frames were given, and the audio encoder hears windows of {spec.window_frames}. "
            "Prepare the data with the model's own processor"
        )
    for i, length in enumerate(lengths):
        if not 0 < length <= spec.max_frames:
            raise LayoutError(
                f"clip {i} has {length} mel frames, and the audio encoder hears 1 to {spec.max_frames}. "
                "Leave it out, or cut it into shorter clips"
            )


def _similar(lengths: list[int]) -> list[list[int]]:
    """Indices grouped so that no clip is padded by more than a third of itself, longest first in each group."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and lengths[i] * 4 >= lengths[groups[-1][0]] * 3:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _whisper_true_length(encoder: Any, features: Tensor, mask: Tensor, which: int | None) -> list[Tensor]:
    """Whisper's encoder on clips shorter than its window: no position beyond a clip's end is ever seen.

    transformers' own forward insists on the full window and hears the padding as silence (arXiv:2212.04356 trains on
    it); here each clip ends where it ends, as Ultravox does. At the full window both agree.
    """
    # Each convolution must see zeros beyond a clip's end, as at the end of a window.
    features = features.masked_fill(~mask[:, None], 0)
    states = F.gelu(encoder.conv1(features)).masked_fill(~mask[:, None], 0)
    states = F.gelu(encoder.conv2(states)).transpose(1, 2)
    inside = mask[:, ::2]
    positions = torch.arange(states.shape[1], device=states.device)
    states = states + encoder.embed_positions(positions)
    states = F.dropout(states, encoder.dropout, encoder.training)
    attention_mask = None
    if not bool(inside.all()):
        attention_mask = torch.zeros(inside.shape, dtype=states.dtype, device=states.device)
        attention_mask = attention_mask.masked_fill(~inside, torch.finfo(states.dtype).min)[:, None, None, :]
    last = len(encoder.layers)
    wanted = last if which is None else which % (last + 1)
    for layer in encoder.layers[:wanted]:
        states = layer(states, attention_mask)
    if wanted == last:
        states = encoder.layer_norm(states)
    return [state[:count] for state, count in zip(states, inside.sum(1).tolist(), strict=True)]
