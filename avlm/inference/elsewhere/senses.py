"""Encoders and connectors without the language model, for a server that brings its own."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from avlm.models.configuration import AvlmConfig
from avlm.models.modeling import AvlmModel


def make_senses(config: AvlmConfig) -> AvlmModel:
    """The model's encoders and connectors, under the names that they have in it, with weights yet to be loaded."""
    width = config.text_config.get_text_config().hidden_size
    light = copy.deepcopy(config)
    # A language model of the same width and nothing in it, as one has to be built.
    light.text_config = LlamaConfig(
        vocab_size=8, hidden_size=width, num_hidden_layers=0, num_attention_heads=1, num_key_value_heads=1
    )
    senses = AvlmModel(light)
    del senses.language_model
    senses.eval()
    return senses


def picture_embeddings(senses: AvlmModel, pixel_values: Tensor, image_sizes: Tensor | None) -> list[Tensor]:
    """For each picture its tokens (tokens, D)."""
    found: list[Tensor] = senses.get_image_features(pixel_values, image_sizes).pooler_output
    return found


def sound_embeddings(senses: AvlmModel, chunks: list[dict[str, Any]]) -> list[Tensor]:
    """For each sound, given as its chunks' features by name, its tokens (tokens, D)."""
    return [torch.cat(list(senses.get_audio_features(**sound).pooler_output)) for sound in chunks]
