"""Steps told to TensorBoard, Weights & Biases and MLflow, and recorded by torch's profiler."""

from __future__ import annotations

import builtins
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from avlm.config.io import override
from avlm.config.run import RunConfig
from avlm.errors import ConfigError, MissingExtraError
from avlm.training.chain import Run
from avlm.training.counting.trackers import curves
from avlm.training.observe import read_lines

Small = Callable[..., RunConfig]


def train(config: RunConfig) -> list[dict[str, Any]]:
    Run(config, console=Console(file=io.StringIO())).train()
    return read_lines(Path(config.out) / "metrics.jsonl")


@pytest.fixture
def short(small_run: Small) -> Callable[..., RunConfig]:
    """One stage of three steps, with overrides."""

    def make(*overrides: str) -> RunConfig:
        run = small_run("run", ["samples.prompts=0", *overrides])
        return run.model_copy(update={"stages": run.stages[:1]})

    return make


def test_a_line_as_curves() -> None:
    line = {"step": 3, "stage": "s", "loss": 1.5, "mfu": float("nan"), "skipped": True, "grad_norms": {"language": 2}}
    assert curves(line) == {"loss": 1.5, "grad_norms/language": 2.0}


def test_tensorboard_reads_what_metrics_tell(short: Callable[..., RunConfig], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (pip install 'avlm[log]')")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines = train(short("log=[tensorboard]"))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert {"loss", "lr", "mfu", "tokens_per_s", "grad_norms/language", "memory_mb/peak"} <= set(
        events.Tags()["scalars"]
    )
    told = [(event.step, event.value) for event in events.Scalars("loss")]
    assert told == [(line["step"], pytest.approx(line["loss"])) for line in lines]


def test_wandb_and_mlflow_are_told_the_same(
    short: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, list[Any]] = {"wandb": [], "mlflow": []}
    asked: dict[str, Any] = {}
    wandb, mlflow = ModuleType("wandb"), ModuleType("mlflow")

    def init(**settings: Any) -> Any:
        asked.update(settings)
        log = lambda values, step: told["wandb"].append((step, values["loss"]))  # noqa: E731
        return SimpleNamespace(log=log, finish=lambda: told["wandb"].append("end"))

    wandb.init = init  # type: ignore[attr-defined]
    mlflow.set_experiment = mlflow.log_params = lambda *_: None  # type: ignore[attr-defined]
    mlflow.start_run = lambda **_: None  # type: ignore[attr-defined]
    mlflow.log_metrics = lambda values, step: told["mlflow"].append((step, values["loss"]))  # type: ignore[attr-defined]
    mlflow.end_run = lambda: told["mlflow"].append("end")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    lines = train(short("log=[wandb,mlflow]"))
    expected = [(line["step"], line["loss"]) for line in lines]
    assert told == {"wandb": [*expected, "end"], "mlflow": [*expected, "end"]}
    assert asked["config"]["recipe"] == "small" and asked["resume"] == "allow" and asked["dir"] == str(tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "extra"),
    [("tensorboard", "log"), ("wandb", "wandb"), ("mlflow", "mlflow")],
)
def test_one_that_is_not_installed_is_named_with_what_brings_it(
    short: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, name: str, extra: str
) -> None:
    real = builtins.__import__

    def missing(module: str, *args: Any, **kwargs: Any) -> Any:
        if name in module.split("."):
            raise ImportError(module)
        return real(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MissingExtraError) as error:
        train(short(f"log=[{name}]"))
    assert str(error.value) == (
        f"log=[{name}] needs the library {name}, which is not installed. Install it with: pip install 'avlm[{extra}]'"
    )


def test_the_profiler_records_the_steps_that_are_asked_for(short: Callable[..., RunConfig], tmp_path: Path) -> None:
    lines = train(short("profile.first=2", "profile.last=3"))
    assert len(lines) == 3
    (path,) = (tmp_path / "run" / "profile").iterdir()
    assert path.name == "steps-2-3.json"
    events = json.loads(path.read_bytes())["traceEvents"]
    updates = [event for event in events if str(event.get("name", "")).startswith("Optimizer.step")]
    # An optimizer that is made of another is noted twice, one inside the other, once both kinds have been made.
    inside = [u for u in updates for v in updates if u is not v and v["ts"] <= u["ts"] < v["ts"] + v["dur"]]
    assert len(updates) - len(inside) == 2 and any("aten::" in str(event.get("name")) for event in events)


def test_steps_to_record_come_in_order(short: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match=r"first=3 and last=2, so no step would be recorded\. Set last to 3 or more"):
        override(short(), ["profile.first=3", "profile.last=2"])
