"""Several processes learn what one learns, whatever each of them has to read."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from avlm.config.io import build
from avlm.config.run import RunConfig
from avlm.convert.compose import compose
from avlm.training.chain import Run
from avlm.training.loss import stage_losses
from avlm.training.observe import read_lines
from avlm.training.sharded import Sharded
from avlm.training.stages import prepare
from avlm.training.world import World
from tests.training.worlds import changed, in_world, lines, train_in, weights

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

    def make(
        train: dict[str, Any],
        name: str = "one",
        overrides: list[str] | None = None,
        save: dict[str, Any] | None = None,
        precision: str | None = None,
        **stage: Any,
    ) -> RunConfig:
        config = small_run(name, overrides).model_dump(mode="json")
        config["model"]["language"]["random"]["attention_dropout"] = 0.0
        config["model"]["audio"]["encoder"]["random"]["dropout"] = 0.0
        config["stages"] = [{**STAGE, "train": train, **stage}]
        config |= {"save": save or {"every_s": 3600.0}, "precision": precision}
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


MODES = ("data", "fsdp")
EITHER = ("data", pytest.param("fsdp", marks=pytest.mark.slow))
"""Where both end in the same way."""
TRAIN = {
    "whole": everything(),
    "connectors": {"vision_connector": {"lr": LR}, "audio_connector": {"lr": LR}},
    "lora": {"language": {"lr": LR, "lora": LORA}, "audio": {"lr": LR}},
}


@pytest.mark.parametrize(
    ("mode", "train"),
    [
        ("data", "whole"),
        ("fsdp", "lora"),
        *(pytest.param("data", train, marks=pytest.mark.slow) for train in ("connectors", "lora")),
        *(pytest.param("fsdp", train, marks=pytest.mark.slow) for train in ("whole", "connectors")),
    ],
)
def test_two_processes_learn_what_one_learns(
    plain: Callable[..., RunConfig], tmp_path: Path, train: str, mode: str
) -> None:
    config = plain(TRAIN[train])
    done(train_in(1, config))
    done(train_in(2, changed(config, tmp_path / "two", parallel={"mode": mode})))
    assert_same(tmp_path / "one", tmp_path / "two")


def masked(config: RunConfig, count: int, seed: int) -> RunConfig:
    """The run on rows that each hold a random set of media: none, one, several of a kind, of any length."""
    data = Path(str(config.data.train))
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        media = [{"type": "image", "path": f"p{n}.png"} for n in rng.choice(12, rng.integers(0, 3))]
        media += [{"type": "audio", "path": f"s{n}.wav"} for n in rng.choice(12, rng.integers(0, 3))]
        content = [*(media if rng.random() < 0.6 else []), {"type": "text", "text": "what? " * rng.integers(1, 6)}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "red " * rng.integers(1, 4)}]
        rows.append(json.dumps({"id": str(i), "messages": messages}))
    out = data.with_name("masked.jsonl")
    out.write_text("".join(row + "\n" for row in rows))
    return changed(config, Path(config.out), data={**config.data.model_dump(mode="json"), "train": str(out)})


def check_masks(
    plain: Callable[..., RunConfig], tmp_path: Path, size: int, mode: str, steps: int, encoders: str = "own"
) -> None:
    """Steps of five samples in rows that hold two or three, so some processes have fewer rows than others, or none.

    The rate is small, so that a step's loss and gradients, rather than those of all before it, are what is compared.
    """
    train = {part: {"lr": 1e-3} for part in PARTS}
    small = [f"model.{part}.random.num_hidden_layers=1" for part in ("language", "vision.encoder")]
    small += ["model.audio.encoder.random.encoder_layers=1"]
    config = plain(train, overrides=small, steps=steps, batch_samples=5, row_tokens=160, schedule={"kind": "constant"})
    config = masked(config, 200, seed=size)
    done(train_in(1, config))
    done(
        train_in(
            size, changed(config, tmp_path / "several", parallel={"mode": mode, "encoders": encoders}), limit_s=1500
        )
    )
    one, several = lines(tmp_path / "one"), lines(tmp_path / "several")
    assert len(one) == len(several) == steps
    np.testing.assert_allclose(several, one, rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_any_process_may_hold_any_mixture(plain: Callable[..., RunConfig], tmp_path: Path, mode: str) -> None:
    check_masks(plain, tmp_path, 2, mode, 12)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [2, 4])
def test_any_process_may_hold_any_mixture_for_long(
    plain: Callable[..., RunConfig], tmp_path: Path, size: int, mode: str
) -> None:
    check_masks(plain, tmp_path, size, mode, 2000)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        pytest.param((2, "fsdp"), (1, "data"), id="2 fsdp to 1"),
        pytest.param((1, "data"), (2, "fsdp"), id="1 to 2 fsdp", marks=pytest.mark.slow),
        pytest.param((2, "data"), (2, "fsdp"), id="2 data to 2 fsdp", marks=pytest.mark.slow),
        pytest.param((4, "fsdp"), (1, "data"), id="4 fsdp to 1", marks=pytest.mark.slow),
        pytest.param((4, "fsdp"), (2, "fsdp"), id="4 fsdp to 2 fsdp", marks=pytest.mark.slow),
        pytest.param((4, "data"), (2, "data"), id="4 data to 2 data", marks=pytest.mark.slow),
        pytest.param((2, "data"), (4, "fsdp"), id="2 data to 4 fsdp", marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_moves_between_worlds(
    plain: Callable[..., RunConfig], tmp_path: Path, first: tuple[int, str], then: tuple[int, str]
) -> None:
    train = {**everything(), "language": {"lr": LR, "lora": LORA}}
    config = plain(train, "whole")
    done(train_in(1, config))
    moved = changed(config, tmp_path / "moved", save={"every_s": 0.001})
    begun = train_in(first[0], changed(moved, tmp_path / "moved", parallel={"mode": first[1]}), on_step=stops_at(2))
    assert {kind for kind, _ in begun} == {"Enough"}
    found = train_in(then[0], changed(moved, tmp_path / "moved", parallel={"mode": then[1]}))
    done(found)
    assert "resumed at step 2/4" in found[0][1]
    assert_same(tmp_path / "whole", tmp_path / "moved")


class Enough(Exception):  # noqa: N818
    """The test has seen what it wanted."""


def stops_at(step: int) -> Callable[[Any], None]:
    def stop(metrics: Any) -> None:
        if metrics.step == step:
            raise Enough

    return stop


def rank_of_this() -> int:
    return int(os.environ.get("RANK", 0))


def dies_as(rank: int) -> Callable[[Any], None]:
    def die(metrics: Any) -> None:
        if metrics.step == 2 and rank_of_this() == rank:
            os.kill(os.getpid(), signal.SIGKILL)

    return die


def fails(metrics: Any) -> None:
    if metrics.step == 2 and rank_of_this() == 1:
        raise ValueError("no more ideas")


def hangs(metrics: Any) -> None:
    if metrics.step == 2 and rank_of_this() == 1:
        time.sleep(15)


@pytest.mark.parametrize("mode", EITHER)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_dies_ends_the_others_with_a_message(
    plain: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, rank: int
) -> None:
    monkeypatch.setattr("avlm.training.world.LAST_WORDS_S", 0.5)  # who is killed leaves none
    config = changed(plain(everything()), tmp_path / "two", parallel={"mode": mode})
    found = train_in(2, config, on_step=dies_as(rank))
    assert found[rank] == ("ended", "")
    kind, message = found[1 - rank]
    assert kind == "WorldError"
    assert message.startswith(f"process {1 - rank} of 2 waited for another one that has ended or hangs (")
    assert "the same command goes on from the last checkpoint" in message


@pytest.mark.parametrize("mode", EITHER)
def test_a_process_that_fails_tells_the_others_why(plain: Callable[..., RunConfig], tmp_path: Path, mode: str) -> None:
    config = changed(plain(everything()), tmp_path / "two", parallel={"mode": mode})
    told = "process 1 of 2 failed, and process 0 cannot go on without it: ValueError: no more ideas"
    assert train_in(2, config, on_step=fails) == [("WorldError", told), ("ValueError", "no more ideas")]


@pytest.mark.parametrize("mode", EITHER)
def test_a_process_that_hangs_is_not_waited_for_longer_than_allowed(
    plain: Callable[..., RunConfig], tmp_path: Path, mode: str
) -> None:
    config = changed(plain(everything()), tmp_path / "two", parallel={"mode": mode, "timeout_s": 6})
    began = time.monotonic()
    kind, message = train_in(2, config, on_step=hangs)[0]
    assert kind == "WorldError"
    assert "raise parallel.timeout_s" in message
    assert time.monotonic() - began > 6


def asked_to_stop(metrics: Any) -> None:
    if metrics.step == 2 and rank_of_this() == 1:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("mode", EITHER)
def test_one_process_that_is_asked_to_stop_stops_all_at_the_same_step(
    plain: Callable[..., RunConfig], tmp_path: Path, mode: str
) -> None:
    config = plain(everything(), "whole")
    done(train_in(1, config))
    two = changed(config, tmp_path / "two", parallel={"mode": mode})
    assert train_in(2, two, on_step=asked_to_stop) == [("Stopped", "stopped by SIGTERM")] * 2
    found = train_in(2, two)
    done(found)
    assert "resumed at step 3/4" in found[0][1]
    assert_same(tmp_path / "whole", tmp_path / "two")


def with_bad_rows(config: RunConfig, count: int) -> None:
    """Rows whose picture is none, among the good ones."""
    data = Path(str(config.data.train))
    rows = data.read_text().splitlines()
    for i in range(count):
        content = [{"type": "image", "path": data.name}, {"type": "text", "text": "What is it?"}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]
        rows.insert(2 * i, json.dumps({"id": f"bad{i}", "messages": messages}))
    data.write_text("".join(row + "\n" for row in rows))


def test_bad_samples_of_all_processes_are_listed_and_counted_together(
    plain: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = plain(everything())
    with_bad_rows(config, 5)
    done(train_in(1, config))
    done(train_in(2, changed(config, tmp_path / "two")))
    listed = [
        {(row["sample_id"], row["step"]) for row in read_lines(tmp_path / name / "quarantine.jsonl")}
        for name in ("one", "two")
    ]
    assert listed[0] == listed[1]
    assert {name for name, _ in listed[0]} == {f"bad{i}" for i in range(5)}
    assert_same(tmp_path / "one", tmp_path / "two")


def test_the_budget_of_bad_samples_is_that_of_all_processes(plain: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = plain(everything(), overrides=["data.max_bad=0.1"])
    with_bad_rows(config, 12)  # of 24 rows: more than ten, which is always allowed, and about six in each process
    ((kind, message),) = train_in(1, config)
    assert kind == "DataError"
    found = train_in(2, changed(config, tmp_path / "two"))
    assert [kind for kind, _ in found] == ["DataError"] * 2
    assert message.split(";")[0].partition(": ")[2] == found[0][1].split(";")[0].partition(": ")[2]


@pytest.mark.parametrize(
    "stage",
    [
        pytest.param(
            {"train": {"audio_connector": {"lr": LR}}, "loss": "distill", "rows": "audio"},
            id="distill",
            marks=pytest.mark.slow,
        ),
        pytest.param({"train": everything(), "state_head": {"lr": LR}}, id="states"),
        pytest.param(
            {"train": everything(), "batch_rows": 3, "row_tiles": 4}, id="planned rows", marks=pytest.mark.slow
        ),
    ],
)
def test_what_stages_learn_is_the_same_with_shares_of_the_weights(
    plain: Callable[..., RunConfig], rows: Callable[..., Path], tmp_path: Path, stage: dict[str, Any]
) -> None:
    rows(alts=True)
    config = plain(**stage)
    done(train_in(1, config))
    done(train_in(2, changed(config, tmp_path / "two", parallel={"mode": "fsdp"})))
    assert_same(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_weights_may_compute_and_gradients_be_added_up_in_half_precision(
    plain: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = plain(everything())
    done(train_in(1, config))
    for half in ("params", "reduce"):
        two = changed(config, tmp_path / half, parallel={"mode": "fsdp", half: "bfloat16"})
        done(train_in(2, two))
        # bfloat16 has 8 bits, so it is seen, and it is all that differs: weights are kept in float32
        np.testing.assert_allclose(lines(tmp_path / half), lines(tmp_path / "one"), rtol=2**-5)
        assert not np.allclose(lines(tmp_path / half), lines(tmp_path / "one"), rtol=1e-5)
        for name, value in load_file(tmp_path / half / "model" / "model.safetensors").items():
            assert value.dtype == torch.float32, name


@pytest.mark.slow
def test_half_precision_learns_in_float32_in_every_mode(plain: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = plain(everything(), precision="bfloat16")
    done(train_in(1, config))
    for mode in MODES:
        done(train_in(2, changed(config, tmp_path / mode, parallel={"mode": mode})))
        # bfloat16 has 8 bits, and rows go through in other company here than there
        np.testing.assert_allclose(lines(tmp_path / mode), lines(tmp_path / "one"), rtol=2**-6)
    begun = plain(everything(), "moved", precision="bfloat16", save={"every_s": 0.001})
    train_in(2, changed(begun, tmp_path / "moved", parallel={"mode": "fsdp"}), on_step=stops_at(2))
    done(train_in(1, begun))
    np.testing.assert_allclose(lines(tmp_path / "moved"), lines(tmp_path / "one"), rtol=2**-6)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_whole_run_goes_through_all_its_stages(small_run: Small, tmp_path: Path, mode: str) -> None:
    config = changed(small_run(), tmp_path / "two", parallel={"mode": mode}, device="cpu", side_by_side=2)
    done(train_in(2, config))
    left = {path.name for path in (tmp_path / "two").iterdir()}
    assert {"parts", "stages", "adapters", "model", "metrics.jsonl", "samples.jsonl"} <= left
    assert len(read_lines(tmp_path / "two" / "metrics.jsonl")) == sum(config.stage_steps(s) for s in config.stages)
    assert {row["when"] for row in read_lines(tmp_path / "two" / "samples.jsonl")} == {"before", "during", "after"}


def test_processes_that_were_started_differently_say_so(plain: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = plain(everything())

    def work(world: World) -> None:
        Run(changed(config, tmp_path / f"out{world.rank}"), world=world).train()

    for kind, message in in_world(2, work):
        assert kind == "ConfigError"
        assert message.startswith("the processes of this run see different settings: process 0 ")


@given(st.lists(st.recursive(st.integers() | st.text(), st.lists, max_leaves=3), min_size=2, max_size=2))
@settings(max_examples=5, deadline=None)
def test_processes_tell_each_other_what_json_can_say(said: list[Any]) -> None:
    found = in_world(2, lambda world: world.gather(said[world.rank]))
    assert found == [("done", said)] * 2


def test_each_process_holds_its_share_of_the_weights(plain: Callable[..., RunConfig]) -> None:
    config = plain(everything())

    def work(world: World) -> tuple[int, int]:
        model, _ = compose(config.model, seed=0, texts=["a b c"])
        stage = config.stages[0]
        prepare(model, stage)
        total = sum(p.numel() for p in model.parameters())
        Sharded(world, model, stage, lambda row: stage_losses(model, row, stage), list, config.parallel)
        return total, sum(p.to_local().numel() for p in model.parameters())

    found = in_world(2, work)
    done(found)
    total, shares = found[0][1][0], [share for _, (_, share) in found]
    assert sum(shares) == total
    assert max(shares) < 0.55 * total
