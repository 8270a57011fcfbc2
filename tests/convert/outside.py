"""Tiny checkpoints of other makers, as their own library writes them: random weights, real processors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2AudioConfig,
    Qwen2AudioEncoderConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    Qwen2Config,
    WhisperFeatureExtractor,
)

SIDE, PATCH = 28, 14

LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""The conversation that the llava-hf checkpoints of LLaVA-1.5 carry: pictures first, no end token."""

INST_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}"
    "{{ ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'][0]['text'] + '</s>' }}"
    "{% endif %}{% endfor %}"
)
"""The conversation of LLaVA-NeXT with Mistral."""

TEXTS = ["USER: What is it? ASSISTANT: red", "[INST] What do you hear? [/INST] blue", "Audio 1: <|im_start|>user"] * 3


def tokenizer(*special: str, begins: bool = True, **names: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE that begins every text with ``<s>``, as Llama's does; or with nothing, as Qwen's."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    tokens = ["<s>", "</s>", "<pad>", *special]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=tokens,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS, trainer)
    if begins:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    ends = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} if begins else {"eos_token": "<|im_end|>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **{"pad_token": "<pad>", **ends, **names})


def text_config(kind: type, vocab_size: int, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": vocab_size,
        "max_position_embeddings": 4096,
    }
    return kind(**{**settings, **changes})


def clip_config(**changes: Any) -> CLIPVisionConfig:
    settings: dict[str, Any] = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
    }
    return CLIPVisionConfig(**{**settings, **changes})


def shaken(model: PreTrainedModel, seed: int = 0) -> Any:
    """Weights large enough that every mistake shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.2 if parameter.ndim > 1 else 0.1
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model.eval()


def llava(out: Path, *, spare: int = 5, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A LLaVA-1.5 with its processor; ``spare`` rows of the embeddings belong to no token."""
    words = tokenizer("<image>")
    text = settings.pop("text", {})
    vision = settings.pop("vision_config", None) or clip_config()
    config = LlavaConfig(
        vision_config=vision,
        text_config=text_config(LlamaConfig, len(words) + spare, **text),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=(SIDE // PATCH) ** 2,
        **settings,
    )
    torch.manual_seed(1)
    model = shaken(LlavaForConditionalGeneration(config)).to(dtype)
    model.config.dtype = dtype
    pictures = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    strategy = config.vision_feature_select_strategy
    processor = LlavaProcessor(
        pictures, words, PATCH, strategy, chat_template=LLAVA_TEMPLATE, num_additional_image_tokens=1
    )
    return _saved(model, processor, out)


PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]


def llava_next(out: Path, **settings: Any) -> Any:
    """A LLaVA-NeXT with its processor."""
    words = tokenizer("<image>")
    config = LlavaNextConfig(
        vision_config=clip_config(),
        text_config=text_config(LlamaConfig, len(words) + 5),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=(SIDE // PATCH) ** 2,
        image_grid_pinpoints=PINPOINTS,
        **settings,
    )
    torch.manual_seed(1)
    model = shaken(LlavaNextForConditionalGeneration(config))
    pictures = LlavaNextImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS
    )
    processor = LlavaNextProcessor(
        pictures, words, PATCH, "default", chat_template=INST_TEMPLATE, num_additional_image_tokens=1
    )
    return _saved(model, processor, out)


def qwen2_audio(out: Path) -> Any:
    """A Qwen2-Audio with its processor and its own names for the places of sound."""
    words = tokenizer("<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>", begins=False)
    audio = Qwen2AudioEncoderConfig(
        num_mel_bins=80, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=40, d_model=24
    )
    config = Qwen2AudioConfig(
        audio_config=audio,
        text_config=text_config(Qwen2Config, len(words) + 5),
        audio_token_index=words.convert_tokens_to_ids("<|AUDIO|>"),
    )
    torch.manual_seed(1)
    model = shaken(Qwen2AudioForConditionalGeneration(config))
    return _saved(model, Qwen2AudioProcessor(WhisperFeatureExtractor(feature_size=80), words), out)


def _saved(model: Any, processor: Any, out: Path) -> Any:
    """The model as its library reads it back, so that whatever it does on the way has been done."""
    model.save_pretrained(out)
    processor.save_pretrained(out)
    return type(model).from_pretrained(out, dtype=model.config.dtype).eval()
