"""The language model teaches the model that hears: every answer token is compared, at its own place, once."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from avlm.config.data import DataConfig
from avlm.config.run import RunConfig
from avlm.config.stage import Stage, StateTokens
from avlm.config.stage_fits import stage_problem
from avlm.convert.compose import Composed
from avlm.convert.weights import load_model
from avlm.data.loader import StepLoader
from avlm.data.sources import JsonLines
from avlm.errors import ConfigError, DataError
from avlm.samples import Encoded
from avlm.training.chain import Run
from avlm.training.loss import distill_loss, stage_losses
from avlm.training.observe import read_lines
from avlm.training.stages import prepare, set_modes

CONNECTORS = {p: {"lr": 1e-3} for p in ("vision_connector", "audio_connector")}
T = 2.0


def stage_of(**settings: Any) -> Stage:
    how = {"name": "s", "train": CONNECTORS, "steps": 2, "batch_samples": 9, "row_tokens": 1000, "loss": "distill"}
    return Stage.model_validate({**how, **settings})


@pytest.fixture
def made(make_model: Callable[..., Composed]) -> Composed:
    made: Composed = make_model()
    return made


@pytest.fixture
def loader(made: Composed, rows: Callable[..., Path]) -> Callable[..., StepLoader]:
    def load(**settings: Any) -> StepLoader:
        return StepLoader(JsonLines(rows(alts=True)), stage_of(**settings), made.processor, DataConfig(), seed=0)

    return load


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) by its definition, summed over positions."""
    p, q = (teacher.double() / T).softmax(-1), (student.double() / T).softmax(-1)
    return (p * (p.log() - q.log())).sum()


def slow(made: Composed, samples: list[Encoded]) -> Tensor:
    """Sample by sample: transformers' own language model reads the words, our model the media, all logits of both."""
    model, processor = made
    llama = model.language_model
    total = torch.zeros((), dtype=torch.double)
    for sample in samples:
        assert sample.teacher is not None
        batch = processor.collate([sample], side="right")
        labels = batch.pop("labels")[0]
        student = model(**batch).logits[0]
        llama.set_attn_implementation("eager")
        with torch.no_grad():
            teacher = llama(input_ids=torch.tensor([sample.teacher.ids])).logits[0]
        llama.set_attn_implementation("avlm")
        ours = [i - 1 for i, label in enumerate(labels.tolist()) if label != -100]
        theirs = [i - 1 for i, label in enumerate(sample.teacher.labels) if label != -100]
        assert [sample.ids[i + 1] for i in ours] == [sample.teacher.ids[i + 1] for i in theirs]
        total = total + divergence(student[ours], teacher[theirs])
    return total


def encoded(loader: StepLoader) -> list[Encoded]:
    return [loader.prepare((row, 0)) for row in loader.rows]


def test_a_packed_row_costs_what_a_slow_loop_over_its_samples_finds(
    made: Composed, loader: Callable[..., StepLoader]
) -> None:
    steps = loader()
    (row,) = steps.step(0).rows
    assert len(row.ids) == 9
    samples = {sample.id: sample for sample in encoded(steps)}
    expected = slow(made, [samples[i] for i in row.ids])
    assert expected > 1  # the model does not hear yet what its words say
    torch.testing.assert_close(distill_loss(made.model, row, T).double(), expected, rtol=1e-5, atol=0)
    assert stage_losses(made.model, row, steps.stage).tokens == distill_loss(made.model, row, T)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_step_in_many_rows_has_the_gradients_of_the_slow_loop_and_the_teacher_has_none(
    made: Composed, loader: Callable[..., StepLoader]
) -> None:
    model = made.model
    prepare(model, stage_of())
    whole = loader(row_tokens=1000)
    step = loader(row_tokens=40).step(0)
    assert len(step.rows) > 3
    samples = {sample.id: sample for sample in encoded(whole)}
    order = [samples[i] for row in step.rows for i in row.ids]
    targets = sum(sample.num_targets() for sample in order)
    assert step.num_targets() == targets

    theirs = gradients(model, slow(made, order) / targets)
    ours = gradients(model, torch.stack([distill_loss(model, row, T) for row in step.rows]).sum() / targets)
    assert ours.keys() == theirs.keys()
    assert all("connector" in name for name in ours)
    for name, gradient in theirs.items():
        worst = (ours[name] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-3)
        assert worst < 1e-4, f"{name}: {worst:.1e}"


