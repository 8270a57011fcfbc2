"""A tiny configuration of every family, for tests that go through all of them."""

from __future__ import annotations

from typing import Any

VIT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
SQUARE = {"image_size": [28, 28], "patch_size": [7, 7]}
MAPS: dict[str, Any] = {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]}
SPEECH: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "max_source_positions": 100,
}
DEEP: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
WAVES: dict[str, Any] = {
    **DEEP,
    "conv_dim": [16] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}

VISION: dict[str, dict[str, Any]] = {
    "CLIP": {"model_type": "clip_vision_model", **VIT},
    "SigLIP, SigLIP 2 (fixed)": {"model_type": "siglip_vision_model", **VIT},
    "SigLIP 2 (NaFlex)": {"model_type": "siglip2_vision_model", **VIT, "num_patches": 16},
    "InternVL-ViT": {"model_type": "internvl_vision", **VIT, **SQUARE, "use_absolute_position_embeddings": True},
    "DINOv2": {"model_type": "dinov2", **VIT},
    "DINOv2 with registers": {"model_type": "dinov2_with_registers", **VIT, "num_register_tokens": 4},
    "DINOv3": {"model_type": "dinov3_vit", **VIT, "num_register_tokens": 4},
    "AIMv2": {"model_type": "aimv2_vision_model", **VIT},
    "BiT": {"model_type": "bit", **MAPS, "embedding_size": 16, "num_groups": 4},
    "ConvNeXt": {"model_type": "convnext", **MAPS},
}
AUDIO: dict[str, dict[str, Any]] = {
    "Whisper": {"model_type": "whisper", **SPEECH, "num_mel_bins": 80},
    "Whisper, released window": {"model_type": "whisper", **SPEECH, "num_mel_bins": 80},
    "Qwen2-Audio": {"model_type": "qwen2_audio_encoder", **SPEECH, "num_mel_bins": 128},
    "AST": {"model_type": "audio-spectrogram-transformer", **DEEP, "max_length": 128},
    "HuBERT (group norm)": {"model_type": "hubert", **WAVES, "feat_extract_norm": "group"},
    "HuBERT (layer norm)": {
        "model_type": "hubert",
        **WAVES,
        "feat_extract_norm": "layer",
        "do_stable_layer_norm": True,
    },
    "WavLM": {"model_type": "wavlm", **WAVES},
    "Wav2Vec2": {"model_type": "wav2vec2", **WAVES},
    "Wav2Vec2-BERT": {"model_type": "wav2vec2-bert", **DEEP, "output_hidden_size": 32},
    "Parakeet": {"model_type": "parakeet_encoder", **DEEP, "subsampling_conv_channels": 8, "num_mel_bins": 80},
    "Gemma 3n": {
        "model_type": "gemma3n_audio",
        "hidden_size": 32,
        "conf_num_hidden_layers": 2,
        "conf_num_attention_heads": 2,
        "sscp_conv_channel_size": [8, 4],
    },
    "Gemma 4": {"model_type": "gemma4_audio", **DEEP, "subsampling_conv_channels": [8, 4], "output_proj_dims": 32},
    "CLAP": {
        "model_type": "clap_audio_model",
        "patch_embeds_hidden_size": 16,
        "hidden_size": 128,
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [2, 2, 2, 2],
    },
    "VITA": {"model_type": "avlm_whale", **DEEP, "channels": 8},
    "BEATs": {"model_type": "avlm_beats", **DEEP, "embedding_size": 16},
}
WINDOWED = {"Whisper, released window"}
"""Families that are also tried with their released window."""

LANGUAGE: dict[str, dict[str, Any]] = {
    "Llama": {
        "model_type": "llama",
        **DEEP,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
    },
    "Qwen": {
        "model_type": "qwen2",
        **DEEP,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "max_position_embeddings": 4096,
    },
    "Mixtral": {
        "model_type": "mixtral",
        **DEEP,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "max_position_embeddings": 4096,
    },
}

CACHED: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral, windows": {"model_type": "mistral", "sliding_window": 6},
    "gemma2, windows and soft caps": {
        "model_type": "gemma2", "sliding_window": 6, "head_dim": 8, "attn_logit_softcapping": 2.0,
    },
    "qwen3, norms of heads": {"model_type": "qwen3", "head_dim": 8},
    "gpt_oss, sinks": {
        "model_type": "gpt_oss", "sliding_window": 6, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "nemotron_h, a state": {
        "model_type": "nemotron_h",
        "layer_types": ["linear_attention", "full_attention"],
        "head_dim": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "n_groups": 1,
        "ssm_state_size": 4,
    },
    "llama, positions that depend on the length": {
        "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
        "max_position_embeddings": 48,
    },
}  # fmt: skip
"""What makes the tiny Llama of `make_model` a language model that keeps what it has read in another way."""
