"""A model from parts: released encoders and language models, or fresh ones, joined by new connectors."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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

from avlm.config.media import MediaSpec
from avlm.config.model import AudioPart, LanguagePart, ModelConfig, Source, VisionPart
from avlm.convert.folder import preprocessor_of
from avlm.data.processor import AvlmProcessor
from avlm.data.text import PLACEHOLDERS, chat_template, placeholder_ids
from avlm.data.vocabulary import add_placeholders, add_wraps, make_tokenizer
from avlm.errors import AvlmError, ConfigError, WeightsError
from avlm.models import attention
from avlm.models.audio_encoders import audio_spec
from avlm.models.configuration import AvlmConfig
from avlm.models.connectors import build_connector
from avlm.models.encoders import build_encoder, encoder_width, inner_config, load_encoder
from avlm.models.modeling import AvlmForConditionalGeneration
from avlm.models.vision_encoders import vision_spec


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
    add_wraps(tokenizer, [token for part in (config.vision, config.audio) for token in (part and part.wrap) or ()])
    chat_template(tokenizer, config.language.chat_template)  # a missing one is said before anything heavy is loaded
    text_config = _language_config(config.language, tokenizer)
    vision_config = None if config.vision is None else _encoder_config(config.vision.encoder, "vision")
    audio_config = None if config.audio is None else _encoder_config(config.audio.encoder, "audio")
    prepared = {} if config.vision is None else {"vision": _preprocessor(config.vision.encoder, "vision")}
    model_config = describe(
        config, text_config, vision_config, audio_config, prepared=prepared, ids=placeholder_ids(tokenizer)
    )
    model = _assemble(model_config, config, max(tokenizer.get_vocab().values()) + 1, seed)
    model.generation_config = _generation_config(model.language_model, tokenizer)
    processor = AvlmProcessor(tokenizer, media=model_config.media, chat_template=config.language.chat_template)
    return Composed(model.eval(), processor)


def describe(
    parts: ModelConfig,
    text_config: PreTrainedConfig,
    vision_config: PreTrainedConfig | None,
    audio_config: PreTrainedConfig | None,
    *,
    prepared: dict[str, dict[str, Any]],
    ids: dict[str, int],
) -> AvlmConfig:
    """The configuration of a model of these parts.

    Args:
        parts: How they are joined.
        text_config, vision_config, audio_config: The parts' own configurations; None for a sense that is not there.
        prepared: The encoders' released preprocessing, as in ``preprocessor_config.json``, by sense where it is known.
        ids: Of the placeholders, by kind.

    Raises:
        ConfigError: Parts do not fit.
    """
    vision, audio = parts.vision, parts.audio
    media = MediaSpec(
        vision=None if vision is None else vision_spec(vision_config, vision, prepared.get("vision", {})),
        audio=None if audio is None else audio_spec(audio_config, audio),
        video=parts.video,
    )
    return AvlmConfig(
        text_config,
        vision_config,
        audio_config,
        vision_connector=None if vision is None else vision.connector.model_dump(),
        audio_connector=None if audio is None else audio.connector.model_dump(),
        vision_layer=None if vision is None else vision.layer,
        audio_layer=None if audio is None else audio.layer,
        media=media.model_dump(mode="json"),
        **{f"{kind}_token_id": ids.get(kind) for kind in PLACEHOLDERS},
    )


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
            connector = build_connector(
                part.connector.model_dump(),
                encoder_width(encoder_config),
                width,
                newline=sense == "vision" and model_config.newline(),
            )
            setattr(inner, f"{sense}_connector", connector)
            for module in (getattr(inner, f"{sense}_tower"), connector):
                _cast(module, inner.language_model.dtype)
    model.tie_weights()
    left = [name for name, p in model.named_parameters() if p.is_meta]
    if left:
        raise WeightsError(
            f"{len(left)} weights were left without values, {left[0]} among them. Report this as a defect of avlm"
        )
    attention.use(inner.language_model)
    return model


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Give a part's weights the language model's type. Tables that are computed, not learned, keep their precision."""
    saved = module.state_dict().keys()
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if name in saved and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def _generation_config(language: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The released language model's settings for `generate`, which also ends an answer where the template does."""
    settings = copy.deepcopy(language.generation_config)
    known = settings.eos_token_id
    ends = [*(known if isinstance(known, list) else [known]), tokenizer.eos_token_id]
    ends = list(dict.fromkeys(int(end) for end in ends if end is not None))
    settings.eos_token_id = ends[0] if len(ends) == 1 else ends or None
    if settings.pad_token_id is None:
        settings.pad_token_id = tokenizer.pad_token_id
    return settings


def _language_model(part: LanguagePart, config: PreTrainedConfig, vocabulary: int) -> PreTrainedModel:
    if part.path is None:
        fresh: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        return fresh
    model: PreTrainedModel
    with _loading("language", part.path):
        model, info = AutoModelForCausalLM.from_pretrained(
            part.path, config=config, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    if info["missing_keys"]:
        raise WeightsError(
            f"model.language: {part.path} lacks {len(info['missing_keys'])} weights of a {config.model_type}, "
            f"{sorted(info['missing_keys'])[0]} among them. Give the folder of a whole checkpoint"
        )
    if model.get_input_embeddings().num_embeddings < vocabulary:
        model.resize_token_embeddings(vocabulary)
    return model


def _encoder(source: Source, config: PreTrainedConfig, sense: str) -> nn.Module:
    if source.path is None:
        return build_encoder(config)
    with _loading(f"{sense}.encoder", source.path):
        return load_encoder(source.path, config)


@contextmanager
def _loading(part: str, path: str) -> Iterator[None]:
    """Whatever transformers and safetensors raise about a folder becomes one message about the part."""
    folder = Path(path)
    if (folder.is_absolute() or path.startswith(".")) and not folder.is_dir():
        raise ConfigError(
            f"model.{part}: there is no folder {path}. Give an existing folder in Hugging Face format, or a hub name"
        )
    try:
        yield
    except (AvlmError, MemoryError):
        raise
    except Exception as error:
        detail = " ".join(str(error).split())[:300]
        raise WeightsError(
            f"model.{part}: {path} cannot be loaded ({detail}). "
            "Give a folder with config.json and .safetensors weights, or a hub name"
        ) from error


def _read_config(path: str, part: str) -> PreTrainedConfig:
    config: PreTrainedConfig
    with _loading(part, path):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    return config


def _random_config(random: dict[str, Any], part: str) -> PreTrainedConfig:
    values = dict(random)
    try:
        config: PreTrainedConfig = AutoConfig.for_model(values.pop("model_type"), **values)
    except Exception as error:  # each configuration checks its fields in its own way
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
            f"model.language.random.vocab_size={values['vocab_size']} is less than the {len(tokenizer)} tokens of the "
            "tokenizer. Leave it out, or make it larger"
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
    tokenizer: PreTrainedTokenizerBase
    with _loading("language.tokenizer" if part.tokenizer else "language", path):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    add_placeholders(tokenizer)
    return tokenizer


def _preprocessor(source: Source, sense: str) -> dict[str, Any]:
    return {} if source.path is None else preprocessor_of(source.path, sense)
