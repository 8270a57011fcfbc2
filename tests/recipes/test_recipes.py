"""Every recipe prints what is stored for it, and takes two steps on a processor."""

from __future__ import annotations

import inspect
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from refresh import GOLDEN, printed, variants
from rich.console import Console

from avlm.cli.settings import what_trains
from avlm.config.io import build, override, to_yaml
from avlm.config.model import ModelConfig
from avlm.config.run import RunConfig
from avlm.config.stage import PARTS
from avlm.convert.compose import Composed
from avlm.convert.weights import save_model
from avlm.errors import ConfigError
from avlm.recipes import RECIPES, recipe, resolve, summaries
from avlm.training.chain import Run
from avlm.training.observe import read_lines


@pytest.mark.parametrize("name", variants())
def test_prints_what_is_stored(name: str) -> None:
    """If the change is meant: ``python -m tests.recipes.refresh``."""
    assert printed(variants()[name]) == (GOLDEN / f"{name}.yaml").read_text(encoding="utf-8")


def test_nothing_is_stored_for_a_recipe_that_is_gone() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == set(variants())


@pytest.mark.parametrize("name", variants())
def test_the_stored_text_is_the_recipe_again(name: str) -> None:
    assert recipe(str(GOLDEN / f"{name}.yaml")) == variants()[name]


def test_every_recipe_takes_the_overrides_that_all_must_take() -> None:
    for name in RECIPES:
        changed = override(
            recipe(name), ["out=o", "seed=5", "max_steps=3", "model=m", "data.train=t.jsonl", "data.eval=e.jsonl"]
        )
        assert (changed.out, changed.seed, changed.max_steps, changed.model) == ("o", 5, 3, "m")
        assert (changed.data.train, changed.data.eval) == ("t.jsonl", "e.jsonl")
        assert all(changed.stage_steps(stage, rows=10**9) <= 3 for stage in changed.stages)


def test_every_recipe_says_what_it_is() -> None:
    assert [name for name, _ in summaries()] == list(RECIPES)
    for name, function in RECIPES.items():
        assert len((inspect.getdoc(function) or "").splitlines()[0]) > 20
        assert recipe(name).recipe == name


def test_tinys_pace_multiplies_steps_and_changes_nothing_else() -> None:
    half, whole = recipe("tiny", pace=0.5), recipe("tiny")
    assert [s.steps for s in half.stages] == [max(1, round(s.steps / 2)) for s in whole.stages]
    begins = [
        (s.first.steps, t.first.steps) for s, t in zip(half.stages, whole.stages, strict=True) if s.first and t.first
    ]
    assert begins and all(2 * of_half == of_whole for of_half, of_whole in begins)
    one = {f"stages.{s.name}.steps=1" for s in whole.stages}
    one |= {f"stages.{s.name}.first.steps=1" for s in whole.stages if s.first}
    assert override(half, sorted(one)) == override(whole, sorted(one))


def test_sft_keeps_encoders_frozen_and_lora_is_an_argument() -> None:
    (whole,), (lora,) = recipe("sft").stages, recipe("sft", peft="lora").stages
    assert set(whole.train) == set(lora.train) == {"vision_connector", "audio_connector", "language"}
    assert whole.train["language"].lora is None
    assert lora.train["language"].lora is not None and lora.train["language"].lora.rank == 32
    assert set(whole.train) < set(PARTS)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("tiny", {"peft": 3}, "the recipe tiny takes no peft. It takes pace, size"),
        ("tiny", {"size": 3}, "size=3 is not a size of a recipe. Use one of full, twin"),
        (
            "avlm.8b",
            {"senses": "smell"},
            "senses=smell is nothing that the recipe avlm.8b can work with (input should",
        ),
        ("golden.yaml", {"pace": 3}, "golden.yaml is a file of settings and takes no pace"),
        ("llava", {}, "llava is neither a recipe nor a file of settings. There are tiny, sft, avlm.8b"),
    ],
)
def test_what_no_recipe_knows_is_refused(name: str, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        recipe(name, **arguments)
    assert str(error.value).startswith(message)


def test_a_twin_keeps_what_overrides_say_of_its_stages() -> None:
    changes = ["stages.pretrain.steps=9", "stages.finetune.batch_samples=2", "seed=3"]
    small = recipe("neva.llava15_7b", *changes, size="twin")
    assert [(s.steps, s.batch_samples) for s in small.stages] == [(9, 4), (4, 2)]
    assert small.seed == 3
    assert small == resolve("neva.llava15_7b", [*changes, "size=twin"])
    assert small.model == recipe("neva.llava15_7b", size="twin").model


@pytest.mark.parametrize("size", ["full", "twin"])
def test_an_encoder_is_swapped_by_one_override_and_one_with_weights_is_not_built(size: str) -> None:
    run = recipe("vita15.7b", "model.audio=ast", "stages.speech.steps=9", size=size)
    assert isinstance(run.model, ModelConfig) and run.model.audio is not None
    config = run.model.audio.encoder.transformers_config("audio.encoder")
    assert config["model_type"] == "audio-spectrogram-transformer"
    table = what_trains(run)
    assert "hearing-tasks" in table and "speech" not in table
    assert "speech" in what_trains(recipe("vita15.7b", size=size))


def test_settings_in_json_are_settings_too(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(recipe("sft").model_dump(mode="json")))
    assert recipe(str(path)) == recipe("sft") == build(RunConfig, recipe("sft").model_dump())
    assert to_yaml(recipe(str(path))) == to_yaml(recipe("sft"))


# ---------------------------------------------------------------- two steps on a processor


def run(config: RunConfig) -> Path:
    return Run(config, console=Console(file=io.StringIO())).train()


def test_tiny_takes_two_steps(rows: Callable[..., Path], tmp_path: Path) -> None:
    data = rows()
    config = override(
        recipe("tiny"),
        [f"data.train={data}", f"out={tmp_path / 'run'}", "max_steps=2", "samples.max_tokens=4", "side_by_side=1"],
    )
    config = override(config, [f"stages.{stage.name}.batch_samples=8" for stage in config.stages])
    model = run(config)
    metrics = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["stage"] for row in metrics] == [stage.name for stage in config.stages for _ in range(2)]
    assert all(0 < row["loss"] < 20 for row in metrics)
    assert (model / "model.safetensors").is_file() and not read_lines(tmp_path / "run" / "quarantine.jsonl")


@pytest.mark.parametrize("peft", ["none", "lora"])
def test_sft_takes_two_steps(small_model: Composed, tmp_path: Path, peft: str) -> None:
    save_model(small_model.model, small_model.processor, tmp_path / "model")
    data = tmp_path / "rows.jsonl"
    config = override(
        recipe("sft", peft=peft),
        [f"model={tmp_path / 'model'}", f"data.train={data}", f"out={tmp_path / 'run'}", "max_steps=2"],
    )
    assert (run(config) / "model.safetensors").is_file()
    assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) == 2
    assert (tmp_path / "run" / "adapters" / "finetune").is_dir() == (peft == "lora")
