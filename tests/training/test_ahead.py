"""Media that frozen encoders look at a step ahead: nothing that a run learns or says is different."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from avlm.config.run import RunConfig
from avlm.config.stage import Stage
from avlm.errors import AvlmError
from avlm.models.media import made_of
from avlm.samples import Row
from avlm.training import ahead
from avlm.training.chain import Run
from avlm.training.observe import read_lines
from tests.training.test_resume import assert_equal, facts
from tests.training.watching.planting import plant, train

Small = Callable[..., RunConfig]
CONNECTORS = {"vision_connector": {"lr": 1e-3}, "audio_connector": {"lr": 1e-3}, "language": {"lr": 1e-3}}
STAGES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "encoders frozen": ({"train": CONNECTORS}, ["vision", "audio"]),
    "one of them learns": ({"train": {**CONNECTORS, "audio": {"lr": 1e-3}}}, ["vision"]),
    "media changed anew": (
        {"train": CONNECTORS, "augment": {"shift": 0.1, "pitch": 0.1, "noise": 0.5}},
        ["vision", "audio"],
    ),
    "sounds alone": ({"train": {"audio_connector": {"lr": 1e-3}}, "rows": "audio"}, ["vision", "audio"]),
    "several rows": ({"train": CONNECTORS, "row_tokens": 48}, ["vision", "audio"]),
}


def of_one(config: RunConfig, how: str = "on", kept: str = "off", **changes: Any) -> RunConfig:
    """The run with one stage, and media encoded ahead or not."""
    stage = {"name": "joint", "train": CONNECTORS, "steps": 5, "batch_samples": 4, "row_tokens": 128, **changes}
    speed = config.speed.model_copy(update={"ahead": how})
    features = config.features.model_copy(update={"use": kept})
    return config.model_copy(update={"stages": (Stage.model_validate(stage),), "speed": speed, "features": features})


def ran(config: RunConfig) -> dict[str, Any]:
    Run(config, console=Console(file=io.StringIO())).train()
    return facts(Path(config.out))


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """Who encoded a row ahead, and what."""
    found: list[tuple[str, list[str]]] = []

    def told(model: Any, row: Row, parts: Sequence[Any]) -> Any:
        found.append((threading.current_thread().name, list(parts)))
        return made_of(model, row, parts)

    monkeypatch.setattr(ahead, "made_of", told)
    return found


@pytest.mark.parametrize("name", STAGES)
def test_a_run_learns_the_same_to_the_bit(
    name: str, small_run: Small, tmp_path: Path, threads: list[tuple[str, list[str]]]
) -> None:
    changes, parts = STAGES[name]
    off = ran(of_one(small_run("off"), "off", **changes))
    assert not threads
    on = ran(of_one(small_run("on"), "on", **changes))
    assert_equal(on, off)
    assert len(threads) >= 4 and all(who.startswith("encodes-ahead") and what == parts for who, what in threads)
    operations = [
        [row["tflops_per_s"] * row["seconds"] for row in read_lines(tmp_path / out / "metrics.jsonl")]
        for out in ("on", "off")
    ]
    assert operations[0] == pytest.approx(operations[1], rel=1e-6)


def test_stopped_and_gone_on_with(small_run: Small, tmp_path: Path, threads: list[Any]) -> None:
    def die(metrics: Any) -> None:
        if metrics.stage_step == 3:
            raise KeyboardInterrupt

    whole = ran(of_one(small_run("whole"), "off"))
    cut = of_one(small_run("cut", ["save.every_steps=1"]))
    with pytest.raises(KeyboardInterrupt):
        Run(cut, console=Console(file=io.StringIO()), on_step=die).train()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("encodes-ahead")]
    assert_equal(ran(cut), whole)
    assert threads


def test_what_cannot_be_encoded_ends_the_run_as_it_does_without(
    small_run: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def refuse(model: Any, row: Row, parts: Sequence[Any]) -> Any:
        calls.append(len(calls))
        if len(calls) == 3:
            raise AvlmError("an encoder made another number of embeddings")
        return made_of(model, row, parts)

    monkeypatch.setattr(ahead, "made_of", refuse)
    with pytest.raises(AvlmError, match="another number of embeddings"):
        ran(of_one(small_run()))
    assert [line["stage_step"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]


@pytest.mark.parametrize("how", ["on", "off"])
def test_a_bad_value_in_a_frozen_encoder_is_found_where_it_is(
    how: str, small_run: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the step is computed again to find it, nothing else goes through the encoder."""
    seen: list[bool] = []

    def prepare(trainer: Any) -> None:
        encoder = trainer.model.model.vision_tower
        name, layer = next((n, m) for n, m in encoder.named_modules() if n.endswith("layers.1.mlp.fc1"))
        seen.append(bool(name))
        plant(layer, lambda values: values * float("nan"))

    config = of_one(small_run("run", ["samples.prompts=0"]), how)
    with pytest.raises(AvlmError, match=r"vision_tower\.\S*layers\.1\.mlp\.fc1"):
        train(monkeypatch, config, prepare)
    assert seen == [True]


@pytest.mark.parametrize(
    ("cores", "how", "wanted"), [(2, "auto", True), (1, "auto", False), (1, "on", True), (2, "off", False)]
)
def test_by_itself_only_with_a_core_to_spare(
    cores: int, how: str, wanted: bool, small_run: Small, monkeypatch: pytest.MonkeyPatch, threads: list[Any]
) -> None:
    monkeypatch.setattr(ahead, "num_cores", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    ran(of_one(small_run(), how, steps=2))
    assert bool(threads) == wanted


def test_not_where_features_are_kept(small_run: Small, threads: list[Any]) -> None:
    ran(of_one(small_run(), kept="on", steps=2))
    assert not threads


def test_a_whole_run_by_itself_is_one_without(
    small_run: Small, monkeypatch: pytest.MonkeyPatch, threads: list[Any]
) -> None:
    """Parts that are built, an alignment, adapters and a trained encoder, one stage after the other."""
    monkeypatch.setattr(ahead, "num_cores", lambda: 2)
    off = small_run("off")
    whole = ran(off.model_copy(update={"speed": off.speed.model_copy(update={"ahead": "off"})}))
    assert not threads
    assert_equal(ran(small_run("on")), whole)
    assert threads
