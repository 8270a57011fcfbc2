"""A NaN that was planted is named where it was planted: forward, backward, in a weight, in one sample's sound."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from planting import GradientLost, one_stage, plant, train
from torch import Tensor, nn

from avlm.config.run import RunConfig
from avlm.convert.compose import Composed
from avlm.data.encode import pack
from avlm.data.loader import StepData, StepLoader
from avlm.errors import ConfigError, DataError
from avlm.samples import Row
from avlm.training.loss import row_loss
from avlm.training.observe import read_lines
from avlm.training.trainer import Trainer
from avlm.training.watching.nonfinite import Finding, Locator
from avlm.training.watching.statistics import MovingStatistics

Small = Callable[..., RunConfig]
NAN = float("nan")


def lost(values: Tensor) -> Tensor:
    return torch.full_like(values, NAN)


def look(model: Any, row: Row) -> Finding | None:
    """What a locator finds in one row, forward and backward."""
    locator = Locator({"": model}, lambda parameter: parameter)
    with locator.looking():
        locator.begin_row(row, 0)
        row_loss(model, row).backward()
    return locator.found or locator.gradients()


@pytest.fixture
def whole(make_model: Callable[..., Composed], make_sample: Callable[..., Any]) -> tuple[Any, Row]:
    """A model in training mode, and a row of three samples: with a picture, with a sound, with words alone."""
    model, processor = make_model()
    samples = [make_sample("image", seed=1), make_sample("audio", seed=2), make_sample(seed=3)]
    model.plain_head()  # which looks at the language model by itself, once
    return model.train(), pack([processor.encode(sample) for sample in samples])


def modules(model: nn.Module, row: Row) -> list[str]:
    """Every module that the row goes through and that returns numbers."""
    seen: list[str] = []
    hooks = [
        module.register_forward_hook(lambda m, args, out, name=name: seen.append(name))  # type: ignore[misc]
        for name, module in model.named_modules()
        if name
    ]
    row_loss(model, row)
    for hook in hooks:
        hook.remove()
    return seen


def test_forward_in_every_module_there_is(whole: tuple[Any, Row]) -> None:
    model, row = whole
    names = modules(model, row)
    assert {"model.language_model.model.layers.1.mlp", "model.vision_tower", "model.audio_connector"} <= set(names)
    for name in names:
        hook = plant(model.get_submodule(name), lost)
        found = look(model, row)
        hook.remove()
        model.zero_grad()
        assert found is not None
        assert (found.cause, found.name, found.what) == ("forward", name, "NaN")
    assert look(model, row) is None


def test_backward_in_every_layer_that_has_weights(whole: tuple[Any, Row]) -> None:
    model, row = whole
    row_loss(model, row).backward()
    learn = {name.rpartition(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    kinds = (nn.Linear, nn.Conv1d, nn.LayerNorm)
    names = [n for n in modules(model, row) if n in learn and isinstance(model.get_submodule(n), kinds)]
    assert len(names) > 40
    for name in names:
        hook = plant(model.get_submodule(name), GradientLost.apply)
        found = look(model, row)
        hook.remove()
        model.zero_grad()
        assert found is not None
        assert found.cause in ("backward", "gradient"), name
        assert found.name.removesuffix(".weight").removesuffix(".bias") == name


def test_backward_between_modules_names_the_one_that_computes_it(whole: tuple[Any, Row]) -> None:
    model, row = whole
    name = "model.language_model.model.layers.1.mlp"
    plant(model.get_submodule(name), GradientLost.apply)
    found = look(model, row)
    assert found is not None
    assert (found.cause, found.name, found.beside) == ("backward", name, f"{name}.down_proj")
    assert found.sentence() == f"the first NaN comes from {name}, behind {name}.down_proj, in the backward pass"


class Between(nn.Module):
    """Two layers with a logarithm between them that is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, values: Tensor) -> Tensor:
        return self.second(self.first(values).abs().neg().log())


def empty_row(tokens: int = 3) -> Row:
    ids = torch.zeros(1, tokens, dtype=torch.long)
    return Row(ids, ids, ids, [1, tokens - 1], ["a", "b"], [])


def test_forward_between_modules_names_the_one_that_computes_it() -> None:
    model = Between()
    locator = Locator({"root": model}, lambda p: p)
    with locator.looking():
        locator.begin_row(empty_row(), 4)
        model(torch.ones(1, 3, 2))
    assert locator.found == Finding("forward", "root", "NaN", 4, ("a", "b"), beside="root.second")


