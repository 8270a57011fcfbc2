"""The audio-vision language model, as a transformers model.

Encoders look and listen, connectors translate, `fusion` fills the reserved places,
and the language model, whichever it is, reads on. The causal language model is held
whole, with its head, so that what a family does to its logits (soft caps, scales)
is done by that family's own code.

Shapes in this file:
    B  rows or prompts    T  token positions    D  language-model width    V  vocabulary
    N  pictures, or tiles of them    F  frames of video    A  chunks of sound    P  patches, of side p
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    Cache,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    SuppressTokensLogitsProcessor,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput
from transformers.utils import logging

from avlm.errors import ConfigError, LayoutError
from avlm.layout import Size, reduced_count
from avlm.models import attention
from avlm.models.base import AvlmOutput, AvlmPreTrainedModel
from avlm.models.beside import Joined
from avlm.models.configuration import AvlmConfig
from avlm.models.connectors import build_connector
from avlm.models.encoders import build_encoder, encoder_width
from avlm.models.features import FeatureStore, hear, look
from avlm.models.fusion import check_counts, place_embeddings
from avlm.models.heads import plain_head
from avlm.models.products import keep_few_programs
from avlm.models.reading import borders, checked_lengths, read_once, read_padded, refuse_mask
from avlm.models.tiles import check_grids, join_tiles, picture_grids
from avlm.models.written import Layer, Written, layers_of, same_weights, written_out
from avlm.samples import IGNORE, Place

logger = logging.get_logger(__name__)

SOUND = ("input_features", "input_features_mask", "input_features_beside", "input_features_beside_mask")
MEDIA = ("pixel_values", "image_sizes", "pixel_values_videos", *SOUND)
"""What the forward pass takes beside text."""

KINDS = ("image", "video", "audio")


FOR_LOSS = ("num_items_in_batch", "shift_labels", "ignore_index")
"""Arguments of a forward pass that transformers' losses take."""


