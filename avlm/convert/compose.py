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

from avlm.config.media import AudioSpec, MediaSpec
from avlm.config.model import AudioPart, LanguagePart, ModelConfig, Source, VisionPart
from avlm.convert.folder import file_of, preprocessor_of
from avlm.convert.vocabulary import fit_vocabulary
from avlm.data.processor import AvlmProcessor
from avlm.data.text.templates import PLACEHOLDERS, chat_template, placeholder_ids
from avlm.data.text.vocabulary import add_tokens, add_wraps, make_tokenizer
from avlm.errors import AvlmError, ConfigError, WeightsError
from avlm.models import attention
from avlm.models.configuration import AvlmConfig
from avlm.models.encoders import build_encoder, inner_config, load_encoder
from avlm.models.hearing import audio_spec
from avlm.models.modeling import AvlmForConditionalGeneration, sense_connector
from avlm.models.precision import cast_weights
from avlm.models.vision_encoders import vision_spec


class Composed(NamedTuple):
    """A model and the processor that speaks its language."""

    model: AvlmForConditionalGeneration
    processor: AvlmProcessor


def compose(
    config: ModelConfig, *, seed: int = 0, texts: Iterable[str] | None = None, language_weights: bool = True
) -> Composed:
    """Compose a model.

    Args:
        config: The parts.
        seed: Of all weights that are drawn afresh: connectors, and parts by configuration.
        texts: What a fresh language model without a tokenizer gets its tokenizer from.
        language_weights: False leaves a released language model without any: nothing is read or fetched but its
            configuration and its tokenizer, and no memory is behind its weights. For those who need its size alone.

    Returns:
        The model in eval mode, float32 or the language model's released type, and its processor.

    Raises:
        ConfigError: Parts do not fit, or the tokenizer has no chat template.
        WeightsError: A part cannot be loaded.
    """
    own, tokenizer = _words(config, texts)
    text_config = _language_config(config.language, tokenizer)
    spared = config.language.path is not None and not language_weights
    if spared:
        _make_room(text_config, tokenizer)
    model_config = _model_config(config, text_config, placeholder_ids(tokenizer))
    model = _assemble(model_config, config, None if spared else own, tokenizer, seed)
    processor = AvlmProcessor(tokenizer, media=model_config.media, chat_template=config.language.chat_template)
    model.generation_config = _generation_config(model.language_model, processor)
    return Composed(model.eval(), processor)


def make_processor(config: ModelConfig, *, texts: Iterable[str] | None = None) -> AvlmProcessor:
    """The processor of a model, without the model: nothing of its weights is drawn, read or fetched.

    Args:
        texts: What a fresh language model without a tokenizer gets its tokenizer from.

    Raises:
        ConfigError: Parts do not fit, or the tokenizer has no chat template.
    """
    _, tokenizer = _words(config, texts)
    model = _model_config(config, _language_config(config.language, tokenizer), placeholder_ids(tokenizer))
    return AvlmProcessor(tokenizer, media=model.media, chat_template=config.language.chat_template)


def _words(config: ModelConfig, texts: Iterable[str] | None) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """As `_tokenizers`, with what is written around media."""
    own, tokenizer = _tokenizers(config.language, texts)
    add_wraps(tokenizer, [token for part in (config.vision, config.audio) for token in (part and part.wrap) or ()])
    chat_template(tokenizer, config.language.chat_template)  # a missing one is said before anything heavy is loaded
    return own, tokenizer


def _model_config(config: ModelConfig, text_config: PreTrainedConfig, ids: dict[str, int]) -> AvlmConfig:
    """The model's configuration, from its parts' own and from what they were released with."""
    sources: dict[str, Source] = {}
    if config.vision is not None:
        sources["vision"] = config.vision.encoder
    if config.audio is not None:
        sources["audio"] = config.audio.encoder
        if config.audio.beside is not None:
            sources["beside"] = config.audio.beside
    where = {"vision": "vision.encoder", "audio": "audio.encoder", "beside": "audio.beside"}
    configs = {name: _encoder_config(source, where[name]) for name, source in sources.items()}
    prepared = {
        name: preprocessor_of(source.path, "vision" if name == "vision" else "audio")
        for name, source in sources.items()
        if source.path is not None
    }
    return describe(config, text_config, configs, prepared=prepared, ids=ids)


