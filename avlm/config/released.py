"""What released parts are made of: the facts of their `config.json`, by their name on the hub.

With these a model of any size is counted, planned and built on the meta device without a download, and its twin, the
same families at tiny widths, is derived. What transformers takes for granted in a family is left out.
"""

from __future__ import annotations

from typing import Any

VICUNA_7B, VICUNA_13B = "lmsys/vicuna-7b-v1.5", "lmsys/vicuna-13b-v1.5"
LLAMA2_7B, LLAMA3_8B = "meta-llama/Llama-2-7b-chat-hf", "meta-llama/Meta-Llama-3-8B-Instruct"
LLAMA31_8B = "meta-llama/Llama-3.1-8B-Instruct"
MISTRAL_7B, MIXTRAL_8X7B = "teknium/OpenHermes-2.5-Mistral-7B", "mistralai/Mixtral-8x7B-v0.1"
QWEN2_7B, QWEN25_7B = "Qwen/Qwen2-7B", "Qwen/Qwen2.5-7B-Instruct"
CLIP_L_336, SIGLIP_SO400M = "openai/clip-vit-large-patch14-336", "google/siglip-so400m-patch14-384"
INTERNVIT_300M = "OpenGVLab/InternVL3-1B-hf"
WHISPER_V2, WHISPER_V3, WHISPER_V3_TURBO = (
    "openai/whisper-large-v2",
    "openai/whisper-large-v3",
    "openai/whisper-large-v3-turbo",
)
QWEN2_AUDIO = "Qwen/Qwen2-Audio-7B"
AST = "MIT/ast-finetuned-audioset-10-10-0.4593"
HUBERT_L, WAVLM_L = "facebook/hubert-large-ls960-ft", "microsoft/wavlm-large"
W2V_BERT = "facebook/w2v-bert-2.0"

_LLAMA_7B: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
_LLAMA_13B = _LLAMA_7B | {
    "hidden_size": 5120,
    "intermediate_size": 13_824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}
_LLAMA3_8B = _LLAMA_7B | {
    "vocab_size": 128_256,
    "intermediate_size": 14_336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
}
_MISTRAL_7B: dict[str, Any] = {
    "model_type": "mistral",
    "vocab_size": 32_002,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32_768,
    "sliding_window": 4096,
}
_QWEN2_7B: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 152_064,
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": False,
}
_WHISPER: dict[str, Any] = {
    "model_type": "whisper",
    "d_model": 1280,
    "encoder_layers": 32,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "num_mel_bins": 128,
    "max_source_positions": 1500,
}
_WAV_L: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "conv_bias": True,
}

RELEASED: dict[str, dict[str, Any]] = {
    VICUNA_7B: _LLAMA_7B,
    VICUNA_13B: _LLAMA_13B,
    LLAMA2_7B: _LLAMA_7B,
    LLAMA3_8B: _LLAMA3_8B,
    LLAMA31_8B: _LLAMA3_8B
    | {
        "max_position_embeddings": 131_072,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    MISTRAL_7B: _MISTRAL_7B,
    MIXTRAL_8X7B: _MISTRAL_7B
    | {
        "model_type": "mixtral",
        "vocab_size": 32_000,
        "sliding_window": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.02,
    },
    QWEN2_7B: _QWEN2_7B,
    QWEN25_7B: _QWEN2_7B,
    CLIP_L_336: {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
    },
    SIGLIP_SO400M: {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    },
    INTERNVIT_300M: {
        "model_type": "internvl_vision",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": [448, 448],
        "patch_size": [14, 14],
        "attention_bias": True,
    },
    WHISPER_V2: _WHISPER | {"num_mel_bins": 80},
    WHISPER_V3: _WHISPER,
    WHISPER_V3_TURBO: _WHISPER,
    QWEN2_AUDIO: _WHISPER | {"model_type": "qwen2_audio_encoder"},
    AST: {"model_type": "audio-spectrogram-transformer"},
    HUBERT_L: {"model_type": "hubert", **_WAV_L},
    WAVLM_L: {"model_type": "wavlm", **_WAV_L, "conv_bias": False},
    W2V_BERT: {"model_type": "wav2vec2-bert"},
}

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "vision": {
        "clip": {"encoder": {"path": CLIP_L_336}, "layer": -2},
        "siglip": {"encoder": {"path": SIGLIP_SO400M}},
        "internvit": {"encoder": {"path": INTERNVIT_300M}, "connector": {"kind": "pixel_shuffle", "side": 2}},
    },
    "audio": {
        "whisper": {"encoder": {"path": WHISPER_V3}, "connector": {"kind": "mlp", "stack": 4}},
        "qwen2_audio": {"encoder": {"path": QWEN2_AUDIO}, "connector": {"kind": "linear"}, "length": "window"},
        "ast": {"encoder": {"path": AST}, "connector": {"kind": "mlp", "stack": 12}, "length": "window"},
        "hubert": {"encoder": {"path": HUBERT_L}, "connector": {"kind": "mlp", "stack": 4}},
        "wavlm": {"encoder": {"path": WAVLM_L}, "connector": {"kind": "mlp", "stack": 4}},
        "w2v_bert": {"encoder": {"path": W2V_BERT}, "connector": {"kind": "mlp", "stack": 4}},
    },
    "language": {
        "vicuna": {"path": VICUNA_7B},
        "llama3": {"path": LLAMA31_8B},
        "mistral": {"path": MISTRAL_7B},
        "qwen2.5": {"path": QWEN25_7B},
    },
}
"""Parts by short names: ``model.audio=ast`` puts an audio-tagging encoder in place of another."""
