"""avlm's model for vLLM: our encoders and connectors in front of vLLM's own language model. Imported by vLLM alone.

Pictures and sounds, any number of each; videos, whose sound belongs to them, are served by
`avlm serve`. Media are prepared by our processor, counted by our layout, and encoded by our
modules, so there is one formula and one set of weights. Written to the interface of vLLM
0.33; see docs/elsewhere.md for what of it has been tried.

Source:
    vLLM's guide to multimodal models (docs/contributing/model/multimodal.md) and its model of
    Ultravox, for the names that its interface has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BatchFeature
from vllm.model_executor.models.interfaces import SupportsMultiModal, SupportsPP
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    init_vllm_registered_model,
    maybe_prefix,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import MultiModalDataParser
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdateDetails,
)

from avlm.config.media import MediaSpec
from avlm.data.given import media_item
from avlm.data.processor import AvlmProcessor
from avlm.data.text.templates import placeholders
from avlm.inference.elsewhere import counts
from avlm.inference.elsewhere.senses import make_senses, picture_embeddings, sound_embeddings
from avlm.layout import audio_chunks, image_grids
from avlm.samples import Sample, Turn

PICTURES = ("pixel_values", "image_sizes")
SOUNDS = ("input_features", "input_features_mask", "input_features_beside", "input_features_beside_mask")
KEYS = {"image": "images", "audio": "audios"}
"""What vLLM calls the media of a prompt."""


class AvlmInfo(BaseProcessingInfo):
    """What vLLM wants to know before any medium is there."""

    def processor(self, **kwargs: Any) -> AvlmProcessor:
        """Our processor, as vLLM loaded it."""
        found = self.get_hf_processor(**kwargs)
        assert isinstance(found, AvlmProcessor)
        return found

    def media(self) -> MediaSpec:
        return self.processor().media_spec()

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return counts.kinds(self.media())

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return counts.most_tokens(self.media())

    def get_data_parser(self) -> MultiModalDataParser:
        audio = self.media().audio
        return MultiModalDataParser(
            target_sr=None if audio is None else audio.sample_rate_hz,
            target_channels=1,
            expected_hidden_size=self._get_expected_hidden_size(),
        )


class AvlmDummyInputs(BaseDummyInputsBuilder[AvlmInfo]):
    """The largest media there can be, for vLLM to measure its memory with."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        marks = placeholders(self.info.processor().tokenizer)
        return "".join(marks[kind] * mm_counts.get(kind, 0) for kind in self.info.get_supported_mm_limits())

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]
    ) -> dict[str, Any]:
        media, found = self.info.media(), {}
        if media.vision is not None:
            height, width = counts.largest_picture(media)
            number = mm_counts.get("image", 0)
            found["image"] = self._get_dummy_images(
                width=width, height=height, num_images=number, overrides=mm_options.get("image")
            )
        if media.audio is not None:
            # Not silence, as vLLM's own dummies are: a silent recording is refused as one that is broken.
            found["audio"] = [counts.tone(counts.longest_sound(media))] * mm_counts.get("audio", 0)
        return found


class AvlmPrompts(BaseMultiModalProcessor[AvlmInfo]):
    """Prompts and media as our processor prepares them."""

    def _call_hf_processor(
        self, prompt: str, mm_data: Mapping[str, Any], mm_kwargs: Mapping[str, Any], tok_kwargs: Mapping[str, Any]
    ) -> BatchFeature:
        processor = self.info.processor(**mm_kwargs)
        given = {kind: list(mm_data.get(key) or []) for kind, key in KEYS.items()}
        if not any(given.values()):
            return BatchFeature({"input_ids": [processor.tokenizer.encode(prompt, add_special_tokens=False)]})
        media = processor.media_spec()
        rate_hz = None if media.audio is None else media.audio.sample_rate_hz
        items = {kind: [media_item(kind, value, rate_hz) for value in values] for kind, values in given.items()}
        batch = processor(text=prompt, images=items["image"], audio=items["audio"])
        batch.pop("attention_mask", None)
        for kind, own in items.items():
            prepared = processor.prepare(Sample("vllm", (Turn("user", tuple(own)),))) if own else []
            facts = [one.facts for one in prepared]
            batch[f"{kind}_places"] = torch.tensor([counts.places(f, media) for f in facts])
            batch[f"{kind}_pieces"] = torch.tensor([_pieces(f, media) for f in facts])
        return batch

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        fields: dict[str, MultiModalFieldConfig] = {}
        for kind, names in (("image", PICTURES[:1]), ("audio", SOUNDS)):
            pieces = hf_inputs.get(f"{kind}_pieces", torch.zeros(0, dtype=torch.long))
            fields |= {name: MultiModalFieldConfig.flat_from_sizes(kind, pieces) for name in names if name in hf_inputs}
            fields |= {f"{kind}_{what}": MultiModalFieldConfig.batched(kind) for what in ("places", "pieces")}
        if "image_sizes" in hf_inputs:
            fields["image_sizes"] = MultiModalFieldConfig.batched("image")
        return fields

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[PromptReplacement]:
        processor, found = self.info.processor(**hf_processor_mm_kwargs), out_mm_kwargs.get_data()
        ids, media = processor.tokenizer.get_vocab(), processor.media_spec()
        marks = placeholders(processor.tokenizer)

        def replace(kind: str, number: int) -> PromptUpdateDetails:
            tokens = int(found[f"{kind}_places"][number])
            written = counts.replacement(tokens, kind, media, ids[marks[kind]], ids)
            return PromptUpdateDetails.select_token_id(written, embed_token_id=ids[marks[kind]])

        return [
            PromptReplacement(
                modality=kind, target=[ids[marks[kind]]], replacement=lambda n, kind=kind: replace(kind, n)
            )
            for kind in counts.kinds(media)
        ]