def describe(
    parts: ModelConfig,
    text_config: PreTrainedConfig,
    configs: dict[str, PreTrainedConfig],
    *,
    prepared: dict[str, dict[str, Any]],
    ids: dict[str, int],
) -> AvlmConfig:
    """The configuration of a model of these parts.

    Args:
        parts: How they are joined.
        text_config: The language model's own configuration.
        configs: The encoders' own: ``vision``, ``audio``, and ``beside`` for a second one that hears.
        prepared: The encoders' released preprocessing, as in ``preprocessor_config.json``, by the same names where it
            is known.
        ids: Of the placeholders, by kind.

    Raises:
        ConfigError: Parts do not fit.
    """
    vision, audio = parts.vision, parts.audio
    media = MediaSpec(
        vision=None if vision is None else vision_spec(configs["vision"], vision, prepared.get("vision", {})),
        audio=None if audio is None else _audio_spec(audio, configs, prepared),
        video=parts.video,
    )
    return AvlmConfig(
        text_config,
        configs.get("vision"),
        configs.get("audio"),
        vision_connector=None if vision is None else vision.connector.model_dump(),
        audio_connector=None if audio is None else audio.connector.model_dump(),
        vision_layer=None if vision is None else vision.layer,
        audio_layer=None if audio is None else audio.layer,
        media=media.model_dump(mode="json"),
        audio_beside_config=configs.get("beside"),
        **{f"{kind}_token_id": ids.get(kind) for kind in PLACEHOLDERS},
    )


def _audio_spec(
    part: AudioPart, configs: dict[str, PreTrainedConfig], prepared: dict[str, dict[str, Any]]
) -> AudioSpec:
    """What the audio encoder hears, and what a second one hears of it."""
    spec = audio_spec(configs["audio"], part, prepared.get("audio", {}))
    if part.beside is None:
        return spec
    other = audio_spec(configs["beside"], AudioPart(encoder=part.beside), prepared.get("beside", {}))
    return spec.model_copy(update={"beside": other})


def skeleton(config: ModelConfig) -> AvlmForConditionalGeneration:
    """A model of any size without memory behind its weights, and without a download: to be counted.

    Raises:
        ConfigError: Parts do not fit, or the configuration of one is not known without a download.
    """

    def known(source: Source, part: str) -> dict[str, Any]:
        return {"path": None, "random": source.transformers_config(part)}

    update: dict[str, Any] = {"language": config.language.model_copy(update=known(config.language, "language"))}
    for sense in ("vision", "audio"):
        part: VisionPart | AudioPart | None = getattr(config, sense)
        if part is not None:
            changed: dict[str, Any] = {"encoder": Source(**known(part.encoder, f"{sense}.encoder"))}
            if isinstance(part, AudioPart) and part.beside is not None:
                changed["beside"] = Source(**known(part.beside, "audio.beside"))
            update[sense] = part.model_copy(update=changed)
    config = config.model_copy(update=update)
    text_config = _random_config(config.language.random or {}, "language")
    with torch.device("meta"):
        return AvlmForConditionalGeneration(_model_config(config, text_config, {}))


