"""Models of other makers: one record for each family, read in both directions.

A record says how a family's configuration describes the parts that avlm has, and back, and
what its tensors are called. Import and export are made of the same records, so that what goes
out is what would come in. Adding a family is adding a record to the table below.

Names of tensors come in three fashions: as released (`language_model.model.layers.0...`,
`language_model.lm_head.weight`), as newer versions of transformers hold them in memory
(`model.language_model.layers.0...`, `lm_head.weight`), and ours. The first two are brought to
the released one first. What is written has released names, which every version reads.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedConfig

from avlm.config.io import build
from avlm.config.media import AnyresTiling
from avlm.config.model import ModelConfig
from avlm.convert.compose import describe
from avlm.errors import ConfigError
from avlm.layout import image_embedding_count
from avlm.models.audio_encoders import audio_family
from avlm.models.configuration import AvlmConfig
from avlm.models.modeling import AvlmForConditionalGeneration
from avlm.models.vision_encoders import vision_family

VICUNA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'] | upper + ': ' }}{% endif %}"
    "{% if message['content'] is string %}{% set parts = [{'type': 'text', 'text': message['content']}] %}"
    "{% else %}{% set parts = message['content'] %}{% endif %}"
    "{% for part in parts %}{% if part['type'] == 'image' %}{{ '<image>\\n' }}{% endif %}{% endfor %}"
    "{% for part in parts %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ ' ' }}{% endif %}{% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""LLaVA-1.5's conversation (arXiv:2310.03744, "v1"), with the end token behind each answer that it is trained with."""