def test_a_loss_that_spoils_the_gradient_is_not_laid_at_a_modules_door() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    locator = Locator({"": model}, lambda p: p)
    with locator.looking():
        locator.begin_row(empty_row(), 0)
        (model(torch.randn(1, 3, 2)) * 0).abs().sqrt().sum().backward()
    assert locator.found is not None
    assert locator.found.sentence() == "the first NaN comes from the loss, behind 1, in the backward pass"


def test_a_module_that_hands_its_input_through_is_not_to_blame() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Identity(), nn.Linear(2, 2))
    plant(model[2], GradientLost.apply)
    locator = Locator({"": model}, lambda p: p)
    with locator.looking():
        locator.begin_row(empty_row(), 0)
        model(torch.randn(1, 3, 2)).sum().backward()
    assert locator.found is not None and locator.found.name == "2"


def test_the_gradient_of_a_weight_alone() -> None:
    """The gradient of the input is fine, that of the weight overflows."""
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1e-30)
    locator = Locator({"": model}, lambda p: p)
    with locator.looking():
        locator.begin_row(empty_row(), 0)
        (model(torch.full((1, 3, 1), 1e30)) * 1e30).sum().backward()
    assert locator.found is None
    assert locator.gradients() == Finding("gradient", "weight", "infinity")


def test_the_sample_is_the_one_whose_tokens_are_spoiled(whole: tuple[Any, Row]) -> None:
    model, row = whole
    for number, name in enumerate(row.ids):
        at = sum(row.lengths[: number + 1]) - 2

        def spoil(values: Tensor, at: int = at) -> Tensor:
            values = values.clone()
            values[0, at, 0] = float("inf")
            return values

        hook = plant(model.get_submodule("model.language_model.model.layers.0.input_layernorm"), spoil)
        found = look(model, row)
        hook.remove()
        assert found is not None and found.samples == (name,) and found.what == "infinity"


def test_looking_changes_no_bit_of_the_loss_and_nothing_but_the_order_of_sums_in_gradients(
    small_model: Composed, make_sample: Callable[..., Any]
) -> None:
    model, processor = small_model
    row = pack([processor.encode(make_sample("image", "audio", seed=i)) for i in range(2)])
    model.train()  # with dropout

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        torch.manual_seed(3)
        loss = row_loss(model, row)
        loss.backward()
        losses.append(loss.item())
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    losses: list[float] = []
    model.plain_head()
    alone = gradients()
    locator = Locator({"": model}, lambda p: p)
    with locator.looking():
        locator.begin_row(row, 0)
        seen = gradients()
    assert losses[0] == losses[1]
    torch.testing.assert_close(seen, alone, rtol=1e-3, atol=1e-5)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# ---------------------------------------------------------------- in a run


def at_step(trainer: Trainer, step: int) -> Callable[[], bool]:
    return lambda: trainer.done == step


@pytest.mark.parametrize("name", ["model.language_model.model.layers.1.self_attn", "model.audio_connector"])
def test_a_run_stops_with_the_modules_name(
    small_run: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def prepare(trainer: Trainer) -> None:
        plant(trainer.model.get_submodule(name), lost, at_step(trainer, 1))

    with pytest.raises(
        ConfigError, match=r"^stage only, step 2: the loss is nan and .* training has diverged"
    ) as error:
        train(monkeypatch, one_stage(small_run()), prepare)
    assert f"the first NaN comes from {name}, in the forward pass, of" in str(error.value)
    (line,) = read_lines(tmp_path / "run" / "watch.jsonl")
    assert (line["step"], line["stage"], line["kind"], line["then"]) == (2, "only", "nonfinite", "stop")
    assert (line["cause"], line["name"]) == ("forward", name)
    rows = {row["id"]: row for row in map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())}
    assert line["samples"]
    for sample in line["samples"]:
        assert sample["where"] == f"rows.jsonl line {int(sample['id']) + 1}"
        content = rows[sample["id"]]["messages"][0]["content"]
        assert sample["files"] == [str(tmp_path / part["path"]) for part in content if "path" in part]


