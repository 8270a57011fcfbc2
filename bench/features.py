"""The feature cache in whole runs: tokens a second with it, in its first epoch, and without.

The encoder is heavy beside what reads it: CLIP-L's shape (24 layers of width 1024, 336 px in cells of 14) under the
same small language model as in the case `tower` of `train`, a Llama of 4 layers and width 256, with a conversation of
about 150 tokens to each picture, as LLaVA's have on average. A Llama of 8 layers and width 512 is told beside it, with
no bar: where that learns too, three quarters of the operations are the encoder's, so nothing could pass 4.3 times. Each
run is `avlm.train` on JPEG files, decoding included; the first step of a run warms it up and counts for nothing.
"""

from __future__ import annotations

import io
import json
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import Line, Table
from material import jpeg
from rich.console import Console

from avlm.config.io import build
from avlm.config.run import RunConfig
from avlm.training.chain import Run

PICTURES, BATCH, EPOCHS, ROUNDS = 8, 2, 3, 2
LAYERS = 24
WORDS = 300
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
CLIP_L: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
SMALL = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4}
LARGER = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8}
BOTH, CONNECTOR = ("vision_connector", "language"), ("vision_connector",)


@dataclass(frozen=True, slots=True)
class Case:
    """What learns, and which language model reads."""

    name: str
    learns: tuple[str, ...]
    language: dict[str, int]
    bar: float | None = None
    """The least ratio that is wanted against no cache."""


CASES = [
    Case("connector and language model", BOTH, SMALL, 5.0),
    Case("connector alone", CONNECTOR, SMALL, 5.0),
    Case("connector and a language model of width 512", BOTH, LARGER),
    Case("connector alone, under a language model of width 512", CONNECTOR, LARGER),
]


def rows(folder: Path, pictures: int) -> Path:
    """Pictures, each with a conversation of about 150 tokens."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=4)) for _ in range(WORDS)]
    found = []
    for i in range(pictures):
        (folder / f"{i}.jpg").write_bytes(jpeg(640, 480, i))
        question = [{"type": "image", "path": f"{i}.jpg"}, {"type": "text", "text": " ".join(rng.choices(words, k=20))}]
        answer = " ".join(rng.choices(words, k=rng.randint(80, 160)))
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        found.append({"id": str(i), "messages": messages})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def settings(data: Path, out: Path, case: Case, use: str, layers: int) -> RunConfig:
    """One stage with a frozen encoder."""
    train = {part: {"lr": 1e-4} for part in case.learns}
    epochs = EPOCHS if use == "on" else 1
    stage = {"name": "s", "train": train, "rows": "vision", "epochs": epochs, "batch_samples": BATCH}
    return build(
        RunConfig,
        {
            "recipe": "bench",
            "out": str(out),
            "model": {
                "language": {"random": {**LLAMA, **case.language}, "chat_template": TEMPLATE, "vocabulary": 2 * WORDS},
                "vision": {"encoder": {"random": {**CLIP_L, "num_hidden_layers": layers}}},
            },
            "data": {"train": str(data), "workers": 1},
            "stages": [stage],
            "features": {"use": use},
            "samples": {"prompts": 0},
            "save": {"every_s": 1e6},
            "threads": torch.get_num_threads(),
        },
    )


def rates(config: RunConfig, per_epoch: int) -> list[float]:
    """Tokens a second of each epoch; of the first one without its first step."""
    found: list[Any] = []
    Run(config, console=Console(file=io.StringIO()), on_step=found.append).train()
    epochs = [found[i : i + per_epoch] for i in range(0, len(found), per_epoch)]
    epochs[0] = epochs[0][1:]
    return [sum(m.tokens for m in epoch) / sum(m.seconds for m in epoch) for epoch in epochs]


def main(pictures: int = PICTURES, layers: int = LAYERS, rounds: int = ROUNDS) -> list[Table]:
    """Runs with the cache and without in turns, for each case."""
    table = Table(
        "feature_cache",
        f"A frozen CLIP of {layers} layers before a small language model, {pictures} pictures",
        "tokens/s",
        ["The feature cache in its third epoch, beside its first one and beside none. Best of each."],
    )
    for case in CASES:
        warm, cold, none = [], [], []
        for _ in range(rounds):
            with tempfile.TemporaryDirectory() as folder:
                data = rows(Path(folder), pictures)
                without, kept = (
                    rates(settings(data, Path(folder) / use, case, use, layers), pictures // BATCH)
                    for use in ("off", "on")
                )
                none.append(without[0])
                cold.append(kept[0])
                warm.append(kept[-1])  # in the second one the first that are found are made as well
        for peer, theirs, bar in (("its first epoch", cold, None), ("no cache", none, case.bar)):
            ratios = [a / b for a, b in zip(warm, theirs, strict=True)]
            table.lines.append(Line(case.name, max(warm), peer, max(theirs), max(warm) / max(theirs), ratios, bar))
    return [table]
