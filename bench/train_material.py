"""The small LLaVA and the samples that training steps are timed on: drawn on the spot, the same in every process."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from avlm.config.io import build
from avlm.config.model import ModelConfig
from avlm.convert.compose import Composed, compose
from avlm.convert.exporting import export_model
from avlm.convert.weights import save_model
from avlm.layout import Segment
from avlm.samples import IGNORE, Encoded, Place

WORDS = 32_000
CELLS, SIDE_PX = 576, 336
"""Tokens of a picture behind CLIP 336/14, and its side."""
FIRST_WORD = 16
"""Tokens below it are special ones."""
TEXT_ONLY = 0.07
MEDIAN, SPREAD, LONGEST = 150, 0.9, 1500
"""Text tokens of a sample are log-normal: half have more than the median, one in fifty more than a thousand."""
PICTURES = 8
"""Different pictures; samples take them in turns, so that memory holds no more than these."""

TEMPLATE = "{% for m in messages %}{{ m['content'] }} </s>{% endfor %}"
CLIP = {"model_type": "clip_vision_model", "image_size": SIDE_PX, "patch_size": 14, "projection_dim": 64}
LLAMA = {"model_type": "llama", "vocab_size": WORDS, "max_position_embeddings": 4096, "tie_word_embeddings": False}

MODELS: dict[str, dict[str, Any]] = {
    "llava": {
        "tower": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4},
        "language": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8},
    },
    "tower": {  # CLIP-L under a small language model
        "tower": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
        "language": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4},
    },
    "tiny": {  # for trying the bench itself out
        "tower": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
        "language": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    },
}


@dataclass(frozen=True, slots=True)
class Talk:
    """One sample: its tokens, where a picture stands in them, and from where on they are learned."""

    ids: tuple[int, ...]
    picture: int | None
    """Which picture; its places come right behind the first token."""
    answer: int
    """Position of the first token that is learned."""


def make_model(name: str, folder: Path) -> Composed:
    """One of the models, and its processor, in memory."""
    words = folder / "tokenizer"
    if not words.exists():
        _tokenizer().save_pretrained(words)
    parts = MODELS[name]
    config = {
        "language": {"random": {**LLAMA, **parts["language"]}, "tokenizer": str(words), "chat_template": TEMPLATE},
        "vision": {"encoder": {"random": {**CLIP, **parts["tower"]}}},
    }
    return compose(build(ModelConfig, config))


def build_models(name: str, folder: Path) -> tuple[Path, Path]:
    """The model as a directory of avlm's, and the same weights as one of transformers' LLaVA."""
    ours, theirs = folder / f"{name}-avlm", folder / f"{name}-llava"
    save_model(*make_model(name, folder), ours)
    export_model(str(ours), theirs, "llava")
    return ours, theirs


def _tokenizer() -> PreTrainedTokenizerFast:
    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "<video>", "<audio>"]
    vocabulary = {word: i for i, word in enumerate([*special, *(f"w{i}" for i in range(WORDS - len(special)))])}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=special[4:],
    )


def talks(count: int, *, equal: bool, image_id: int, seed: int = 0) -> list[Talk]:
    """Samples of a step, lengths as in LLaVA-1.5's mix: the quantiles of their distribution, shuffled.

    Args:
        count: Samples; the more, the farther the longest one is out.
        equal: All as long as the median, each with a picture.
        image_id: The placeholder's token.
    """
    rng = np.random.default_rng(seed)
    lengths = [MEDIAN] * count if equal else _lengths(count)
    rng.shuffle(lengths)
    words_only = 0 if equal else max(1, round(TEXT_ONLY * count))
    return [_talk(n, i if i >= words_only else None, image_id, rng) for i, n in enumerate(lengths)]


def _lengths(count: int) -> list[int]:
    normal = statistics.NormalDist()
    drawn = (normal.inv_cdf((i + 0.5) / count) for i in range(count))
    return [min(LONGEST, round(MEDIAN * float(np.exp(SPREAD * z)))) for z in drawn]


def _talk(length: int, number: int | None, image_id: int, rng: np.random.Generator) -> Talk:
    text = rng.integers(FIRST_WORD, WORDS, length).tolist()
    places = [image_id] * CELLS if number is not None else []
    picture = None if number is None else number % PICTURES
    return Talk((1, *places, *text), picture, 1 + len(places) + length // 2)


def labels(talk: Talk) -> list[int]:
    return [IGNORE] * talk.answer + list(talk.ids[talk.answer :])


def picture(number: int) -> torch.Tensor:
    """float32 (3, SIDE_PX, SIDE_PX), as it comes out of preprocessing."""
    return torch.randn(3, SIDE_PX, SIDE_PX, generator=torch.Generator().manual_seed(number))


def encoded(talk: Talk, number: int, pictures: list[torch.Tensor]) -> Encoded:
    """The sample as avlm's loader gives it."""
    sample = Encoded(str(number), list(talk.ids), labels(talk))
    if talk.picture is not None:
        sample.places = [Place(sample.id, 0, (Segment("image", CELLS),))]
        sample.spans = [(1, 1 + CELLS)]
        sample.images, sample.tiles = [pictures[talk.picture]], [1]
    return sample


def operations(given: list[Talk], name: str, train: str, rank: int) -> float:
    """Floating-point operations that a step cannot do without, in its matrix products and attention.

    Forward: the tower up to the layer that is read, the connector, the language model over tokens that are no padding,
    and its head at the targets. Backward: through the language model and the connector, and for the weights that learn.
    Nothing is computed twice.
    """
    language, tower = MODELS[name]["language"], MODELS[name]["tower"]
    width, layers = language["hidden_size"], language["num_hidden_layers"]
    tokens, targets = sum(len(t.ids) for t in given), sum(len(t.ids) - t.answer for t in given)
    pictures = sum(t.picture is not None for t in given)
    # Products by one matrix: forward, for what is before it, and for itself.
    language_passes, adapter = (3 if train == "full" else 2), (3 if train == "lora" else 0)
    inner = language["intermediate_size"]
    done = 2 * layers * (4 * width * width + 3 * width * inner) * tokens * language_passes
    done += 2 * layers * rank * (8 * width + 3 * (width + inner)) * tokens * adapter
    done += 2 * width * WORDS * targets * language_passes
    seen = sum(n * (n + 1) // 2 for n in (len(t.ids) for t in given))
    done += 2 * 2 * layers * width * seen * 3
    wide, deep = tower["hidden_size"], tower["num_hidden_layers"] - 1
    places = CELLS + 1
    looked = 2 * deep * (4 * wide * wide + 2 * wide * tower["intermediate_size"]) * places
    looked += 2 * 2 * deep * wide * places * places + 2 * 3 * 14 * 14 * wide * CELLS
    joined = 2 * CELLS * (2 * wide * width + 3 * width * width)
    return float(done + (looked + joined) * pictures)
