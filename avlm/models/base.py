"""What our models have in common: what they return, how they are drawn, saved and given adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_outputs import ModelOutput

from avlm.models.configuration import AvlmConfig
from avlm.models.connectors.base import Connector, ScaledNorm, Vectors


@dataclass
class AvlmOutput(ModelOutput):
    """What the model returns.

    Attributes:
        loss: Mean over target tokens, when labels were given.
        logits: (B, T or kept, V); None from `AvlmModel`.
        last_hidden_state: (B, T, D), from `AvlmModel`.
        past_key_values: The cache.
        image_hidden_states, audio_hidden_states, video_hidden_states: Connector outputs, items end to end.
        aux_loss: How unevenly a mixture's experts are used, when `output_router_logits` asked for it.
        router_logits: For each layer (tokens, experts), likewise.
        state_logits: (B, positions, classes) of the state head, at the positions asked for.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None
    audio_hidden_states: Tensor | None = None
    video_hidden_states: Tensor | None = None
    aux_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None
    state_logits: Tensor | None = None


NO_RENAMING = WeightRenaming("^$", "")
"""For who takes an empty list of renamings for none."""


class AvlmPreTrainedModel(PreTrainedModel):
    """Ways of the house for transformers."""

    config_class = AvlmConfig
    config: AvlmConfig
    base_model_prefix = "model"
    input_modalities = ("text", "image", "video", "audio")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values"]

    def _init_weights(self, module: nn.Module) -> None:
        """Draw fresh weights as transformers does, and those that it does not know as their own modules say."""
        super()._init_weights(module)
        if isinstance(module, (ScaledNorm, Vectors)):
            module.reset_parameters()
        newline = getattr(module, "image_newline", None) if isinstance(module, Connector) else None
        if isinstance(newline, Tensor):
            nn.init.normal_(newline, std=newline.shape[0] ** -0.5)

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: fresh weights are drawn by functions that leave those alone which are there, as transformers' own are.

        Taken for somebody else's code, an encoder would lose what it draws for its parts: Whisper its sinusoids.
        """
        return False

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers loads an adapter, with every tensor under its name in this model; see `save_pretrained`."""
        kwargs.setdefault("weight_mapping", get_model_conversion_mapping(self, add_legacy=False) or [NO_RENAMING])
        return super().load_adapter(*args, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers saves, with every tensor under its name in this model.

        Left alone, transformers 5.23 takes ``model.language_model.model`` for a slip of older versions: a model that
        was loaded would be saved under other names than it had, which other versions cannot read.
        """
        kwargs.setdefault("save_original_format", False)
        return super().save_pretrained(save_directory, *args, **kwargs)
