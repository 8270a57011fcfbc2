"""Losses that jump are told apart from losses that fall, wander and are flat."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planting import one_stage, plant, train

from avlm.config.run import RunConfig
from avlm.training.observe import StepMetrics, read_lines
from avlm.training.stopping import Stopped
from avlm.training.trainer import Trainer
from avlm.training.watching.spikes import Spikes

Small = Callable[..., RunConfig]
LOSSES = st.lists(st.floats(0.01, 100), min_size=9, max_size=30)


@given(LOSSES)
def test_a_spike_is_what_numpy_says_it_is(losses: list[float]) -> None:
    """By the definition in Rousseeuw and Croux: deviations of 1.4826 times the median one, from the median."""
    spikes = Spikes(5.0, 8)
    found = [spikes.look(loss) for loss in losses]
    for i, spike in enumerate(found):
        window = np.array(losses[max(0, i - 8) : i])
        if len(window) < 4:
            assert spike is None
            continue
        median = float(np.median(window))
        deviation = max(1.4826 * float(np.median(np.abs(window - median))), 0.01 * median)
        above = (losses[i] - median) / deviation
        assert (spike is not None) == (above > 5)
        if spike is not None:
            assert spike == pytest.approx((losses[i], median, above))


def test_a_loss_that_falls_and_wanders_never_spikes_and_a_jump_does() -> None:
    rng = np.random.default_rng(0)
    losses = 2 + 3 * np.exp(-np.arange(3000) / 300) + 0.1 * rng.standard_normal(3000)
    spikes = Spikes(10.0, 64)
    assert [i for i, loss in enumerate(losses) if spikes.look(float(loss))] == []
    assert spikes.look(5.0) is not None
    assert spikes.look(float("nan")) is None


def test_a_jump_that_is_smaller_than_asked_for_is_none() -> None:
    """A model that has learned nearly everything: most losses are nearly nothing, and one sample is not learned yet."""
    small = [0.001, 0.0012, 0.0009, 0.0011, 0.001, 0.0013]
    assert Spikes(10.0, 8, before=small).look(0.05) is not None
    spikes = Spikes(10.0, 8, before=small, rise=0.1)
    assert spikes.look(0.05) is None
    assert spikes.look(0.2) is not None


def test_one_jump_does_not_hide_the_next() -> None:
    spikes = Spikes(10.0, 8, before=[1.0, 1.1, 0.9, 1.05, 0.95, 1.0])
    assert all(spikes.look(3.0) for _ in range(3))


def test_a_run_names_the_samples_of_a_spike_worst_first(
    small_run: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The logits of step 7 are turned round, so that all its samples are worse than any before."""

    def prepare(trainer: Trainer) -> None:
        module = trainer.model.get_submodule("model.language_model.model.norm")
        plant(module, lambda values: -30 * values, lambda: trainer.done == 6)

    config = one_stage(small_run(), "watch.spike_window=8", "watch.spike=20", steps=8)
    said = train(monkeypatch, config, prepare)
    (line,) = read_lines(tmp_path / "run" / "watch.jsonl")
    assert (line["kind"], line["step"]) == ("spike", 7)
    metrics = read_lines(tmp_path / "run" / "metrics.jsonl")
    before = [row["loss"] for row in metrics[:6]]
    assert line["loss"] == metrics[6]["loss"] > max(before)
    assert line["median"] == pytest.approx(np.median(before))
    worst = [sample["loss"] for sample in line["samples"]]
    assert worst == sorted(worst, reverse=True) and len(worst) == 4
    named = line["samples"][0]
    assert named["where"] == f"rows.jsonl line {int(named['id']) + 1}"
    assert f'its worst samples are "{named["id"]}" ({named["where"]}' in said
    # Every sample has three target tokens or so; all together they cost what the step did, but for dropout.
    assert np.mean(worst) == pytest.approx(line["loss"], rel=0.3)


@pytest.mark.parametrize(
    ("task", "cut", "spikes"),
    [("vqa", None, []), ("vqa", 6, []), ("vqa", 3, []), (None, None, [6, 7, 8]), ("no task", None, [6, 7, 8])],
    ids=["other-rows", "resumed-behind-them", "resumed-among-them", "same-rows", "no-such-rows"],
)
def test_the_losses_of_other_rows_are_not_compared(
    task: str | None,
    cut: int | None,
    spikes: list[int],
    small_run: Small,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From step 6 on every loss is far above those before; it is no spike where `first` ends with step 5."""

    def prepare(trainer: Trainer) -> None:
        module = trainer.model.get_submodule("model.language_model.model.norm")
        plant(module, lambda values: -30 * values, lambda: trainer.done >= 5)

        def ask(metrics: StepMetrics) -> None:
            if cut is not None and metrics.step == cut - 1:  # it stops behind the next one
                trainer.stop.number = int(signal.SIGTERM)

        trainer.on_step = ask

    first = None if task is None else {"of": [task], "steps": 5}
    config = one_stage(small_run(), "watch.spike_window=8", "watch.spike=20", steps=8, first=first)
    if cut is not None:
        with pytest.raises(Stopped):
            train(monkeypatch, config, prepare)
        cut = None
    train(monkeypatch, config, prepare)
    lines = tmp_path / "run" / "watch.jsonl"
    assert [line["step"] for line in (read_lines(lines) if lines.exists() else [])] == spikes