def test_the_first_and_the_end_token_of_every_answer_are_compared(
    made: Composed, loader: Callable[..., StepLoader]
) -> None:
    tokenizer = made.processor.tokenizer
    for sample in encoded(loader()):
        assert sample.teacher is not None
        for side in (sample, sample.teacher):
            learned = [label for label in side.labels if label != -100]
            assert tokenizer.decode(learned) in ("red<|end|>", "blue<|end|>", "green<|end|>")


def test_what_is_read_in_words_costs_nothing(made: Composed, loader: Callable[..., StepLoader]) -> None:
    for row in loader(describe=1.0).step(0).rows:
        assert row.pixel_values is None and row.input_features is None
        assert distill_loss(made.model, row, T).abs() < 1e-5


def test_the_model_teaches_in_eval_mode_while_connectors_train(
    small_model: Composed, rows: Callable[..., Path]
) -> None:
    """The small model's language model has dropout, and twice the same teacher gives twice the same loss."""
    model, processor = small_model
    stage = stage_of(train={"audio_connector": {"lr": 1e-3}})
    set_modes(model, prepare(model, stage))
    (row,) = StepLoader(JsonLines(rows(alts=True)), stage, processor, DataConfig(), seed=0).step(0).rows
    with torch.no_grad():
        assert distill_loss(model, row, T) == distill_loss(model, row, T)


# ---------------------------------------------------------------- rows


def test_rows_without_media_are_not_read(loader: Callable[..., StepLoader]) -> None:
    steps = loader()
    assert all(steps.source.facts[row].kinds for row in steps.rows)
    assert len(steps.rows) == 9  # of twelve, every fourth is text


def test_a_stage_that_finds_only_text_is_refused(made: Composed, tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "text.jsonl").write_text(json.dumps(row))
    with pytest.raises(ConfigError) as error:
        StepLoader(JsonLines(tmp_path / "text.jsonl"), stage_of(), made.processor, DataConfig(), seed=0)
    assert str(error.value) == (
        "stage s learns from rows with a picture, a sound or a video, and the data has none. "
        "Add such rows, or give the stage its own with stages.s.data"
    )


def test_a_medium_without_words_makes_a_bad_sample(made: Composed, rows: Callable[..., Path]) -> None:
    source = JsonLines(rows(alts=False))
    step = StepLoader(source, stage_of(rows="audio"), made.processor, DataConfig(), seed=0).step(0)
    assert step.rows == [] and step.num_samples == 0 and len(step.bad) == 9
    bad = step.bad[0]
    sound = source.path.parent / f"s{bad.sample_id}.wav"
    assert bad.reason == (
        f"{sound} has no alt, so the teacher of stage s (loss=distill) has nothing to read in its place. "
        "Give the medium an alt: what it shows or says"
    )


def test_answers_that_become_other_tokens_make_a_bad_sample(loader: Callable[..., StepLoader]) -> None:
    steps = loader()
    sample = steps.source[steps.rows[0]]
    student = encoded(steps)[0]
    student = replace(student, labels=[label if label < 0 else label + 1 for label in student.labels])
    with pytest.raises(DataError, match="cannot be compared place by place"):
        steps.prepare.writer._teacher(sample, student)


