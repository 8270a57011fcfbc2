"""The audio-vision language model, as a transformers model.

Encoders look and listen, connectors translate, `fusion` fills the reserved places,
and the language model, whichever it is, reads on. The causal language model is held
whole, with its head, so that what a family does to its logits (soft caps, scales)
is done by that family's own code.

Shapes in this file:
    B  rows or prompts    T  token positions    D  language-model width    V  vocabulary
    N  pictures           F  frames of video    A  clips of sound
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from avlm.errors import LayoutError
from avlm.layout import reduced_count
from avlm.models import attention
from avlm.models.configuration import AvlmConfig
from avlm.models.connectors import build_connector
from avlm.models.encoders import build_encoder, encode_images, encode_sounds, encoder_width
from avlm.models.fusion import check_counts, place_embeddings
from avlm.samples import Place


@dataclass
class AvlmOutput(ModelOutput):
    """What the model returns.

    Attributes:
        loss: Mean over target tokens, when labels were given.
        logits: (B, T or kept, V); None from `AvlmModel`.
        last_hidden_state: (B, T, D), from `AvlmModel`.
        past_key_values: The cache.
        image_hidden_states, audio_hidden_states, video_hidden_states: Connector outputs, items end to end.
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


class AvlmModel(AvlmPreTrainedModel):
    """Encoders, connectors and the language model; returns hidden states."""

    def __init__(self, config: AvlmConfig) -> None:
        super().__init__(config)
        width = config.text_config.get_text_config().hidden_size
        for sense in ("vision", "audio"):
            encoder_config = getattr(config, f"{sense}_config")
            tower = connector = None
            if encoder_config is not None:
                tower = build_encoder(encoder_config)
                connector = build_connector(getattr(config, f"{sense}_connector"), encoder_width(encoder_config), width)
            setattr(self, f"{sense}_tower", tower)
            setattr(self, f"{sense}_connector", connector)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_decoder(self) -> nn.Module:
        return self.language_model.get_decoder()

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Pictures (N, 3, height, width) to tokens, end to end: (N * tokens, D)."""
        if self.vision_tower is None or self.vision_connector is None:
            raise LayoutError(
                "pixels were given to a model without a vision part. Leave them out, or use a model that sees"
            )
        states = encode_images(self.vision_tower, pixel_values, self.config.vision_layer)
        tokens: Tensor = self.vision_connector(list(states))
        return tokens

    def get_video_features(self, pixel_values_videos: Tensor) -> Tensor:
        """Frames (F, 3, height, width) to tokens, end to end."""
        return self.get_image_features(pixel_values_videos)

    def get_audio_features(self, input_features: Tensor, input_features_mask: Tensor | None = None) -> Tensor:
        """Clips (A, bins, frames) and their mask to tokens, end to end."""
        return self._hear(input_features, input_features_mask)[0]

    def _hear(self, input_features: Tensor, mask: Tensor | None) -> tuple[Tensor, list[int]]:
        spec = self.config.media_spec().audio
        if self.audio_tower is None or self.audio_connector is None or spec is None:
            raise LayoutError(
                "sound was given to a model without an audio part. Leave it out, or use a model that hears"
            )
        if mask is None:
            mask = input_features.new_ones(input_features.shape[0], input_features.shape[2], dtype=torch.bool)
        states = encode_sounds(self.audio_tower, input_features, mask.bool(), spec)
        return self.audio_connector(states), [reduced_count(s.shape[0], spec.reduction) for s in states]

    def embed(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        input_features: Tensor | None = None,
        input_features_mask: Tensor | None = None,
        places: list[Place] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Embed tokens and fill the places of media.

        Returns:
            Embeddings (B, T, D), and the connector outputs of each kind.

        Raises:
            LayoutError: Places and embeddings disagree; with ``places`` the message names the sample and the item.
        """
        features: dict[str, Tensor] = {}
        counts: dict[str, list[int]] = {}
        for kind, pixels in (("image", pixel_values), ("video", pixel_values_videos)):
            if pixels is not None and len(pixels):
                features[kind] = self.get_image_features(pixels)
                counts[kind] = [len(features[kind]) // len(pixels)] * len(pixels)
        if input_features is not None and len(input_features):
            features["audio"], counts["audio"] = self._hear(input_features, input_features_mask)
        if places is not None:
            check_counts(places, counts)
        embeds = self.get_input_embeddings()(input_ids)
        for kind in ("image", "video", "audio"):
            token_id = getattr(self.config, f"{kind}_token_id")
            if token_id is None:
                continue
            media = features.get(kind)
            if media is None:
                media = embeds.new_zeros(0, embeds.shape[-1])
            embeds = place_embeddings(embeds, input_ids, token_id, media, kind)
        return embeds, features

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        input_features: Tensor | None = None,
        input_features_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> AvlmOutput:
        """Hidden states of the language model over text and media."""
        features: dict[str, Tensor] = {}
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds, features = self.embed(
                input_ids, pixel_values, pixel_values_videos, input_features, input_features_mask
            )
        kwargs.pop("logits_to_keep", None)
        outputs = self.language_model.get_decoder()(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return AvlmOutput(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.get("past_key_values"),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            **_media_outputs(features),
        )


class AvlmForConditionalGeneration(AvlmPreTrainedModel, GenerationMixin):
    """The whole model: media and text in, the next token's logits out."""

    def __init__(self, config: AvlmConfig) -> None:
        super().__init__(config)
        self.model = AvlmModel(config)
        self.post_init()

    @property
    def language_model(self) -> PreTrainedModel:
        model = self.model.language_model
        assert isinstance(model, PreTrainedModel)
        return model

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def get_decoder(self) -> nn.Module:
        return self.model.get_decoder()

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """See `AvlmModel.get_image_features`."""
        return self.model.get_image_features(pixel_values)

    def get_video_features(self, pixel_values_videos: Tensor) -> Tensor:
        """See `AvlmModel.get_video_features`."""
        return self.model.get_video_features(pixel_values_videos)

    def get_audio_features(self, input_features: Tensor, input_features_mask: Tensor | None = None) -> Tensor:
        """See `AvlmModel.get_audio_features`."""
        return self.model.get_audio_features(input_features, input_features_mask)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        input_features: Tensor | None = None,
        input_features_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        row_lengths: list[int] | None = None,
        places: list[Place] | None = None,
        **kwargs: Any,
    ) -> AvlmOutput:
        """Read text and media.

        Args:
            input_ids: (B, T), placeholders written out, one id for each media token.
            attention_mask: (B, T) for padded prompts; leave out for a packed row.
            pixel_values: (N, 3, height, width), all pictures in reading order.
            pixel_values_videos: (F, 3, height, width), all frames in reading order.
            input_features, input_features_mask: (A, bins, frames) and (A, frames), all clips in reading order.
            labels: (B, T), -100 where nothing is learned; shifted here, not by the caller.
            logits_to_keep: Compute logits only for the last so many positions, or at these positions.
            row_lengths: Tokens of each sample, when the one row of the batch is packed.
            places: Reserved places, so that a mismatch is reported by sample and item.

        Returns:
            Logits, and the loss as a mean over target tokens when labels are given.

        Raises:
            LayoutError: Places and media disagree.
        """
        features: dict[str, Tensor] = {}
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds, features = self.model.embed(
                input_ids, pixel_values, pixel_values_videos, input_features, input_features_mask, places
            )
        if row_lengths is not None:
            kwargs.update(attention.packed_kwargs(row_lengths, inputs_embeds.device))
            kwargs["use_cache"] = False  # with a cache transformers overlooks the borders that the positions show
            attention_mask = self._packed_mask(inputs_embeds)
        kept = _can_keep(self.language_model)
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **({"logits_to_keep": logits_to_keep} if kept else {}),
            **kwargs,
        )
        logits = outputs.logits if kept else _keep(outputs.logits, logits_to_keep)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **_loss_kwargs(kwargs))
        return AvlmOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.get("past_key_values"),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            **_media_outputs(features),
        )

    def _packed_mask(self, embeds: Tensor) -> Tensor | None:
        """A packed row has no mask: its borders are its mask.

        transformers would build one of T x T from the positions. Its door for a mask made elsewhere (four dimensions,
        passed on as it is) keeps it from doing so for our attention; the others get the one it builds.
        """
        if self.config.text_config._attn_implementation == attention.NAME:
            return embeds.new_zeros(1, 1, 1, 1)
        return None


def _can_keep(language_model: nn.Module) -> bool:
    return "logits_to_keep" in inspect.signature(language_model.forward).parameters


def _keep(logits: Tensor, positions: int | Tensor) -> Tensor:
    """What `logits_to_keep` means, for a language model that does not know it."""
    if isinstance(positions, int):
        return logits[:, -positions:] if positions else logits
    return logits[:, positions]


def _loss_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {"num_items_in_batch": kwargs["num_items_in_batch"]} if "num_items_in_batch" in kwargs else {}


def _media_outputs(features: dict[str, Tensor]) -> dict[str, Tensor | None]:
    return {f"{kind}_hidden_states": features.get(kind) for kind in ("image", "audio", "video")}
