"""Encoders as modules: built afresh, loaded out of whatever checkpoint holds them, measured.

What is particular about a family stands in its record, in `vision_encoders` or `audio_encoders`.
"""

from __future__ import annotations

import re
from typing import Literal

import torch
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from avlm.errors import WeightsError
from avlm.models.audio_encoders import AUDIO_FAMILIES, AudioFamily
from avlm.models.vision_encoders import VISION_FAMILIES, VisionFamily


def inner_config(config: PreTrainedConfig, sense: Literal["vision", "audio"]) -> PreTrainedConfig:
    """The encoder's own configuration, out of a composite one (CLIP's vision half, say) where needed."""
    families = VISION_FAMILIES if sense == "vision" else AUDIO_FAMILIES
    if any(config.model_type in family.inside for family in families):
        inner = getattr(config, f"{sense}_config")
        assert isinstance(inner, PreTrainedConfig)
        return inner
    return config


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
    families: list[VisionFamily | AudioFamily] = [*VISION_FAMILIES, *AUDIO_FAMILIES]
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
