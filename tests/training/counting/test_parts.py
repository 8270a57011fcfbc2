"""Each part's gradient, update and memory, against plain arithmetic."""

from __future__ import annotations

import io
import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from avlm.config.io import override
from avlm.config.run import RunConfig
from avlm.training.chain import Run
from avlm.training.counting.parts import gradient_norms, measured_update, memory_mb
from avlm.training.masters import MasterAdamW
from avlm.training.observe import read_lines

Small = Callable[..., RunConfig]


def two_parts(dtype: torch.dtype = torch.float32) -> tuple[nn.ModuleDict, MasterAdamW]:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(30, 20), "b": nn.Linear(5, 5)}).to(dtype)
    groups = [
        {"params": [model["a"].weight], "lr": 0.1, "part": "language"},
        {"params": [model["a"].bias], "lr": 0.1, "part": "language"},
        {"params": list(model["b"].parameters()), "lr": 0.3},
    ]
    return model, MasterAdamW(groups)


def test_norms_before_clipping_and_updates_over_weights() -> None:
    model, optimizer = two_parts()
    loss = model["a"](torch.ones(1, 30)).square().sum() + 100 * model["b"](torch.ones(1, 5)).square().sum()
    loss.backward()
    whole = {
        part: norm([p.grad for p in model[name].parameters()]) for part, name in (("language", "a"), ("head", "b"))
    }
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    total = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5))
    with measured_update(optimizer, model, total) as facts:
        optimizer.step()
    assert facts.grad_norms == pytest.approx(whole, rel=1e-5)
    for part, name in (("language", "a"), ("head", "b")):
        moved = norm([p.detach() - before[f"{name}.{n}"] for n, p in model[name].named_parameters()])
        size = norm([before[f"{name}.{n}"] for n, _ in model[name].named_parameters()])
        assert facts.update_ratios[part] == pytest.approx(moved / size, rel=1e-5)


def norm(tensors: list[Any]) -> float:
    return float(sum(float((t.double() ** 2).sum()) for t in tensors) ** 0.5)


def test_a_part_without_gradient_has_none() -> None:
    model, optimizer = two_parts()
    model["b"](torch.ones(1, 5)).sum().backward()
    assert gradient_norms(optimizer, 7.0)["language"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_bytes_times_numbers(dtype: torch.dtype) -> None:
    """30 x 20 + 20 + 5 x 5 + 5 = 650 weights: two moments each, and in half precision a copy of four bytes."""
    model, optimizer = two_parts(dtype)
    (model["a"](torch.ones(1, 30, dtype=dtype)).sum() + model["b"](torch.ones(1, 5, dtype=dtype)).sum()).backward()
    optimizer.step()
    held = memory_mb(optimizer, model)
    size = 4 if dtype == torch.float32 else 2
    steps = sum(state["step"].numel() * state["step"].element_size() for state in optimizer.state.values())
    assert held["parameters"] == pytest.approx(650 * size / 1e6, abs=1e-3)
    assert held["gradients"] == pytest.approx(650 * 4 / 1e6, abs=1e-3)
    assert held["optimizer"] == pytest.approx((650 * (8 if size == 4 else 12) + steps) / 1e6, abs=1e-3)
    assert held["peak"] == pytest.approx(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6, rel=0.05)


def run(config: RunConfig) -> list[dict[str, Any]]:
    Run(config, console=Console(file=io.StringIO())).train()
    return read_lines(Path(config.out) / "metrics.jsonl")


def test_a_run_counts_what_it_does_and_changes_no_weight_by_it(small_run: Small, tmp_path: Path) -> None:
    stages = small_run().stages[3:]  # the joint one, with adapters and dropout
    config = small_run("counted", ["count.every=2", "count.peak_tflops=0.001"]).model_copy(update={"stages": stages})
    quiet = ["count.flops=false", "count.every=null", "watch.spike=null", "watch.stall_s=null"]
    plain = override(small_run("plain"), quiet).model_copy(update={"stages": stages})
    lines = run(config)
    for line in lines:
        assert line["samples_per_s"] == pytest.approx(line["samples"] / line["seconds"])
        assert line["target_tokens_per_s"] == pytest.approx(line["target_tokens"] / line["seconds"])
        assert line["mfu"] == pytest.approx(line["tflops_per_s"] / 0.001) and line["tflops_per_s"] > 0
        assert line["padding"] == 0
    parts = {"vision_connector", "audio", "audio_connector", "language"}
    for line in lines[::2]:
        assert set(line["grad_norms"]) == set(line["update_ratios"]) == parts
        assert sum(value**2 for value in line["grad_norms"].values()) == pytest.approx(line["grad_norm"] ** 2)
        assert set(line["memory_mb"]) == {"parameters", "gradients", "optimizer", "peak"}
    assert not any("grad_norms" in line or "memory_mb" in line for line in lines[1::2])
    without = run(plain)
    assert [line["loss"] for line in without] == [line["loss"] for line in lines]
    assert not any({"mfu", "memory_mb", "grad_norms"} & line.keys() for line in without)
    weights = [(tmp_path / out / "model" / "model.safetensors").read_bytes() for out in ("counted", "plain")]
    assert weights[0] == weights[1]


def test_padded_rows_tell_their_padding(small_run: Small) -> None:
    """Rows of a language model whose samples cannot be packed are as wide as their longest sample."""
    mamba = {"model_type": "mamba2", "hidden_size": 32, "num_heads": 4, "head_dim": 16, "n_groups": 1}
    mamba |= {"state_size": 8, "num_hidden_layers": 1, "expand": 2, "chunk_size": 16}
    config = small_run("run", ["stages.language.steps=2", "samples.prompts=0"])
    language = config.model.language.model_copy(update={"random": mamba})  # type: ignore[union-attr]
    model = config.model.model_copy(update={"language": language})  # type: ignore[union-attr]
    lines = run(config.model_copy(update={"model": model, "stages": config.stages[:1]}))
    assert all(0 < line["padding"] < 1 for line in lines)


def test_the_peak_is_measured_once_for_a_run(tmp_path: Path) -> None:
    from avlm.training.counting.peak import matrix_peak

    cache, device = tmp_path / "peak.json", torch.device("cpu")
    peak = matrix_peak(device, torch.float32, cache)
    assert 1e8 < peak < 1e14
    (key,) = json.loads(cache.read_bytes())
    assert key == f"cpu, float32, {torch.get_num_threads()} threads"
    cache.write_text(json.dumps({key: 5.0}))
    assert matrix_peak(device, torch.float32, cache) == 5.0
    cache.write_text("{damaged")
    assert matrix_peak(device, torch.float32, cache) > 1e8
    assert matrix_peak(device, torch.float32, tmp_path / "no" / "folder") > 1e8
