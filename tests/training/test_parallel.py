"""Several processes learn what one learns, whatever each of them has to read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from avlm.config.io import build
from avlm.config.run import RunConfig
from tests.training.worlds import changed, lines, train_in, weights

Small = Callable[..., RunConfig]
PARTS = ("vision", "vision_connector", "audio", "audio_connector", "language")
LORA = {"rank": 4, "targets": ["q_proj", "v_proj", "down_proj"]}
STAGE: dict[str, Any] = {"name": "only", "steps": 4, "batch_samples": 6, "row_tokens": 64, "optimizer": {"eps": 1.0}}
"""With so large an eps a step moves a weight by about its gradient times the rate. At Adam's usual one a gradient that
is nothing but rounding (that of a key's bias, which softmax does not feel) would move it as far as any other."""
LR = 0.1


@pytest.fixture
def plain(small_run: Small) -> Callable[..., RunConfig]:
    """One stage without dropout, so that what a step learns does not depend on who reads what."""

    def make(train: dict[str, Any], name: str = "one", overrides: list[str] | None = None, **stage: Any) -> RunConfig:
        config = small_run(name, overrides).model_dump(mode="json")
        config["model"]["language"]["random"]["attention_dropout"] = 0.0
        config["model"]["audio"]["encoder"]["random"]["dropout"] = 0.0
        config["stages"] = [{**STAGE, "train": train, **stage}]
        config["save"] = {"every_s": 3600.0}
        config["device"] = "cpu"
        return build(RunConfig, config)

    return make


def everything(lr: float = LR) -> dict[str, Any]:
    return {part: {"lr": lr} for part in PARTS}


def assert_same(one: Path, several: Path) -> None:
    """The same losses, norms and weights, up to the order of additions."""
    np.testing.assert_allclose(lines(several), lines(one), rtol=1e-5)
    ours, theirs = weights(several), weights(one)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=LR * 1e-5, msg=lambda m, name=name: f"{name}: {m}")


def done(found: list[tuple[str, Any]]) -> None:
    assert [kind for kind, _ in found] == ["done"] * len(found), found


@pytest.mark.parametrize(
    "train",
    [
        pytest.param(everything(), id="whole"),
        pytest.param({"vision_connector": {"lr": LR}, "audio_connector": {"lr": LR}}, id="connectors"),
        pytest.param({"language": {"lr": LR, "lora": LORA}, "audio": {"lr": LR}}, id="lora"),
    ],
)
def test_two_processes_learn_what_one_learns(
    plain: Callable[..., RunConfig], tmp_path: Path, train: dict[str, Any]
) -> None:
    config = plain(train)
    done(train_in(1, config))
    done(train_in(2, changed(config, tmp_path / "two")))
    assert_same(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize(
    "train",
    [
        pytest.param(everything(), id="whole"),
        pytest.param({"vision_connector": {"lr": LR}, "audio_connector": {"lr": LR}}, id="connectors"),
        pytest.param({"language": {"lr": LR, "lora": LORA}, "audio": {"lr": LR}}, id="lora"),
    ],
)
def test_two_processes_with_a_share_of_the_weights_each_learn_what_one_learns(
    plain: Callable[..., RunConfig], tmp_path: Path, train: dict[str, Any]
) -> None:
    config = plain(train)
    done(train_in(1, config))
    done(train_in(2, changed(config, tmp_path / "two", parallel={"mode": "fsdp"})))
    assert_same(tmp_path / "one", tmp_path / "two")
