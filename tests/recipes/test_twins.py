"""Every recipe's twin, the same families and code at tiny widths, trains through all its stages and answers."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from avlm.config.io import override
from avlm.config.model import ModelConfig
from avlm.convert.weights import load_model
from avlm.data.mock import make_mock
from avlm.eval.check import Checks
from avlm.recipes import RECIPES, recipe
from avlm.training.chain import Run
from avlm.training.observe import read_lines

SYSTEMS = [name for name in RECIPES if name not in ("tiny", "sft", "voice")]  # voice begins with a model that exists
VARIANTS: dict[str, dict[str, str]] = {
    **{name: {} for name in SYSTEMS},
    "neva.llava15_7b with LoRA": {"peft": "lora"},
    "neva.classic with start and end tokens": {"language": "nvgpt", "projection": "mlp2x_gelu"},
    "avlm.8b with LoRA": {"peft": "lora"},
    "avlm.8b that only sees": {"senses": "vision"},
    "avlm.8b that only hears": {"senses": "audio"},
}


QUICK = ("avlm.8b", "neva.llava15_7b with LoRA")
"""Of these every test run sees all stages; of the others `make test-all`."""


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in VARIANTS]
)
def test_a_twin_goes_through_every_stage(variant: str, tmp_path: Path) -> None:
    name, _, _ = variant.partition(" ")
    config = recipe(name, size="twin", **VARIANTS[variant])
    assert isinstance(config.model, ModelConfig)
    sees, hears = config.model.vision is not None, config.model.audio is not None
    tasks = tuple(dict.fromkeys(task for stage in config.stages for task in stage.take))
    data = make_mock(tmp_path / "mock", sees=sees, hears=hears, tasks=tasks)
    config = override(config, [f"data.train={data}", f"out={tmp_path / 'run'}", "max_steps=2", "samples.prompts=0"])
    model = Run(config, console=Console(file=io.StringIO())).train()
    metrics = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["stage"] for row in metrics] == [stage.name for stage in config.stages for _ in range(2)]
    assert all(0 <= row["loss"] < 100 and row["grad_norm"] > 0 for row in metrics)
    assert not read_lines(tmp_path / "run" / "quarantine.jsonl")
    failed = [result for result in Checks(*load_model(model)).run() if not result.ok]
    assert not failed, failed
