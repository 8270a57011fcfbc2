"""The state head: asked where an answer begins, weighted as VITA-1.5 weighs, kept with the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from avlm.config.run import RunConfig
from avlm.config.stage import Stage, StateHead
from avlm.config.stage_fits import stage_problem
from avlm.convert.compose import Composed
from avlm.convert.weights import load_model, save_model
from avlm.data.encode import pack
from avlm.errors import ConfigError
from avlm.samples import Encoded, Sample, Text, Turn
from avlm.training.chain import Run
from avlm.training.loss import stage_losses
from avlm.training.observe import StepMetrics, read_lines
from avlm.training.states import state_weight, train_state_head

HEAD = StateHead(lr=1e-2)


def stage_of(**settings: Any) -> Stage:
    return Stage.model_validate({"name": "s", "steps": 1, "state_head": {"lr": 1e-2}, **settings})


def talk(*turns: tuple[str, str]) -> Sample:
    """Questions and answers; an answer with a `!` is to noise."""
    found = []
    for asked, answer in turns:
        state: Any = "noise" if answer.endswith("!") else ""
        found += [Turn("user", (Text(asked),)), Turn("assistant", (Text(answer),), state=state)]
    return Sample("7", tuple(found))


@pytest.fixture
def made(make_model: Callable[..., Composed]) -> Composed:
    made: Composed = make_model()
    train_state_head(made.model, stage_of(), seed=3)
    return made


@pytest.fixture
def samples(made: Composed, make_sample: Callable[..., Sample]) -> list[Encoded]:
    texts = [
        talk(("What is it?", "red")),
        talk(("Who?", "blue!"), ("And number 3?", "green"), ("Now?", "red!")),
        talk(("", "<2>red")),
    ]
    return [made.processor.encode(s) for s in [*texts, make_sample("audio"), make_sample("image", "audio")]]


def test_the_head_is_asked_at_the_last_position_before_each_answer(made: Composed, samples: list[Encoded]) -> None:
    decode = made.processor.tokenizer.decode
    for sample in samples:
        begins = [i - 1 for i in range(1, len(sample)) if sample.labels[i] != -100 and sample.labels[i - 1] == -100]
        assert [at for at, _ in sample.states] == begins
        assert all(decode(sample.ids[at : at + 1]) == "<|assistant|>" for at in begins)
    assert [[state for _, state in sample.states] for sample in samples] == [[0], [1, 0, 1], [1], [0], [0]]


def test_the_states_of_packed_rows_cost_what_torch_finds_sample_by_sample(
    made: Composed, samples: list[Encoded]
) -> None:
    """The slow way: one sample at a time, all hidden states, one weighted mean over all states."""
    model, processor = made
    assert model.state_head is not None
    logits, classes = [], []
    for sample in samples:
        batch = processor.collate([sample], side="right")
        batch.pop("labels")
        hidden = model.model(**batch).last_hidden_state[0]
        logits += [model.state_head(hidden[at]) for at, _ in sample.states]
        classes += [state for _, state in sample.states]
    mean = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 1.0]))(torch.stack(logits), torch.tensor(classes))

    for cut in ([samples], [samples[:2], samples[2:]], [[sample] for sample in samples]):
        rows = [pack(members) for members in cut]
        weight = state_weight(rows, HEAD)
        assert weight == 1 + (5 + 1 + 5) + 5 + 1 + 1
        costs = [stage_losses(model, row, stage_of()) for row in rows]
        states = torch.stack([cost.states for cost in costs if cost.states is not None]).sum() / weight
        torch.testing.assert_close(states, mean, rtol=1e-5, atol=0)
        alone = [stage_losses(model, row, Stage(name="s", steps=1)).tokens for row in rows]
        torch.testing.assert_close([cost.tokens for cost in costs], alone, rtol=1e-6, atol=0)


def test_a_head_is_the_same_for_the_same_seed_and_kept_where_there_is_one(make_model: Callable[..., Composed]) -> None:
    models = [make_model().model for _ in range(2)]
    for model in models:
        train_state_head(model, stage_of(), seed=3)
    a, b = (model.state_head for model in models)
    assert torch.equal(a.weight, b.weight) and a.weight.requires_grad and a.weight.shape == (3, 32)
    train_state_head(models[0], stage_of(), seed=4)
    assert models[0].state_head is a


def test_a_head_is_saved_and_loaded_with_the_model(made: Composed, samples: list[Encoded], tmp_path: Path) -> None:
    save_model(*made, tmp_path / "model")
    again = load_model(tmp_path / "model").model
    assert json.loads((tmp_path / "model" / "config.json").read_text())["state_classes"] == 3
    row = pack(samples)
    with torch.no_grad():
        ours, theirs = (stage_losses(model, row, stage_of()) for model in (again, made.model))
    assert torch.equal(ours.states, theirs.states)  # type: ignore[arg-type]


def test_a_model_without_a_head_refuses_to_be_asked(make_model: Callable[..., Composed]) -> None:
    model = make_model().model
    with pytest.raises(ConfigError) as error:
        model(input_ids=torch.tensor([[40, 41]]), state_positions=torch.tensor([0]))
    assert str(error.value) == (
        "state_positions were given to a model without a state head. Leave them out, or train a head with "
        "stages.NAME.state_head"
    )


def test_a_run_trains_a_head_alone_reports_its_loss_and_keeps_it(
    small_run: Callable[..., RunConfig], rows: Callable[..., Path], tmp_path: Path
) -> None:
    path = rows()
    written = [json.loads(line) for line in path.read_text().splitlines()]
    for row in written[1::4]:
        row["messages"][1]["state"] = "noise"  # whatever is only heard
    path.write_text("".join(json.dumps(row) + "\n" for row in written))
    run = small_run("run", ["samples.prompts=0"])
    alone = Stage(name="states", steps=30, batch_samples=12, state_head=StateHead(lr=0.05))
    later = run.stages[2]
    Run(run.model_copy(update={"stages": (run.stages[0], alone, later)})).train()
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    losses = [line["state_loss"] for line in lines if line["stage"] == "states"]
    assert len(losses) == 30 and losses[-1] < 0.5 * losses[0]
    assert all("state_loss" not in line for line in lines if line["stage"] != "states")
    assert len({line["loss"] for line in lines if line["stage"] == "states"}) < 10  # the language model stood still
    heads = [load_model(tmp_path / "run" / "stages" / name).model.state_head for name in ("states", later.name)]
    assert heads[0] is not None and heads[1] is not None and torch.equal(heads[0].weight, heads[1].weight)


def test_a_head_in_a_model_that_is_thrown_away_is_refused() -> None:
    parts = ("vision", "vision_connector", "language")
    assert stage_problem(stage_of(), parts) is None
    builds = stage_of(builds="language", train={"language": {"lr": 1}}, rows="text")
    assert stage_problem(builds, parts) == (
        "stage s has a state_head and builds the language part in a model that is thrown away, the head with it. "
        "Remove stages.s.state_head, or train it in a later stage"
    )


@pytest.mark.slow
def test_a_run_that_is_killed_ends_with_the_head_and_connector_of_one_that_was_not(
    small_run: Callable[..., RunConfig], rows: Callable[..., Path], tmp_path: Path
) -> None:
    """Distillation and states in one stage, stopped in its middle."""
    rows(alts=True)
    train = {"audio_connector": {"lr": 1e-3}}
    stage = stage_of(steps=6, batch_samples=4, row_tokens=128, train=train, loss="distill", state_tokens={})

    def run(name: str, stop_at: int | None = None) -> dict[str, torch.Tensor]:
        def stop(metrics: StepMetrics) -> None:
            if metrics.stage == "s" and metrics.stage_step == stop_at:
                raise KeyboardInterrupt

        config = small_run(name, ["samples.prompts=0"])
        config = config.model_copy(update={"stages": (config.stages[0], stage)})
        if stop_at is not None:
            with pytest.raises(KeyboardInterrupt):
                Run(config, on_step=stop).train()
        Run(config).train()
        assert len(read_lines(tmp_path / name / "metrics.jsonl")) == 3 + 6
        return load_model(tmp_path / name / "model").model.state_dict()

    whole, resumed = run("whole"), run("killed", stop_at=3)
    assert "state_head.weight" in whole and whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
