"""What watching and counting cost: steps a second with all of it as it is by default, and with all of it off.

Off are spikes, stalls, floating-point operations and the looks at memory, gradients and updates. On stays what costs
nothing: a loss or a gradient that is no number stops the run either way. The time is that between two steps, by the
clock; runs with and without come in turns.
"""

from __future__ import annotations

import io
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from features import BOTH, LLAMA, SMALL, TEMPLATE, WORDS, rows
from harness import Line, Table
from rich.console import Console

from avlm.config.io import build
from avlm.config.run import RunConfig
from avlm.training.chain import Run

PICTURES, BATCH, STEPS, ROUNDS = 16, 4, 44, 8
WARM = 4
"""Steps of a run that count for nothing."""
CLIP: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "image_size": 112,
    "patch_size": 14,
}
OFF: dict[str, Any] = {"watch": {"spike": None, "stall_s": None}, "count": {"flops": False, "every": None}}
KEPT = 0.97
"""The share of the speed that is left with everything on, at least."""


def settings(data: Path, out: Path, more: dict[str, Any]) -> RunConfig:
    """One stage that trains a small language model behind a small encoder."""
    return build(
        RunConfig,
        {
            "recipe": "bench",
            "out": str(out),
            "model": {
                "language": {"random": {**LLAMA, **SMALL}, "chat_template": TEMPLATE, "vocabulary": 2 * WORDS},
                "vision": {"encoder": {"random": CLIP}},
            },
            "data": {"train": str(data)},
            "stages": [
                {"name": "s", "train": {part: {"lr": 1e-4} for part in BOTH}, "steps": STEPS, "batch_samples": BATCH}
            ],
            "features": {"use": "off"},
            "samples": {"prompts": 0},
            "save": {"every_s": 1e6},
            "threads": torch.get_num_threads(),
            **more,
        },
    )


def speed(config: RunConfig) -> float:
    """Steps a second behind the first few."""
    at: list[float] = []
    Run(config, console=Console(file=io.StringIO()), on_step=lambda _: at.append(time.perf_counter())).train()
    return (len(at) - 1 - WARM) / (at[-1] - at[WARM])


def main(pictures: int = PICTURES, rounds: int = ROUNDS) -> list[Table]:
    """Runs with everything on and off in turns."""
    found: dict[str, list[float]] = {"on": [], "off": []}
    with tempfile.TemporaryDirectory() as folder:
        data = rows(Path(folder), pictures)
        for number in range(rounds):
            for use in ("on", "off") if number % 2 else ("off", "on"):
                out = Path(folder) / f"{use}{number}"
                found[use].append(speed(settings(data, out, OFF if use == "off" else {})))
    ratios = [on / off for on, off in zip(found["on"], found["off"], strict=True)]
    return [
        Table(
            "watch",
            "Watching and counting, a Llama of 4 layers and width 256 behind a small CLIP",
            "steps/s",
            ["The ratio is the median of those of all pairs of runs."],
            [
                Line(
                    "all on, as by default",
                    max(found["on"]),
                    "all off",
                    max(found["off"]),
                    statistics.median(ratios),
                    ratios,
                    KEPT,
                )
            ],
        )
    ]