QWEN_AUDIO = (
    "{% set sounds = namespace(count=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'audio' %}{% set sounds.count = sounds.count + 1 %}"
    "{{ 'Audio ' ~ sounds.count ~ ': <|audio_bos|><|AUDIO|><|audio_eos|>\\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""Qwen2-Audio's conversation: ChatML with numbered sounds (arXiv:2407.10759)."""


@dataclass(frozen=True, slots=True)
class Family:
    """What is particular about one family of outside models."""

    name: str
    """transformers' name of the configuration; what ``--to`` takes."""
    architecture: str
    """transformers' class."""
    sense: Literal["vision", "audio"]
    projector: tuple[tuple[str, str], ...]
    """Beginnings of names outside the encoder and the language model: theirs and ours."""
    template: str
    """A chat template to use where a checkpoint has none that an answer's end can be told from."""
    ties: Callable[[Any], bool]
    """Whether a configuration makes the head share its weights with the embeddings."""
    settings: Callable[[Any, dict[str, Any], str], dict[str, Any]]
    """From its configuration, its preprocessing and its source: a `ModelConfig` as plain data."""
    fields: Callable[[AvlmConfig], dict[str, Any]]
    """From our configuration: what theirs has besides the parts' own configurations and the placeholder."""
    preprocessing: Callable[[AvlmConfig], dict[str, Any]]
    """Contents of ``preprocessor_config.json``."""
    processing: Callable[[AvlmConfig, str], dict[str, Any]]
    """Contents of ``processor_config.json``, given the placeholder."""
    writes_tied_head: bool = False
    """Its class never ties, so a tied head is written out."""

    def describe(self, config: Any, preprocessor: dict[str, Any], source: str, ids: dict[str, int]) -> AvlmConfig:
        """Our configuration of an outside model.

        Args:
            config: Theirs, as transformers reads it.
            preprocessor: Contents of its ``preprocessor_config.json``.
            source: Where it lies, for messages.
            ids: Of the placeholders that the model knows, by kind.

        Raises:
            ConfigError: Something about it has no counterpart in avlm.
        """
        check_head(config.text_config, source)
        parts = build(ModelConfig, self.settings(config, preprocessor, source), where=source)
        config.text_config.tie_word_embeddings = self.ties(config)
        return describe(
            parts,
            config.text_config,
            {self.sense: config.vision_config if self.sense == "vision" else config.audio_config},
            prepared={self.sense: normalisation(preprocessor)},
            ids=ids,
        )


def family_of(model_type: object, what: str) -> Family:
    """The record of an outside model.

    Raises:
        ConfigError: There is none.
    """
    for family in FAMILIES:
        if family.name == model_type:
            return family
    raise ConfigError(
        f"{what}: is of type {model_type}, and avlm has records of {', '.join(f.name for f in FAMILIES)}. "
        "Give a checkpoint of one of them, or compose a model from parts: avlm compose OUT --language X --vision Y"
    )


def check_head(text_config: Any, source: str) -> None:
    """Outside models put one matrix on the language model; what some families do to logits beside that is lost there.

    Raises:
        ConfigError: The language model does.
    """
    for name, nothing in (("final_logit_softcapping", None), ("logit_scale", 1), ("logits_scaling", 1)):
        value = getattr(text_config, name, nothing)
        if value not in (None, nothing):
            raise ConfigError(
                f"{source}: the language model ({text_config.model_type}) has {name}={value}, which the other side "
                "does not apply to logits, so answers would differ. Use a language model without it"
            )


# ---------------------------------------------------------------- LLaVA-1.5 and LLaVA-NeXT


def _llava_settings(config: Any, preprocessor: dict[str, Any], source: str) -> dict[str, Any]:
    layer, act = config.vision_feature_layer, config.projector_hidden_act
    if not isinstance(layer, int):
        raise _unlike(source, f"vision_feature_layer={layer} joins several layers", "reads one", "one number there")
    if act != "gelu":
        raise _unlike(
            source, f"projector_hidden_act={act}", "has GELU between the layers of its mlp", "projector_hidden_act=gelu"
        )
    prefix = vision_family(config.vision_config).prefix_tokens
    strategy = config.vision_feature_select_strategy
    if (strategy == "default") != (prefix == 1):
        raise _unlike(
            source,
            f"vision_feature_select_strategy={strategy} with a {config.vision_config.model_type}, which has {prefix} "
            "tokens before its patches",
            "drops those and no patch",
            f"vision_feature_select_strategy={'default' if prefix == 1 else 'full'}",
        )
    connector = {"kind": "mlp", "bias": config.multimodal_projector_bias}
    vision = {"encoder": {"path": source}, "connector": connector, "layer": layer}
    return {"language": {"path": source}, "vision": {**vision, **_square(config.vision_config, preprocessor)}}


def _llava_next_settings(config: Any, preprocessor: dict[str, Any], source: str) -> dict[str, Any]:
    settings = _llava_settings(config, {}, source)
    tiling = {"kind": "anyres", "pinpoints": config.image_grid_pinpoints}
    return {**settings, "vision": {**settings["vision"], "tiling": tiling}}


def _unlike(source: str, what: str, ours: str, needed: str) -> ConfigError:
    return ConfigError(f"{source}: {what}, and avlm {ours}. Only a checkpoint with {needed} can be imported")


def _square(config: Any, preprocessor: dict[str, Any]) -> dict[str, Any]:
    """How a picture becomes a square."""
    if preprocessor.get("do_pad"):
        return {"image_size_px": config.image_size, "fit": "pad"}
    size = preprocessor.get("size") or {}
    whole = not preprocessor.get("do_center_crop", True) or "height" in size
    return {"image_size_px": config.image_size, "fit": "stretch" if whole else "crop"}


def normalisation(preprocessor: dict[str, Any]) -> dict[str, Any]:
    """Preprocessing with the mean and deviation of pictures as they are applied."""
    if preprocessor.get("do_normalize", True) or "feature_size" in preprocessor:
        return preprocessor
    return {**preprocessor, "image_mean": (0.0, 0.0, 0.0), "image_std": (1.0, 1.0, 1.0)}


def preprocessing_notes(config: AvlmConfig, preprocessor: dict[str, Any]) -> list[str]:
    """What of an outside model's preprocessing avlm does otherwise, in words."""
    vision = config.media_spec().vision
    if vision is None or not preprocessor:
        return []
    side, notes = vision.image_size_px, []
    for key in ("size", "crop_size"):
        given = preprocessor.get(key) or {}
        sides = {value for name, value in given.items() if name in ("shortest_edge", "height", "width")}
        if isinstance(given, dict) and sides - {side}:
            notes.append(f"preprocessing has {key}={given}; avlm makes squares of {side} at once")
    if preprocessor.get("resample", 3) not in RESAMPLE.values():
        notes.append(f"preprocessing has resample={preprocessor['resample']}; avlm interpolates {vision.resample}")
    if abs(preprocessor.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-6:
        notes.append(f"preprocessing has rescale_factor={preprocessor['rescale_factor']}; avlm divides by 255")
    return notes


RESAMPLE = {"bilinear": 2, "bicubic": 3}
"""Pillow's numbers, which stand in ``preprocessor_config.json``."""


def _llava_fields(config: AvlmConfig) -> dict[str, Any]:
    family = vision_family(config.vision_config)
    connector = config.vision_connector or {}
    spec = config.media_spec().vision
    assert spec is not None
    layer = family.layer if config.vision_layer is None else config.vision_layer
    return {
        "vision_config": config.vision_config,
        "image_seq_length": image_embedding_count(spec),
        "projector_hidden_act": "gelu",
        "vision_feature_select_strategy": "default" if family.prefix_tokens else "full",
        "vision_feature_layer": -1 if layer is None else layer,
        "multimodal_projector_bias": bool(connector.get("bias", True)),
    }


def _llava_next_fields(config: AvlmConfig) -> dict[str, Any]:
    spec = config.media_spec().vision
    sizes = spec.tiling.pinpoints if spec is not None and isinstance(spec.tiling, AnyresTiling) else ()
    return {**_llava_fields(config), "image_grid_pinpoints": [list(size) for size in sizes]}


def _pictures(config: AvlmConfig) -> dict[str, Any]:
    spec = config.media_spec().vision
    assert spec is not None
    side = {"height": spec.image_size_px, "width": spec.image_size_px}
    return {
        "do_convert_rgb": True,
        "do_resize": True,
        "size": side if spec.fit == "stretch" else {"shortest_edge": spec.image_size_px},
        "resample": RESAMPLE[spec.resample],
        "do_center_crop": spec.fit == "crop",
        "crop_size": side,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
    }


def _llava_preprocessing(config: AvlmConfig) -> dict[str, Any]:
    spec = config.media_spec().vision
    padded = spec is not None and spec.fit == "pad"
    kind = {"image_processor_type": "LlavaImageProcessor", "do_pad": True} if padded else {}
    return {"image_processor_type": "CLIPImageProcessor", **_pictures(config), **kind}


def _llava_next_preprocessing(config: AvlmConfig) -> dict[str, Any]:
    side = config.media["vision"]["image_size_px"]
    return {
        **_pictures(config),
        "image_processor_type": "LlavaNextImageProcessor",
        "size": {"shortest_edge": side},
        "do_center_crop": True,
        "do_pad": True,
        "image_grid_pinpoints": _llava_next_fields(config)["image_grid_pinpoints"],
    }


def _llava_processing(config: AvlmConfig, placeholder: str) -> dict[str, Any]:
    prefix = vision_family(config.vision_config).prefix_tokens
    return {
        "image_token": placeholder,
        "num_additional_image_tokens": prefix,
        "patch_size": config.media["vision"]["cell_px"],
        "vision_feature_select_strategy": "default" if prefix else "full",
    }


# ---------------------------------------------------------------- Qwen2-Audio


def _qwen2_audio_settings(config: Any, preprocessor: dict[str, Any], source: str) -> dict[str, Any]:
    length = audio_family(config.audio_config).lengths[0]
    audio = {"encoder": {"path": source}, "connector": {"kind": "linear", "bias": True}, "length": length}
    return {"language": {"path": source}, "audio": audio}


def _qwen2_audio_fields(config: AvlmConfig) -> dict[str, Any]:
    return {"audio_config": config.audio_config}


def _qwen2_audio_preprocessing(config: AvlmConfig) -> dict[str, Any]:
    spec = config.media_spec().audio
    assert spec is not None
    samples = spec.max_frames * spec.hop
    return {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "chunk_length": samples // spec.sample_rate_hz,
        "dither": 0.0,
        "feature_size": spec.mel_bins,
        "hop_length": spec.hop,
        "n_fft": spec.n_fft,
        "n_samples": samples,
        "nb_max_frames": spec.max_frames,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": True,
        "sampling_rate": spec.sample_rate_hz,
    }


def _qwen2_audio_processing(config: AvlmConfig, placeholder: str) -> dict[str, Any]:
    return {"audio_token": placeholder}


# ---------------------------------------------------------------- the table

_TWO_LAYERS = (
    ("multi_modal_projector.linear_1.", "model.vision_connector.layers.0."),
    ("multi_modal_projector.linear_2.", "model.vision_connector.layers.2."),
)

FAMILIES = (
    Family(
        "llava",
        "LlavaForConditionalGeneration",
        "vision",
        projector=_TWO_LAYERS,
        template=VICUNA,
        ties=lambda config: bool(config.tie_word_embeddings or config.text_config.tie_word_embeddings),
        settings=_llava_settings,
        fields=_llava_fields,
        preprocessing=_llava_preprocessing,
        processing=_llava_processing,
    ),
    Family(
        "llava_next",
        "LlavaNextForConditionalGeneration",
        "vision",
        projector=(*_TWO_LAYERS, ("image_newline", "model.vision_connector.image_newline")),
        template=VICUNA,
        ties=lambda config: bool(config.tie_word_embeddings),
        settings=_llava_next_settings,
        fields=_llava_next_fields,
        preprocessing=_llava_next_preprocessing,
        processing=_llava_processing,
    ),
    Family(
        "qwen2_audio",
        "Qwen2AudioForConditionalGeneration",
        "audio",
        projector=(("multi_modal_projector.linear.", "model.audio_connector.layers.0."),),
        template=QWEN_AUDIO,
        ties=lambda config: bool(config.text_config.tie_word_embeddings),
        settings=_qwen2_audio_settings,
        fields=_qwen2_audio_fields,
        preprocessing=_qwen2_audio_preprocessing,
        processing=_qwen2_audio_processing,
        writes_tied_head=True,
    ),
)

RELEASED_INSIDE = {"clip_vision_model": "vision_model.", "siglip_vision_model": "vision_model.", "whisper": "encoder."}
"""What stands before an encoder's names in released checkpoints and not in the module."""

COMPUTED = (".position_ids", ".rotary_emb.inv_freq")
"""Ends of names of tables that older checkpoints hold, and that are computed now."""


# ---------------------------------------------------------------- names of tensors


@dataclass(frozen=True, slots=True)
class Names:
    """Names of tensors in both directions, for one model."""

    pairs: tuple[tuple[str, str], ...]
    """Beginnings of names: as released, and ours."""

    def inward(self, name: str) -> str | None:
        """Our name of an outside tensor; None where we have no such thing."""
        name = released(name)
        for theirs, ours in self.pairs:
            if name.startswith(theirs):
                return ours + name.removeprefix(theirs)
        return None

    def outward(self, name: str) -> str | None:
        """The outside name of one of our tensors; None where there is no such thing."""
        for theirs, ours in self.pairs:
            if name.startswith(ours):
                return theirs + name.removeprefix(ours)
        return None


def names_of(family: Family, model: AvlmForConditionalGeneration) -> Names:
    """Names for one model, whose module tree is all that is looked at."""
    language = model.language_model
    head = next(name for name, module in language.named_modules() if module is language.get_output_embeddings())
    tower = f"{family.sense}_tower"
    inside = RELEASED_INSIDE.get(getattr(model.config, f"{family.sense}_config").model_type, "")
    return Names(
        (
            ("language_model.lm_head.", f"model.language_model.{head}."),
            ("language_model.model.", f"model.language_model.{language.base_model_prefix}."),
            *dict.fromkeys([(f"{tower}.{inside}", f"model.{tower}."), (f"{tower}.", f"model.{tower}.")]),
            *family.projector,
        )
    )


def released(name: str) -> str:
    """A tensor's name as released, from that or from what newer versions of transformers call it in memory."""
    name = name.removeprefix("model.")
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    name = name.replace("language_model.model.model.", "language_model.model.", 1)  # 5.17's, of Qwen2-Audio
    inner = name.removeprefix("language_model.")
    if inner != name and not inner.startswith(("model.", "lm_head.")):
        return f"language_model.model.{inner}"
    return name


# ---------------------------------------------------------------- our configuration as theirs


def outside_config(family: Family, config: AvlmConfig, where: str) -> dict[str, Any]:
    """What theirs is made from: fields of their configuration class.

    Raises:
        ConfigError: A part has no counterpart there.
    """
    if getattr(config, f"{family.sense}_config") is None:
        raise ConfigError(
            f"{where}: has no {family.sense} part, and {family.architecture} is nothing without one. "
            "Export the language model alone with --to language"
        )
    check_head(config.text_config, where)
    token_id = getattr(config, f"{'image' if family.sense == 'vision' else 'audio'}_token_id")
    index = "image_token_index" if family.sense == "vision" else "audio_token_index"
    fields = {"text_config": config.text_config, **family.fields(config), index: token_id}
    if not family.writes_tied_head:
        fields["tie_word_embeddings"] = bool(config.text_config.tie_word_embeddings)
    return fields


def check_fit(family: Family, config: AvlmConfig, theirs: PreTrainedConfig, where: str) -> None:
    """Make sure that what goes out is what would come in again.

    Raises:
        ConfigError: Parts that outside models of this family do not have, by their settings.
    """
    again = family.describe(theirs, family.preprocessing(config), where, {})
    wrong = _differences(_comparable(config), _comparable(again))
    if wrong:
        told = "; ".join(f"{key} is {ours!r} and would be {back!r}" for key, ours, back in wrong[:8])
        more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise ConfigError(
            f"{where}: does not fit {family.architecture}, which has no such parts: {told}{more}. "
            "Export the parts one by one (--to language, and the others by their names), or compose with what it has"
        )


def _comparable(config: AvlmConfig) -> dict[str, Any]:
    """Everything about how the parts are joined, choices by default written out."""
    known = inspect.signature(AvlmConfig.__init__).parameters
    data = {k: v for k, v in config.to_dict().items() if k in known and not k.endswith("_token_id")}
    data = {k: v for k, v in data.items() if k not in ("text_config", "tie_word_embeddings")}
    media = dict(data.pop("media"))
    media.pop("video")
    width = config.text_config.get_text_config().hidden_size
    for sense in ("vision", "audio"):
        connector = data[f"{sense}_connector"]
        if connector is not None and connector.get("hidden_size") == width:
            data[f"{sense}_connector"] = {**connector, "hidden_size": None}
    if config.vision_config is not None and config.vision_layer is None:
        data["vision_layer"] = vision_family(config.vision_config).layer
    return {**data, **media}


def _differences(ours: Any, theirs: Any, at: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        keys = dict.fromkeys([*ours, *theirs])
        return [
            d for k in keys for d in _differences(ours.get(k), theirs.get(k), f"{at}.{k}" if at else str(k))
        ]  # fmt: skip
    same = list(ours) == list(theirs) if isinstance(ours, tuple | list) and theirs is not None else ours == theirs
    return [] if same else [(at, ours, theirs)]


def on_meta(config: AvlmConfig) -> AvlmForConditionalGeneration:
    """The module tree of a model, without memory behind it."""
    with torch.device("meta"):
        model = AvlmForConditionalGeneration(config)
    model.tie_weights()
    return model
