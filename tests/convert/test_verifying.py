"""Weights that are damaged are found before anything is done with them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from avlm.cli import app
from avlm.convert.verifying import SUMS, check_sums, suspects
from avlm.convert.weights import load_model, publish_copy, save_model
from avlm.errors import WeightsError


@pytest.fixture
def saved(make_model: Callable[..., Any], tmp_path: Path) -> Path:
    save_model(*make_model("vision"), tmp_path / "model")
    return tmp_path / "model"


def change(folder: Path, value: float, name: str = "up_proj") -> str:
    """Set one number of one tensor; returns the tensor's name."""
    tensors = load_file(folder / "model.safetensors")
    chosen = next(n for n in tensors if name in n)
    tensors[chosen][0, 0] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return chosen


def test_checksums_are_those_of_sha256sum(saved: Path, tmp_path: Path) -> None:
    done = subprocess.run(["sha256sum", "--check", SUMS], cwd=saved, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout == "model.safetensors: OK\n"
    assert check_sums(saved) == 1
    publish_copy(saved, tmp_path / "copy", extra={})
    assert check_sums(tmp_path / "copy") == 1
    (saved / SUMS).unlink()
    assert check_sums(saved) == 0


def test_one_flipped_bit_is_found(saved: Path) -> None:
    path = saved / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(WeightsError) as error:
        check_sums(saved)
    assert str(error.value) == (
        f"{saved}: model.safetensors is not what was written there (its checksum in SHA256SUMS is another), so its "
        "weights may be damaged. Copy the directory again; if you changed the weights on purpose, remove SHA256SUMS"
    )
    done = CliRunner().invoke(app, ["check", str(saved)])
    assert done.exit_code == 1 and "FAILED  files are as written" in done.output


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_weight_that_is_no_number_is_refused_by_name(saved: Path, value: float) -> None:
    name = change(saved, value)
    with pytest.raises(WeightsError, match="1 tensors hold a NaN or an infinity") as error:
        load_model(saved)
    assert f"{name.removeprefix('model.')} among them" in str(error.value) or name in str(error.value)
    model = load_model(saved, lost="keep").model
    assert [n for n, p in model.named_parameters() if not torch.isfinite(p).all()] == suspects(model).lost


def test_a_matrix_of_zeros_is_told_and_a_bias_of_zeros_is_not(saved: Path) -> None:
    model = load_model(saved).model
    assert suspects(model).zero == []
    with torch.no_grad():
        model.get_parameter("model.language_model.model.layers.1.mlp.up_proj.weight").zero_()
        model.get_parameter("model.vision_connector.layers.0.bias").zero_()
    assert suspects(model).zero == ["model.language_model.model.layers.1.mlp.up_proj.weight"]
