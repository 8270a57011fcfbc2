"""A model from parts: released encoders and language models, or fresh ones, joined by new connectors."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from avlm.config.io import read_mapping
from avlm.config.media import MediaSpec
from avlm.config.model import AudioPart, LanguagePart, ModelConfig, Source, VisionPart
from avlm.data.processor import AvlmProcessor
from avlm.data.text import PLACEHOLDERS
from avlm.data.vocabulary import add_placeholders, make_tokenizer
from avlm.errors import ConfigError, WeightsError
from avlm.models import attention
from avlm.models.configuration import AvlmConfig
from avlm.models.connectors import build_connector
from avlm.models.encoders import (
    audio_spec,
    build_encoder,
    encoder_width,
    inner_config,
    load_encoder,
    vision_spec,
)
from avlm.models.modeling import AvlmForConditionalGeneration


class Composed(NamedTuple):
    """A model and the processor that speaks its language."""

    model: AvlmForConditionalGeneration
    processor: AvlmProcessor


def compose(config: ModelConfig, *, seed: int = 0, texts: Iterable[str] | None = None) -> Composed:
    """Compose a model.

    Args:
        config: The parts.
        seed: Of all weights that are drawn afresh: connectors, and parts by configuration.
        texts: What a fresh language model without a tokenizer gets its tokenizer from.

    Returns:
        The model in eval mode, float32 or the language model's released type, and its processor.

    Raises:
        ConfigError: Parts do not fit, or the tokenizer has no chat template.
        WeightsError: A part cannot be loaded.
    """
    tokenizer = _tokenizer(config.language, texts)
    text_config = _language_config(config.language, tokenizer)
    vision_config = None if config.vision is None else _encoder_config(config.vision.encoder, "vision")
    audio_config = None if config.audio is None else _encoder_config(config.audio.encoder, "audio")
    media = MediaSpec(
        vision=None
        if config.vision is None
        else vision_spec(vision_config, config.vision, _preprocessor(config.vision)),
        audio=None if config.audio is None else audio_spec(audio_config, config.audio),
        video=config.video,
    )
    ids = {f"{kind}_token_id": tokenizer.convert_tokens_to_ids(token) for kind, token in PLACEHOLDERS.items()}
    model_config = AvlmConfig(
        text_config,
        vision_config,
        audio_config,
        vision_connector=None if config.vision is None else config.vision.connector.model_dump(),
        audio_connector=None if config.audio is None else config.audio.connector.model_dump(),
        vision_layer=None if config.vision is None else config.vision.layer,
        audio_layer=None if config.audio is None else config.audio.layer,
        media=media.model_dump(mode="json"),
        **ids,
    )
    model = _assemble(model_config, config, len(tokenizer), seed)
    processor = AvlmProcessor(tokenizer, media=model_config.media, chat_template=config.language.chat_template)
    processor.tokens()  # a missing chat template is said now rather than at the first sample
    return Composed(model.eval(), processor)


def _assemble(
    model_config: AvlmConfig, config: ModelConfig, vocabulary: int, seed: int
) -> AvlmForConditionalGeneration:
    """Module tree without memory first, then each part in its place with its weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with torch.device("meta"):
            model = AvlmForConditionalGeneration(model_config)
        inner = model.model
        inner.language_model = _language_model(config.language, model_config.text_config, vocabulary)
        width = inner.language_model.config.hidden_size
        model_config.text_config = inner.language_model.config
        for sense in ("vision", "audio"):
            part: VisionPart | AudioPart | None = getattr(config, sense)
            if part is None:
                continue
            encoder_config = getattr(model_config, f"{sense}_config")
            setattr(inner, f"{sense}_tower", _encoder(part.encoder, encoder_config, sense))
            connector = build_connector(part.connector.model_dump(), encoder_width(encoder_config), width)
            setattr(inner, f"{sense}_connector", connector)
    model.to(inner.language_model.dtype)
    model.tie_weights()
    left = [name for name, p in model.named_parameters() if p.is_meta]
    if left:
        raise WeightsError(
            f"{len(left)} weights were left without values, {left[0]} among them. Report this as a defect of avlm"
        )
    attention.register()
    inner.language_model.set_attn_implementation(attention.NAME)
    return model


def _language_model(part: LanguagePart, config: PreTrainedConfig, vocabulary: int) -> PreTrainedModel:
    if part.path is None:
        fresh: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        return fresh
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(part.path, config=config, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise _not_loaded("language", part.path, error) from error
    if model.get_input_embeddings().num_embeddings < vocabulary:
        model.resize_token_embeddings(vocabulary)
    return model


def _encoder(source: Source, config: PreTrainedConfig, sense: str) -> nn.Module:
    if source.path is None:
        return build_encoder(config)
    try:
        return load_encoder(source.path, config)
    except (OSError, ValueError) as error:
        raise _not_loaded(sense, source.path, error) from error


def _not_loaded(part: str, path: str, error: Exception) -> WeightsError:
    detail = " ".join(str(error).split())[:300]
    return WeightsError(
        f"model.{part}: {path} cannot be loaded ({detail}). Give a folder with config.json and .safetensors weights, or a hub name"
    )


def _read_config(path: str, part: str) -> PreTrainedConfig:
    folder = Path(path)
    if (folder.is_absolute() or path.startswith(".")) and not folder.is_dir():
        raise ConfigError(
            f"model.{part}: there is no folder {path}. Give an existing folder in Hugging Face format, or a hub name"
        )
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise _not_loaded(part, path, error) from error
    return config


def _random_config(random: dict[str, Any], part: str) -> PreTrainedConfig:
    values = dict(random)
    try:
        config: PreTrainedConfig = AutoConfig.for_model(values.pop("model_type"), **values)
    except (ValueError, TypeError) as error:
        detail = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"model.{part}.random is not a configuration that transformers knows ({detail}). Correct it"
        ) from error
    return config


def _encoder_config(source: Source, sense: Literal["vision", "audio"]) -> PreTrainedConfig:
    if source.random is not None:
        return inner_config(_random_config(source.random, f"{sense}.encoder"), sense)
    assert source.path is not None
    return inner_config(_read_config(source.path, f"{sense}.encoder"), sense)


def _language_config(part: LanguagePart, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    if part.path is not None:
        return _read_config(part.path, "language")
    assert part.random is not None
    values = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **part.random,
    }
    if values["vocab_size"] < len(tokenizer):
        raise ConfigError(
            f"model.language.random.vocab_size={values['vocab_size']} is less than the {len(tokenizer)} tokens of the tokenizer. "
            "Leave it out, or make it larger"
        )
    return _random_config(values, "language")


def _tokenizer(part: LanguagePart, texts: Iterable[str] | None) -> PreTrainedTokenizerBase:
    path = part.tokenizer or part.path
    if path is None:
        if texts is None:
            raise ConfigError(
                "model.language has random weights and no tokenizer, so text cannot be turned into tokens. "
                "Set model.language.tokenizer to a folder or a hub name"
            )
        return make_tokenizer(texts, part.vocabulary)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise _not_loaded("language.tokenizer", path, error) from error
    add_placeholders(tokenizer)
    return tokenizer


def _preprocessor(part: VisionPart) -> dict[str, Any]:
    """The released preprocessing of a local encoder folder; hub names are asked for theirs by transformers' cache."""
    if part.encoder.path is None:
        return {}
    local = Path(part.encoder.path) / "preprocessor_config.json"
    if local.is_file():
        return read_mapping(local)
    from transformers.utils import cached_file

    try:
        found = cached_file(part.encoder.path, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    except OSError:
        found = None
    return read_mapping(Path(found)) if found else {}