def test_a_run_stops_with_the_module_whose_gradient_is_lost(small_run: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "model.language_model.model.layers.0.mlp.up_proj"

    def prepare(trainer: Trainer) -> None:
        plant(trainer.model.get_submodule(name), GradientLost.apply, at_step(trainer, 1))

    with pytest.raises(ConfigError, match=f"first NaN comes from {name}, in the backward pass, of the samples"):
        train(monkeypatch, one_stage(small_run()), prepare)


def test_a_run_stops_with_the_weight(small_run: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(trainer: Trainer) -> None:
        with torch.no_grad():
            trainer.model.get_parameter("model.vision_connector.layers.0.weight")[0, 0] = float("inf")

    with pytest.raises(ConfigError, match=r"the weight model\.vision_connector\.\S+ holds infinity, in a step of"):
        train(monkeypatch, one_stage(small_run()), on_step=spoil)


def spoil_sound(monkeypatch: pytest.MonkeyPatch, wanted: str) -> None:
    """Put a NaN into the sound of one sample, wherever it is read."""
    steps = StepLoader.steps

    def spoiled(loader: StepLoader, first: int, last: int) -> Iterator[StepData]:
        for data in steps(loader, first, last):
            for row in data.rows:
                sounds = [place.sample_id for place in row.places if place.count("audio")]
                if wanted in sounds and row.input_features is not None:
                    row.input_features[sounds.index(wanted), 5, 7] = NAN
            yield data

    monkeypatch.setattr(StepLoader, "steps", spoiled)


@pytest.mark.parametrize("sample", ["1", "6"])
def test_a_run_stops_with_the_file_of_the_sound(
    small_run: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sample: str
) -> None:
    """Sample 1 has a sound, sample 6 a picture and then a sound."""
    spoil_sound(monkeypatch, sample)
    with pytest.raises(DataError) as error:
        train(monkeypatch, one_stage(small_run()))
    assert (error.value.sample_id, error.value.where) == (sample, f"rows.jsonl line {int(sample) + 1}")
    assert error.value.file == str(tmp_path / f"s{sample}.wav")
    told = f'the sound holds NaN before the model has seen it: {error.value.file}, of sample "{sample}"'
    assert told in str(error.value) and "Replace the file, or remove the sample" in str(error.value)


def test_a_step_that_is_left_out_leaves_everything_as_it_was(
    small_run: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[dict[str, Tensor]] = []

    def remember(trainer: Trainer) -> None:
        state = {name: t.clone() for name, t in trainer.model.state_dict().items()}
        for number, p in enumerate(p for group in trainer.optimizer.param_groups for p in group["params"]):
            assert p.grad is None
            state |= {f"{number} {k}": v.clone() for k, v in trainer.optimizer.state[p].items()}
        states.append(state)

    def prepare(trainer: Trainer) -> None:
        plant(trainer.model.get_submodule("model.language_model.model.layers.0"), lost, at_step(trainer, 1))

    said = train(monkeypatch, one_stage(small_run(), "watch.nonfinite=skip"), prepare, remember)
    one, two, three = states
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(two[name], three[name]) for name in two)
    assert "only: the update of step 2 is left out: the loss is nan" in said
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line.get("skipped") for line in lines] == [None, True, None]
    assert lines[1]["loss"] is None and lines[1]["lr"] > 0
    assert [line["then"] for line in read_lines(tmp_path / "run" / "watch.jsonl")] == ["skip"]


def test_too_many_left_out_in_a_row_stop_the_run(
    small_run: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(trainer: Trainer) -> None:
        plant(trainer.model.get_submodule("model.language_model.model.norm"), lost, lambda: trainer.done != 1)

    config = one_stage(small_run(), "watch.nonfinite=skip", "watch.max_skipped=2", steps=9)
    with pytest.raises(ConfigError, match=r"step 5: .* and the 2 updates before it were left out"):
        train(monkeypatch, config, prepare)
    assert [line.get("skipped") for line in read_lines(tmp_path / "run" / "metrics.jsonl")] == [True, None, True, True]


def test_statistics_of_batch_norms_come_back() -> None:
    frozen, learning = nn.BatchNorm1d(2).eval(), nn.BatchNorm1d(2)
    kept = MovingStatistics([nn.Sequential(frozen, learning)])
    before = {name: t.clone() for name, t in learning.state_dict().items()}
    kept.remember()
    learning(torch.randn(4, 2))
    assert not torch.equal(learning.state_dict()["running_mean"], before["running_mean"])
    kept.restore()
    assert all(torch.equal(learning.state_dict()[name], before[name]) for name in before)