def test_a_teacher_that_is_longer_than_its_sample_is_counted(made: Composed, rows: Callable[..., Path]) -> None:
    path = rows(alts=True)
    written = [json.loads(line) for line in path.read_text().splitlines()]
    for row in written:
        for part in row["messages"][0]["content"]:
            if "alt" in part:
                part["alt"] = "a very long word for it " * 5
    path.write_text("".join(json.dumps(row) + "\n" for row in written))
    steps = StepLoader(JsonLines(path), stage_of(row_tokens=400), made.processor, DataConfig(), seed=0)
    step = steps.step(0)
    assert len(step.rows) > 1
    for row in step.rows:
        assert row.teacher is not None and sum(row.lengths) < sum(row.teacher.lengths) <= 400
    steps = StepLoader(JsonLines(path), stage_of(row_tokens=60), made.processor, DataConfig(), seed=0)
    with pytest.raises(ConfigError, match=r"has \d+ tokens, and a row of stage s holds 60"):
        steps.step(0)


def test_state_tokens_and_system_prompts_are_the_same_on_both_sides(loader: Callable[..., StepLoader]) -> None:
    from avlm.config.data import SystemPrompts

    steps = loader(state_tokens=StateTokens())
    steps.processor.use_system(SystemPrompts(text="Words.", image="A picture."))
    decode = steps.processor.tokenizer.decode
    for sample in encoded(steps):
        assert sample.teacher is not None
        begins = "<|system|>A picture." if sample.images else "<|system|>Words."
        assert decode(sample.ids).startswith(begins) and decode(sample.teacher.ids).startswith(begins)
        assert decode([label for label in sample.labels if label != -100])[:3] in ("<1>", "<3>")
        assert sample.labels[1:] != sample.teacher.labels[1:] and not sample.teacher.places


# ---------------------------------------------------------------- settings and runs


def problem(**settings: Any) -> str | None:
    return stage_problem(stage_of(**settings), ("audio", "audio_connector", "vision", "vision_connector", "language"))


def test_what_cannot_be_distilled_is_refused() -> None:
    assert problem() is None
    for lora in (None, {"rank": 2}):
        assert problem(train={"language": {"lr": 1, "lora": lora}, **CONNECTORS}) == (
            "stage s has loss=distill and trains language, which is the teacher and has to stay as it is. "
            "Remove stages.s.train.language, or set stages.s.loss=next_token"
        )
    assert problem(supervise="everything") == (
        "stage s has loss=distill and supervise=everything, and only answers are the same in words and with media. "
        "Set stages.s.supervise=answers"
    )
    assert problem(label_smoothing=0.1) == (
        "stage s has loss=distill and label_smoothing=0.1, and there are no labels: the teacher gives a whole "
        "distribution. Set stages.s.label_smoothing=0"
    )
    assert problem(train={}, rows="text", state_head={"lr": 1}) == (
        "stage s has loss=distill and rows=text, which leaves out the media that it is to understand. "
        "Set stages.s.rows to vision, audio or any"
    )


def test_a_run_distils_and_leaves_the_language_model_as_it_was(
    small_run: Callable[..., RunConfig], rows: Callable[..., Path], tmp_path: Path
) -> None:
    rows(alts=True)
    run = small_run("run", ["samples.prompts=0"])
    stage = run.stages[2].model_copy(
        update={"name": "hear", "train": stage_of().train, "rows": "any", "loss": "distill"}
    )
    stage = stage.model_copy(update={"steps": 12})
    Run(run.model_copy(update={"stages": (*run.stages[:2], run.stages[2], stage)})).train()
    lines = [row for row in read_lines(tmp_path / "run" / "metrics.jsonl") if row["stage"] == "hear"]
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    before = load_model(tmp_path / "run" / "stages" / "align").model.language_model.state_dict()
    after = load_model(tmp_path / "run" / "model").model.language_model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_teacher_takes_nothing_of_what_encoders_take(loader: Callable[..., StepLoader]) -> None:
    for row in loader().step(0).rows:
        assert row.teacher is not None and row.teacher.ids == row.ids
        assert row.teacher.pixel_values is None and row.teacher.input_features is None and not row.teacher.places