class AvlmModel(AvlmPreTrainedModel):
    """Encoders, connectors and the language model; returns hidden states."""

    def __init__(self, config: AvlmConfig) -> None:
        keep_few_programs()
        super().__init__(config)
        width = config.text_config.get_text_config().hidden_size
        for sense in ("vision", "audio"):
            encoder_config = getattr(config, f"{sense}_config")
            tower = connector = None
            if encoder_config is not None:
                tower = build_encoder(encoder_config)
                connector = sense_connector(config, sense, width)
            setattr(self, f"{sense}_tower", tower)
            setattr(self, f"{sense}_connector", connector)
        beside = config.audio_beside_config
        self.audio_beside_tower = None if beside is None else build_encoder(beside)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.features: FeatureStore | None = None  # where frozen encoders' outputs may be found
        self._packs: bool | None = None  # whether rows go through packed; None until it has been seen
        self.takes_slots: bool | None = None  # whether answers may stand in `slots`; None until it has been seen
        self.post_init()

    @property
    def packs_rows(self) -> bool:
        """Whether packed rows go through as they are; else they are laid out as padded batches."""
        name = self.language_model.config.get_text_config()._attn_implementation
        can = attention.can_pack(self.language_model) if self._packs is None else self._packs
        return name == attention.NAME and can

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers loads; a directory of the whole model gives its inner one."""
        own = {r"^model\.(?=(language_model|(vision|audio|audio_beside)_tower|(vision|audio)_connector)\.)": ""}
        kwargs["key_mapping"] = {**own, **(kwargs.get("key_mapping") or {})}
        return super().from_pretrained(*args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_decoder(self) -> nn.Module:
        return self.language_model.get_decoder()

    def get_image_features(
        self, pixel_values: Tensor, image_sizes: Tensor | None = None, *, return_dict: bool | None = None
    ) -> Any:
        """Look at pictures.

        Args:
            pixel_values: (N, 3, height, width), the tiles of all pictures end to end; or patches (N, P, p * p * 3).
            image_sizes: (pictures, 2), height and width of each as decoded, where the layout depends on them.
            return_dict: False: a tuple of these, as where the configuration says so.

        Returns:
            ``pooler_output``: for each picture its tokens (tokens, D); ``last_hidden_state``: the encoder's embeddings
            of each tile, padded with zeros to the longest.
        """
        return _features(*self._see(pixel_values, image_sizes), _wants_dict(return_dict, self.config))

    def _see(
        self, pixel_values: Tensor, image_sizes: Tensor | None = None, *, frames: bool = False
    ) -> tuple[list[Tensor], Tensor, list[int]]:
        """The encoder's embeddings of each tile, the tokens of all pictures end to end, and how many each has.

        Args:
            frames: Of videos: each is one square.
        """
        spec = self.config.media_spec().vision
        if self.vision_tower is None or self.vision_connector is None or spec is None:
            raise LayoutError(
                "pixels were given to a model without a vision part. Leave them out, or use a model that sees"
            )
        sizes: list[Size] | None = None
        if spec.sized and not frames:
            if image_sizes is None:
                raise LayoutError(
                    "pixel_values were given without image_sizes, and this model's layout depends on the height and "
                    "width of each picture. Prepare the data with the model's own processor"
                )
            sizes = [(int(height), int(width)) for height, width in image_sizes.tolist()]
        pictures = picture_grids(spec, len(pixel_values), sizes)
        grids = [grid for tiles in pictures for grid in tiles]
        states = look(self.features, self.vision_tower, pixel_values, self.config.vision_layer, grids)
        check_grids(states, grids)
        newline = self.vision_connector.image_newline if spec.newline else None
        return states, *join_tiles(self.vision_connector(states, grids), pictures, sizes, spec, newline)

    def _look(
        self, pictures: Tensor | None, image_sizes: Tensor | None, frames: Tensor | None
    ) -> Iterator[tuple[str, Tensor, list[int]]]:
        """Tokens of all pictures and of all frames, and how many each has; in one call where they are of one shape."""
        given = {"image": pictures, "video": frames}
        there = {kind: pixels for kind, pixels in given.items() if pixels is not None and len(pixels)}
        spec = self.config.media_spec().vision
        if len(there) == 2 and spec is not None and not spec.sized:
            _, tokens, counts = self._see(torch.cat(list(there.values())), frames=True)
            number = len(there["image"])
            parts = counts[:number], counts[number:]
            yield from zip(there, tokens.split([sum(part) for part in parts]), parts, strict=True)
            return
        for kind, pixels in there.items():
            _, tokens, counts = self._see(pixels, image_sizes if kind == "image" else None, frames=kind == "video")
            yield kind, tokens, counts

    def get_video_features(self, pixel_values_videos: Tensor, *, return_dict: bool | None = None) -> Any:
        """Look at frames (F, 3, height, width), or their patches; as `get_image_features`, for each frame."""
        return _features(*self._see(pixel_values_videos, frames=True), _wants_dict(return_dict, self.config))

    def get_audio_features(
        self,
        input_features: Tensor,
        input_features_mask: Tensor | None = None,
        input_features_beside: Tensor | None = None,
        input_features_beside_mask: Tensor | None = None,
        *,
        return_dict: bool | None = None,
    ) -> Any:
        """Hear chunks of sound (A, bins, frames) with their mask (A, frames), and as a second encoder takes them.

        Returns:
            ``pooler_output``: for each chunk its tokens (tokens, D); ``last_hidden_state``: the (first) encoder's
            embeddings, padded with zeros to the longest chunk.
        """
        sound = (input_features, input_features_mask, input_features_beside, input_features_beside_mask)
        return _features(*self._hear(*sound), _wants_dict(return_dict, self.config))

    def _hear(
        self, features: Tensor, mask: Tensor | None, beside: Tensor | None, beside_mask: Tensor | None
    ) -> tuple[list[Tensor], Tensor, list[int]]:
        """The encoder's embeddings of each chunk, the tokens of all chunks end to end, and how many each has."""
        spec = self.config.media_spec().audio
        if self.audio_tower is None or self.audio_connector is None or spec is None:
            raise LayoutError(
                "sound was given to a model without an audio part. Leave it out, or use a model that hears"
            )
        heard = features, _whole(mask, features), spec, self.config.audio_layer
        states = hear(self.features, "audio", self.audio_tower, *heard)
        if self.audio_beside_tower is None or spec.beside is None:
            return states, self.audio_connector(states), [reduced_count(len(s), spec.reduction) for s in states]
        if beside is None or len(beside) != len(features):
            found = 0 if beside is None else len(beside)
            raise LayoutError(
                f"{len(features)} chunks of sound were given for the first audio encoder and {found} for the second, "
                "and both hear the same. Prepare the data with the model's own processor"
            )
        heard_beside = beside, _whole(beside_mask, beside), spec.beside
        others = hear(self.features, "audio_beside", self.audio_beside_tower, *heard_beside)
        counts = [reduced_count(max(len(a), len(b)), spec.reduction) for a, b in zip(states, others, strict=True)]
        return states, self.audio_connector(states, others), counts

    def get_placeholder_mask(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None = None,
        image_features: Tensor | None = None,
        video_features: Tensor | None = None,
        audio_features: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Places of images, of frames and of sound, each bool (B, T, 1).

        Args:
            input_ids: Tokens, or None to find the places by the placeholders' embeddings in ``inputs_embeds``.

        Raises:
            LayoutError: Features were given and are more or fewer than their places.
        """
        ids = self._ids(inputs_embeds) if input_ids is None else input_ids
        masks = []
        for kind, features in zip(KINDS, (image_features, video_features, audio_features), strict=True):
            token_id = getattr(self.config, f"{kind}_token_id")
            mask = torch.zeros_like(ids, dtype=torch.bool) if token_id is None else ids == token_id
            places = int(mask.sum())
            found = None if features is None else features.numel() // features.shape[-1]
            if found is not None and found != places:
                raise LayoutError(
                    f"the text reserves {places} {kind} places, and there are {found} embeddings. "
                    "Prepare the data with the model's own processor"
                )
            masks.append(mask.unsqueeze(-1))
        return masks[0], masks[1], masks[2]

    def _ids(self, inputs_embeds: Tensor | None) -> Tensor:
        """Tokens as far as embeddings tell: placeholders where theirs stand, -1 everywhere else."""
        if inputs_embeds is None:
            raise _neither()
        table = self.get_input_embeddings()
        ids = torch.full(inputs_embeds.shape[:2], -1, device=inputs_embeds.device)
        for kind in KINDS:
            token_id = getattr(self.config, f"{kind}_token_id")
            if token_id is not None:
                placeholder = table(torch.tensor(token_id, device=ids.device))
                ids = ids.masked_fill((inputs_embeds == placeholder).all(-1), token_id)
        return ids

    def embed(
        self,
        input_ids: Tensor | None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        input_features: Tensor | None = None,
        input_features_mask: Tensor | None = None,
        places: list[Place] | None = None,
        inputs_embeds: Tensor | None = None,
        input_features_beside: Tensor | None = None,
        input_features_beside_mask: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Embed tokens and fill the places of media.

        Args:
            places: Reserved places, so that a mismatch is reported by sample and item.
            inputs_embeds: Embeddings instead of tokens; those of placeholders are filled.

        Returns:
            Embeddings (B, T, D), and the connector outputs of each kind.

        Raises:
            LayoutError: Places and embeddings disagree; with ``places`` the message names the sample and the item.
        """
        features: dict[str, Tensor] = {}
        counts: dict[str, list[int]] = {}
        for kind, tokens, found in self._look(pixel_values, image_sizes, pixel_values_videos):
            features[kind], counts[kind] = tokens, found
        if input_features is not None and len(input_features):
            sound = (input_features, input_features_mask, input_features_beside, input_features_beside_mask)
            _, features["audio"], counts["audio"] = self._hear(*sound)
        if places is not None:
            check_counts(places, counts)
        if inputs_embeds is not None:
            embeds, input_ids = inputs_embeds, self._ids(inputs_embeds) if features else None
        elif input_ids is not None:
            embeds = self.get_input_embeddings()(input_ids)
        else:
            raise _neither()
        if input_ids is not None:
            for kind in KINDS:
                embeds = self._fill(embeds, input_ids, kind, features.get(kind))
        return embeds, features

    def _fill(self, embeds: Tensor, input_ids: Tensor, kind: str, media: Tensor | None) -> Tensor:
        token_id = getattr(self.config, f"{kind}_token_id")
        if token_id is None:
            if media is None:
                return embeds
            raise LayoutError(
                f"{len(media)} embeddings of {kind} were made, and the model's configuration has no {kind}_token_id "
                f"that reserves places for them. Set {kind}_token_id to the tokenizer's placeholder"
            )
        if media is None:
            media = embeds.new_zeros(0, embeds.shape[-1])
        return place_embeddings(embeds, input_ids, token_id, media, kind)

    def read(
        self,
        reader: nn.Module,
        embeds: Tensor,
        *,
        row_lengths: Sequence[int] | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        logits_to_keep: int | Tensor | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        """Run the language model, or its decoder alone, over embeddings.

        Args:
            reader: The one or the other.
            embeds: (B, T, D); one row where it is packed.
            row_lengths: Tokens of each sample of a packed row. Where the language model cannot keep samples apart in a
                row, they are laid out as a padded batch and end to end again behind it: slower, with the same result.
            logits_to_keep: For the language model; see `AvlmForConditionalGeneration.forward`.

        Raises:
            LayoutError: The lengths are not those of the row, or a mask hides something in it.
        """
        kwargs["return_dict"] = True
        if row_lengths is None:
            kwargs |= {"attention_mask": attention_mask, "position_ids": position_ids}
            return read_once(reader, embeds, logits_to_keep, kwargs)
        refuse_mask(attention_mask)
        lengths = checked_lengths(row_lengths, embeds)
        if position_ids is None:
            position_ids = torch.cat([torch.arange(length, device=embeds.device) for length in lengths])[None]
        kwargs |= {"position_ids": position_ids, "use_cache": False}
        if self.packs_rows:
            calls: list[str] | None = [] if self._packs is None else None
            output = read_once(reader, embeds, logits_to_keep, {**kwargs, **borders(embeds, lengths, calls)})
            if calls is None or attention.proven(calls, self.language_model):
                self._packs = True
                return output
            self._packs = False
        name = self.language_model.config.get_text_config()._attn_implementation
        logger.warning_once(
            f"{type(self.language_model).__name__} with {name} attention cannot keep the samples of a packed row "
            "apart, so every row is laid out as a padded batch: the same losses, more computing."
        )
        return read_padded(reader, embeds, lengths, logits_to_keep, kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        input_features: Tensor | None = None,
        input_features_mask: Tensor | None = None,
        row_lengths: Sequence[int] | None = None,
        places: list[Place] | None = None,
        return_dict: bool | None = None,
        input_features_beside: Tensor | None = None,
        input_features_beside_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> AvlmOutput | tuple[Any, ...]:
        """Hidden states of the language model over text and media; see `AvlmForConditionalGeneration.forward`."""
        _one_of(input_ids, inputs_embeds)
        seen = pixel_values, image_sizes, pixel_values_videos
        heard = input_features, input_features_mask, input_features_beside, input_features_beside_mask
        embeds, features = self.embed(input_ids, places=places, inputs_embeds=inputs_embeds, **_media(seen, heard))
        kwargs.pop("logits_to_keep", None)
        outputs = self.read(
            self.language_model.get_decoder(),
            embeds,
            row_lengths=row_lengths,
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        output = _output(outputs, features, last_hidden_state=outputs.last_hidden_state)
        return output if _wants_dict(return_dict, self.config) else output.to_tuple()


class AvlmForConditionalGeneration(AvlmPreTrainedModel, GenerationMixin):
    """The whole model: media and text in, the next token's logits out."""

    def __init__(self, config: AvlmConfig) -> None:
        super().__init__(config)
        self.model = AvlmModel(config)
        self._head: tuple[nn.Linear | None] | None = None  # what `plain_head` found
        self._written: tuple[list[Layer], Written | None] | None = None  # layers, and what `written_out` made of them
        self.state_head: nn.Linear | None = None
        if config.state_classes is not None:
            width = config.text_config.get_text_config().hidden_size
            self.state_head = nn.Linear(width, config.state_classes)
        self.post_init()

    def add_state_head(self, classes: int) -> None:
        """Give the model a fresh state head: it tells from the last hidden state what the question before it was."""
        width = self.config.text_config.get_text_config().hidden_size
        self.config.state_classes = classes
        self.state_head = nn.Linear(width, classes, dtype=self.language_model.dtype, device=self.device)

    @property
    def language_model(self) -> PreTrainedModel:
        model = self.model.language_model
        assert isinstance(model, PreTrainedModel)
        return model

    def plain_head(self) -> nn.Linear | None:
        """The language model's head, if logits are nothing but its output; see `heads.plain_head`."""
        if self._head is None or (self._head[0] is not None and self._head[0] is not self.get_output_embeddings()):
            self._head = (plain_head(self.language_model),)
        return self._head[0]

    def written_out(self) -> Written | None:
        """The language model's decoder written out, for answers in slots; None where its own code is to be used."""
        layers = layers_of(self.language_model)
        if layers is None or self.plain_head() is None:
            return None
        if self._written is None or not same_weights(self._written[0], layers):
            self._written = layers, written_out(self.language_model, layers)
        return self._written[1]

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

    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        """See `AvlmModel.get_image_features`."""
        return self.model.get_image_features(*args, **kwargs)

    def get_video_features(self, *args: Any, **kwargs: Any) -> Any:
        """See `AvlmModel.get_video_features`."""
        return self.model.get_video_features(*args, **kwargs)

    def get_audio_features(self, *args: Any, **kwargs: Any) -> Any:
        """See `AvlmModel.get_audio_features`."""
        return self.model.get_audio_features(*args, **kwargs)

    def get_placeholder_mask(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """See `AvlmModel.get_placeholder_mask`."""
        return self.model.get_placeholder_mask(*args, **kwargs)

    def placeholder_ids(self) -> list[int]:
        """Tokens that stand for media; never an answer."""
        ids = (getattr(self.config, f"{kind}_token_id") for kind in KINDS)
        return sorted({token_id for token_id in ids if token_id is not None})

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        input_features: Tensor | None = None,
        input_features_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        row_lengths: Sequence[int] | None = None,
        places: list[Place] | None = None,
        prompt_embeds: Tensor | None = None,
        state_positions: Tensor | None = None,
        return_dict: bool | None = None,
        input_features_beside: Tensor | None = None,
        input_features_beside_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> AvlmOutput | tuple[Any, ...]:
        """Read text and media.

        Args:
            input_ids: (B, T), placeholders written out, one id for each media token.
            attention_mask: (B, T) for padded prompts; leave out for a packed row.
            inputs_embeds: (B, T, D) instead of tokens; media fill the placeholders' embeddings.
            pixel_values, image_sizes: All pictures in reading order, as in `get_image_features`.
            pixel_values_videos: (F, 3, height, width), all frames in reading order.
            input_features, input_features_mask: (A, bins, frames) and (A, frames), the chunks of all clips in reading
                order.
            input_features_beside, input_features_beside_mask: The same chunks, as a second audio encoder takes them.
            labels: (B, T), -100 where nothing is learned; shifted here, not by the caller. In a packed row the first
                token of a sample is nobody's next token.
            kwargs: `shift_labels` (B, T) are labels that the caller has shifted; `num_items_in_batch` and
                `ignore_index` are for the loss, too. All else is the language model's.
            logits_to_keep: Compute logits only for the last so many positions, or at these positions.
            row_lengths: Tokens of each sample, when the one row of the batch is packed.
            places: Reserved places, so that a mismatch is reported by sample and item.
            prompt_embeds: (B, prompt, D), a prompt whose places are filled already; `generate` makes them once.
            state_positions: Positions (K,) where the state head is asked: the last ones before answers begin.

        Returns:
            Logits, and the loss as a mean over target tokens when labels are given.

        Raises:
            LayoutError: Places and media disagree.
            ConfigError: Both or neither of tokens and embeddings were given.
        """
        _one_of(input_ids, inputs_embeds)
        features: dict[str, Tensor] = {}
        if prompt_embeds is not None and input_ids is not None:
            embeds = self._behind_prompt(prompt_embeds, input_ids, past_key_values)
        else:
            seen = pixel_values, image_sizes, pixel_values_videos
            heard = input_features, input_features_mask, input_features_beside, input_features_beside_mask
            media = _media(seen, heard)
            embeds, features = self.model.embed(input_ids, places=places, inputs_embeds=inputs_embeds, **media)
        for_loss = {name: kwargs.pop(name) for name in FOR_LOSS if name in kwargs}
        if state_positions is not None:
            kwargs["output_hidden_states"] = True
        outputs = self.model.read(
            self.language_model,
            embeds,
            row_lengths=row_lengths,
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        output = _output(
            outputs,
            features,
            loss=self._loss(outputs, labels, row_lengths, for_loss),
            logits=outputs.logits,
            aux_loss=outputs.get("aux_loss"),
            router_logits=outputs.get("router_logits"),
            state_logits=self._states(outputs, state_positions),
        )
        return output if _wants_dict(return_dict, self.config) else output.to_tuple()

    def _loss(
        self, outputs: ModelOutput, labels: Tensor | None, row_lengths: Sequence[int] | None, more: dict[str, Any]
    ) -> Tensor | None:
        """Mean over target tokens, as transformers computes it for the language model's own class; None without any."""
        if labels is None and more.get("shift_labels") is None:
            return None
        labels = labels if row_lengths is None or labels is None else _walled(labels, row_lengths)
        logits = outputs.logits
        loss: Tensor = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **more)
        if outputs.get("aux_loss") is not None:  # as the language model's own class adds it
            loss = loss + self.language_model.config.router_aux_loss_coef * outputs.aux_loss
        return loss

    def _states(self, outputs: ModelOutput, positions: Tensor | None) -> Tensor | None:
        """What the state head says at these positions."""
        if positions is None:
            return None
        if self.state_head is None:
            raise ConfigError(
                "state_positions were given to a model without a state head. Leave them out, or train a head with "
                "stages.NAME.state_head"
            )
        logits: Tensor = self.state_head(outputs.hidden_states[-1][:, positions.to(self.device)])
        return logits

    def _behind_prompt(self, prompt_embeds: Tensor, input_ids: Tensor, cache: Cache | None) -> Tensor:
        """Embeddings of what comes now: the prompt's as they were made, and the answer's tokens."""
        start = 0 if cache is None else int(cache.get_seq_length())
        seen = prompt_embeds[:, start : start + input_ids.shape[1]]
        answer: Tensor = self.get_input_embeddings()(input_ids[:, seen.shape[1] :])
        return torch.cat([seen, answer], 1)

    @torch.no_grad()
    def generate(
        self, inputs: Tensor | None = None, generation_config: Any = None, logits_processor: Any = None, *args: Any,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        """As transformers generates, with `GenerationMixin.generate`'s own arguments.

        Media are encoded once, however many beams or samples a prompt has, and stay with their prompt; placeholders are
        never an answer.
        """
        media = {name: kwargs.pop(name) for name in MEDIA if name in kwargs}
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        given = kwargs.get("inputs_embeds")
        told = next((each.device for each in (ids, given) if each is not None), torch.device("cpu"))
        device = told if self.device.type == "meta" else self.device  # weights may lie elsewhere until they are used
        if any(value is not None for value in media.values()):
            media = {k: v if v is None else v.to(device) for k, v in media.items()}
            if given is None:
                kwargs["prompt_embeds"] = self.model.embed(None if ids is None else ids.to(device), **media)[0]
            else:
                kwargs["inputs_embeds"] = self.model.embed(None, **media, inputs_embeds=given)[0]
        processors = LogitsProcessorList(logits_processor or [])
        if self.placeholder_ids():
            processors.append(NoPlaceholders(self.placeholder_ids(), device=device))
        return super().generate(inputs, generation_config, processors, *args, **kwargs)


class NoPlaceholders(SuppressTokensLogitsProcessor):
    """Placeholders are never an answer. A class of its own: where transformers is given a processor of a class that it
    would make itself, for a user's `suppress_tokens`, it leaves out its own."""


def sense_connector(config: AvlmConfig, sense: str, width: int) -> nn.Module:
    """The connector of a sense, to a language model of this width; behind two audio encoders it takes both."""
    settings, first = getattr(config, f"{sense}_connector"), encoder_width(getattr(config, f"{sense}_config"))
    if sense != "audio" or config.audio_beside_config is None:
        return build_connector(settings, first, width, newline=sense == "vision" and config.newline())
    second = encoder_width(config.audio_beside_config)
    return Joined(first, second, build_connector(settings, first + second, width))


def _whole(mask: Tensor | None, features: Tensor) -> Tensor:
    """The mask, or one that hides nothing."""
    return torch.ones_like(features[:, 0], dtype=torch.bool) if mask is None else mask.bool()


def _one_of(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> None:
    if input_ids is None and inputs_embeds is None:
        raise _neither()
    if input_ids is not None and inputs_embeds is not None:
        raise ConfigError("input_ids and inputs_embeds are both given, and one of them is read. Leave one of them out")


def _neither() -> ConfigError:
    return ConfigError("neither input_ids nor inputs_embeds is given, so there is nothing to read. Give one of them")


def _wants_dict(asked: bool | None, config: AvlmConfig) -> bool:
    return bool(config.return_dict if asked is None else asked)


def _features(states: list[Tensor], tokens: Tensor, counts: list[int], as_dict: bool) -> Any:
    """What the encoder and the connector made, as transformers' models give it."""
    found = BaseModelOutputWithPooling(pad_sequence(states, batch_first=True), list(tokens.split(counts)))
    return found if as_dict else found.to_tuple()


def _walled(labels_BT: Tensor, lengths: Sequence[int]) -> Tensor:
    """Labels of a packed row without the first token of each sample, which follows on nothing."""
    starts = torch.tensor([0, *lengths], device=labels_BT.device).cumsum(0)[:-1]
    return labels_BT.index_fill(1, starts[starts < labels_BT.shape[1]], IGNORE)


def _media(seen: Sequence[Tensor | None], heard: Sequence[Tensor | None]) -> dict[str, Any]:
    """Media as `AvlmModel.embed` takes them, by name."""
    return dict(zip(MEDIA, (*seen, *heard), strict=True))


def _output(outputs: ModelOutput, features: dict[str, Tensor], **more: Any) -> AvlmOutput:
    """What both models return: the language model's, and what the connectors made of each kind."""
    found: dict[str, Any] = {name: outputs.get(name) for name in ("past_key_values", "hidden_states", "attentions")}
    found |= {f"{kind}_hidden_states": features.get(kind) for kind in KINDS}
    return AvlmOutput(**found, **more)
