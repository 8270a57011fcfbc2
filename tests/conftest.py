"""Tiny parts and media that many tests share, made from nothing and seeded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

torch.set_num_threads(1)  # tests run beside each other, and tiny tensors gain nothing from more

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
SIGLIP: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
WHISPER: dict[str, Any] = {
    "model_type": "whisper",
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "num_mel_bins": 80,
    "max_source_positions": 1500,
}


@pytest.fixture
def picture(tmp_path: Path) -> Callable[..., Path]:
    """Write a random picture: ``picture("a.png", seed=1, size=(40, 30))``."""

    def write(name: str = "a.png", *, seed: int = 0, size: tuple[int, int] = (40, 30)) -> Path:
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
        return tmp_path / name

    return write


@pytest.fixture
def sound(tmp_path: Path) -> Callable[..., Path]:
    """Write a random recording: ``sound("a.wav", seconds=0.5, rate=16000)``."""
    import soundfile

    def write(
        name: str = "a.wav", *, seed: int = 0, seconds: float = 0.5, rate: int = 16_000, channels: int = 1
    ) -> Path:
        rng = np.random.default_rng(seed)
        wave = 0.1 * rng.standard_normal((round(seconds * rate), channels)).astype(np.float32)
        soundfile.write(tmp_path / name, wave, rate)
        return tmp_path / name

    return write


@pytest.fixture
def rows(tmp_path: Path, picture: Callable[..., Path], sound: Callable[..., Path]) -> Callable[..., Path]:
    """Write a small mixed data file: text, pictures, sounds, both; its path is returned."""

    def write(name: str = "rows.jsonl", count: int = 12) -> Path:
        found = []
        for i in range(count):
            image = {"type": "image", "path": picture(f"p{i}.png", seed=i).name}
            audio = {"type": "audio", "path": sound(f"s{i}.wav", seed=i, seconds=0.2 + 0.05 * (i % 3)).name}
            media = [[image], [audio], [image, audio], []][i % 4]
            question = {"type": "text", "text": f"What is number {i}?"}
            answer = ["red", "blue", "green"][i % 3]
            messages = [
                {"role": "user", "content": [*media, question]},
                {"role": "assistant", "content": answer},
            ]
            found.append({"id": str(i), "task": ["vqa", "hear", "match", "text"][i % 4], "messages": messages})
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in found))
        return path

    return write
