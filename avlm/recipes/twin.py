"""A recipe's twin: the same families, stages, losses and code at tiny widths, which trains on a laptop."""

from __future__ import annotations

import re
from typing import Any

from avlm.config.model import AudioPart, LanguagePart, ModelConfig, Source, VisionPart
from avlm.config.run import RunConfig
from avlm.config.stage import Stage
from avlm.errors import ConfigError
from avlm.recipes.templates import LLAMA3

WIDTHS: dict[str, Any] = {
    "hidden_size": 32,
    "d_model": 32,
    "intermediate_size": 64,
    "encoder_ffn_dim": 64,
    "num_hidden_layers": 2,
    "encoder_layers": 2,
    "num_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "projection_dim": 32,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
"""What makes a configuration tiny, whatever its family, where it has such a setting."""

FAMILY: dict[str, dict[str, Any]] = {
    "whisper": {"max_source_positions": 100, "decoder_layers": 1, "decoder_ffn_dim": 32, "decoder_attention_heads": 2},
    "qwen2_audio_encoder": {"max_source_positions": 100},
    "avlm_whale": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "channels": 8,
    },
    "avlm_beats": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "embedding_size": 16, "conv_pos": 16, "conv_pos_groups": 4,
    },
    "audio-spectrogram-transformer": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_length": 128,
    },
    "wav2vec2-bert": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "output_hidden_size": 32,
    },
    "hubert": {"conv_dim": (16,) * 7},
    "wavlm": {"conv_dim": (16,) * 7},
}  # fmt: skip
CELLS = 4
"""A twin's pictures have this many cells to a side."""
STEPS, BATCH = 4, 4


def short(run: RunConfig) -> RunConfig:
    """A run with short stages of few samples."""
    update = {"steps": STEPS, "epochs": None, "batch_samples": BATCH}
    stages = [stage.model_copy(update=update) for stage in run.stages]
    return run.model_copy(update={"stages": tuple(_begun(stage) for stage in stages)})


def _begun(stage: Stage) -> Stage:
    """A short stage that goes on behind what it begins with."""
    if stage.first is None:
        return stage
    return stage.model_copy(update={"first": stage.first.model_copy(update={"steps": STEPS // 2})})


def tiny_parts(run: RunConfig) -> RunConfig:
    """A run on tiny random parts of the same families, with a tokenizer made from its texts.

    A stage that would build a part which comes with its weights is left out here as it is at full size.

    Raises:
        ConfigError: A part's configuration is not known without a download.
    """
    if not isinstance(run.model, ModelConfig):
        raise ConfigError(
            f"size=twin makes tiny parts of a recipe's families, and model={run.model} has its own. "
            "Leave one of the two out"
        )
    model = run.model
    update: dict[str, Any] = {"language": _language(model.language)}
    if model.vision is not None:
        update["vision"] = _vision(model.vision)
    if model.audio is not None:
        update["audio"] = _audio(model.audio)
    stages = tuple(stage for stage in run.stages if stage.name not in run.left_out())
    return run.model_copy(update={"model": model.model_copy(update=update), "stages": stages})


def _tiny(source: Source, part: str) -> dict[str, Any]:
    config = source.transformers_config(part)
    small = {name: value for name, value in WIDTHS.items() if name in config}
    return config | small | FAMILY.get(config["model_type"], {})


def _language(part: LanguagePart) -> LanguagePart:
    config = _tiny(part, "language")
    for name in ("vocab_size", "sliding_window"):
        config.pop(name, None)
    template = part.chat_template or LLAMA3
    tokens = dict.fromkeys([*part.add_special_tokens, *re.findall(r"<\|\w+\|>", template)])
    return part.model_copy(
        update={
            "path": None,
            "tokenizer": None,
            "random": config,
            "vocabulary": 512,
            "chat_template": template,
            "add_special_tokens": tuple(tokens),
        }
    )


def _vision(part: VisionPart) -> VisionPart:
    config = _tiny(part.encoder, "vision.encoder")
    patch = config.get("patch_size")
    if patch is None:  # no ViT
        return part.model_copy(update={"encoder": Source(random=config)})
    side = CELLS * (patch[0] if isinstance(patch, list) else patch)
    config["image_size"] = [side, side] if isinstance(config["image_size"], list) else side
    return part.model_copy(update={"encoder": Source(random=config), "image_size_px": side})


def _audio(part: AudioPart) -> AudioPart:
    update: dict[str, Any] = {"encoder": Source(random=_tiny(part.encoder, "audio.encoder"))}
    if part.beside is not None:
        update["beside"] = Source(random=_tiny(part.beside, "audio.beside"))
    return part.model_copy(update=update)