def _pieces(facts: Any, media: MediaSpec) -> int:
    """Tiles of a picture, or chunks of a sound."""
    if hasattr(facts, "size_px"):
        assert media.vision is not None
        return len(image_grids(media.vision, facts.size_px))
    assert media.audio is not None
    return len(audio_chunks(facts.num_samples, media.audio))


@MULTIMODAL_REGISTRY.register_processor(AvlmPrompts, info=AvlmInfo, dummy_inputs=AvlmDummyInputs)
class AvlmForVllm(nn.Module, SupportsMultiModal, SupportsPP):
    """Our senses, vLLM's language model."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "model.language_model.": "language_model.",
            "model.": "senses.",
            "state_head.": None,
        }
    )

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """What stands for a medium where a prompt is written by hand."""
        return {"image": "<image>", "audio": "<audio>"}.get(modality)

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.config = config
        ids = [config.image_token_id, config.audio_token_id]
        theirs: Any = self  # what vLLM's classes bring along
        theirs.configure_mm_token_handling(
            config.text_config.get_text_config().vocab_size, [token for token in ids if token is not None]
        )
        with theirs._mark_tower_model(vllm_config, {"image", "audio"}):
            self.senses = make_senses(config)
        with theirs._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=config.text_config,
                prefix=maybe_prefix(prefix, "language_model"),
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    def embed_multimodal(self, **kwargs: Any) -> list[Tensor]:
        """Tokens of each medium (tokens, D); pictures, then sounds, each in their order."""
        found: list[Tensor] = []
        if kwargs.get("pixel_values") is not None:
            sizes = None if kwargs.get("image_sizes") is None else _stacked(kwargs["image_sizes"])
            found += picture_embeddings(self.senses, _end_to_end(kwargs["pixel_values"]), sizes)
        if kwargs.get("input_features") is not None:
            pieces = _stacked(kwargs["audio_pieces"]).flatten().tolist()
            features = {name: _chunks(kwargs[name]) for name in SOUNDS if kwargs.get(name) is not None}
            sounds, start = [], 0
            for number in pieces:
                of_one = {name: _padded(chunks[start : start + number]) for name, chunks in features.items()}
                sounds.append(of_one)
                start += number
            found += sound_embeddings(self.senses, sounds)
        return found

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The language model's hidden states."""
        if intermediate_tensors is not None:
            inputs_embeds = None
        return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """The language model's logits; places of media are never an answer."""
        logits: Tensor | None = self.language_model.compute_logits(hidden_states)
        if logits is not None:
            ids = (self.config.image_token_id, self.config.audio_token_id, self.config.video_token_id)
            never = sorted({token for token in ids if token is not None})
            logits[..., never] = float("-inf")
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Weights under the names of our model directories."""
        loaded: set[str] = AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)
        return loaded


def _end_to_end(items: Any) -> Tensor:
    """Pieces of several items, each with its own in the first dimension, as one tensor."""
    return items if isinstance(items, Tensor) else torch.cat(list(items))


def _stacked(items: Any) -> Tensor:
    """One row for each item."""
    return items if isinstance(items, Tensor) else torch.stack(list(items))


def _chunks(value: Any) -> list[Tensor]:
    """Chunks of sounds, each (bins, frames), or (frames,) of a mask."""
    if isinstance(value, Tensor):
        return list(value)
    return [chunk for sound in value for chunk in sound]


def _padded(chunks: Sequence[Tensor]) -> Tensor:
    """Chunks as one tensor, zero (or False) beyond the end of each."""
    longest = max(chunk.shape[-1] for chunk in chunks)
    return torch.stack([nn.functional.pad(chunk, (0, longest - chunk.shape[-1])) for chunk in chunks])