def _assemble(
    model_config: AvlmConfig,
    config: ModelConfig,
    own: PreTrainedTokenizerBase | None,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> AvlmForConditionalGeneration:
    """Module tree without memory first, then each part in its place with its weights.

    Args:
        own: The tokenizer that the language model was trained with; None leaves the language model without memory.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with torch.device("meta"):
            model = AvlmForConditionalGeneration(model_config)
        inner = model.model
        if own is not None:
            inner.language_model = _language_model(config.language, model_config.text_config)
        if own is not None and config.language.path is not None:
            fit_vocabulary(inner.language_model, own, tokenizer, config.language.init)
        width = inner.language_model.config.hidden_size
        model_config.text_config = inner.language_model.config
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(model_config, name, getattr(model_config.text_config, name, None))
        for sense in ("vision", "audio"):
            part: VisionPart | AudioPart | None = getattr(config, sense)
            if part is None:
                continue
            encoder_config = getattr(model_config, f"{sense}_config")
            setattr(inner, f"{sense}_tower", _encoder(part.encoder, encoder_config, f"{sense}.encoder"))
            setattr(inner, f"{sense}_connector", sense_connector(model_config, sense, width))
        if config.audio is not None and config.audio.beside is not None:
            inner.audio_beside_tower = _encoder(config.audio.beside, model_config.audio_beside_config, "audio.beside")
        for name in ("vision_tower", "vision_connector", "audio_tower", "audio_beside_tower", "audio_connector"):
            if getattr(inner, name) is not None:
                cast_weights(getattr(inner, name), inner.language_model.dtype)
    model.tie_weights()
    spared = "model.language_model." if own is None else "-"
    left = [name for name, p in model.named_parameters() if p.is_meta and not name.startswith(spared)]
    if left:
        raise WeightsError(
            f"{len(left)} weights were left without values, {left[0]} among them. Report this as a defect of avlm"
        )
    attention.use(inner.language_model)
    return model


def _make_room(text_config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """As many rows in a language model's tables as `fit_vocabulary` would make."""
    inner = text_config.get_text_config()
    inner.vocab_size = max(inner.vocab_size, *(number + 1 for number in tokenizer.get_vocab().values()))


def _generation_config(language: PreTrainedModel, processor: AvlmProcessor) -> Any:
    """The released language model's settings for `generate`, which also ends an answer where the template does.

    A base model's tokenizer ends texts with one token and a chat template turns with another: without the second an
    answer would never end by itself.
    """
    settings = copy.deepcopy(language.generation_config)
    tokenizer, known = processor.tokenizer, settings.eos_token_id
    ends = [*(known if isinstance(known, list) else [known]), tokenizer.eos_token_id, processor.tokens().answer_end()]
    ends = list(dict.fromkeys(int(end) for end in ends if end is not None))
    settings.eos_token_id = ends[0] if len(ends) == 1 else ends or None
    if settings.pad_token_id is None:
        settings.pad_token_id = tokenizer.pad_token_id
    return settings


def _language_model(part: LanguagePart, config: PreTrainedConfig) -> PreTrainedModel:
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
    return model


def _encoder(source: Source, config: PreTrainedConfig, part: str) -> nn.Module:
    if source.path is None:
        return build_encoder(config)
    with _loading(part, source.path):
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


def _encoder_config(source: Source, part: str) -> PreTrainedConfig:
    sense: Literal["vision", "audio"] = "vision" if part.startswith("vision") else "audio"
    if source.random is not None:
        return inner_config(_random_config(source.random, part), sense)
    assert source.path is not None
    return inner_config(_read_config(source.path, part), sense)


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


def _tokenizers(
    part: LanguagePart, texts: Iterable[str] | None
) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """The tokenizer that the language model was trained with, and the one that it is to have here."""
    path = part.tokenizer or part.path
    if path is None:
        if texts is None:
            raise ConfigError(
                "model.language has random weights and no tokenizer, so text cannot be turned into tokens. "
                "Set model.language.tokenizer to a folder or a hub name"
            )
        tokenizer = make_tokenizer(texts, part.vocabulary)
    else:
        tokenizer = _read_tokenizer(path, "language.tokenizer" if part.tokenizer else "language")
    own = copy.deepcopy(tokenizer)
    if part.tokenizer is not None and part.path is not None and _has_tokenizer(part.path):
        own = _read_tokenizer(part.path, "language")  # where none lies beside it, the one that is given is its own
    add_tokens(tokenizer, part.add_tokens, part.add_special_tokens)
    return own, tokenizer


def _has_tokenizer(path: str) -> bool:
    return any(file_of(path, name) is not None for name in ("tokenizer_config.json", "tokenizer.json"))


def _read_tokenizer(path: str, part: str) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase
    with _loading(part, path):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    return tokenizer
