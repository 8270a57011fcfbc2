"""The model's configuration, a transformers one: `config.json` of a model directory."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from avlm.config.media import MediaSpec


class AvlmConfig(PreTrainedConfig):
    """Configuration of an audio-vision language model.

    Args:
        text_config: Of the language model.
        vision_config, audio_config: Of the encoders; None where the model has no such sense.
        audio_beside_config: Of a second audio encoder that hears the same, where there is one.
        vision_connector, audio_connector: Settings of the connectors, as in `avlm.config.model`.
        vision_layer, audio_layer: Hidden state to read; None is the family's own choice.
        media: A `MediaSpec` as plain data: what the encoders see and hear, and how that is counted.
        image_token_id, audio_token_id, video_token_id: Placeholders, positive ids of the tokenizer.
        state_classes: Classes of the state head; None where there is none.
    """

    model_type = "avlm"
    sub_configs = {
        "text_config": AutoConfig,
        "vision_config": AutoConfig,
        "audio_config": AutoConfig,
        "audio_beside_config": AutoConfig,
    }
    keys_to_ignore_at_inference = [
        "past_key_values",
        "image_hidden_states",
        "audio_hidden_states",
        "video_hidden_states",
    ]

    def __init__(
        self,
        text_config: dict[str, Any] | PreTrainedConfig | None = None,
        vision_config: dict[str, Any] | PreTrainedConfig | None = None,
        audio_config: dict[str, Any] | PreTrainedConfig | None = None,
        vision_connector: dict[str, Any] | None = None,
        audio_connector: dict[str, Any] | None = None,
        vision_layer: int | None = None,
        audio_layer: int | None = None,
        media: dict[str, Any] | None = None,
        image_token_id: int | None = None,
        audio_token_id: int | None = None,
        video_token_id: int | None = None,
        audio_beside_config: dict[str, Any] | PreTrainedConfig | None = None,
        state_classes: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.text_config = _sub_config(text_config) or AutoConfig.for_model("llama")
        self.vision_config = _sub_config(vision_config)
        self.audio_config = _sub_config(audio_config)
        self.audio_beside_config = _sub_config(audio_beside_config)
        self.vision_connector = vision_connector
        self.audio_connector = audio_connector
        self.vision_layer = vision_layer
        self.audio_layer = audio_layer
        self.media = MediaSpec.model_validate(media or {}).model_dump(mode="json")
        self.image_token_id = image_token_id
        self.audio_token_id = audio_token_id
        self.video_token_id = video_token_id
        self.state_classes = state_classes
        kwargs.setdefault("tie_word_embeddings", getattr(self.text_config, "tie_word_embeddings", False))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if kwargs.get(name) is None:
                kwargs[name] = getattr(self.text_config, name, None)
        super().__init__(**kwargs)

    def media_spec(self) -> MediaSpec:
        """What the encoders see and hear, typed."""
        return MediaSpec.model_validate(self.media)

    def newline(self) -> bool:
        """Whether the vision connector has a learned vector that ends each row of a picture's grid."""
        vision = self.media_spec().vision
        return vision is not None and vision.newline


def _sub_config(config: dict[str, Any] | PreTrainedConfig | None) -> PreTrainedConfig | None:
    if isinstance(config, dict):
        config = dict(config)
        return AutoConfig.for_model(config.pop("model_type"), **config)
    return config
