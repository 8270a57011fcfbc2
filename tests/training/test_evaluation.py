"""Held-out rows are measured in the middle of training, and training is none the wiser."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from rich.console import Console

from avlm.config.evaluate import Evaluate
from avlm.config.run import RunConfig
from avlm.config.stage import Stage
from avlm.convert.weights import load_model
from avlm.data.sources import JsonLines
from avlm.errors import ConfigError
from avlm.eval.benchmarks import evaluate
from avlm.eval.examining import look_and_listen
from avlm.training.chain import Run
from avlm.training.evaluation import standing, value_of
from avlm.training.heldout import spread
from avlm.training.observe import MEASURED, StepMetrics, read_lines
from avlm.training.report import write_report
from avlm.training.unmoved import unmoved

Small = Callable[..., RunConfig]
ONLY = {
    "name": "only",
    "train": {"vision_connector": {"lr": 1e-3}, "audio": {"lr": 1e-3}, "language": {"lr": 1e-3}},
    "steps": 6,
    "batch_samples": 4,
    "row_tokens": 128,
}


@pytest.fixture
def measured(small_run: Small, rows: Callable[..., Path], tmp_path: Path) -> Callable[..., RunConfig]:
    """A run of one stage with dropout, measured on rows of its own kind: ``measured("out", every=2)``."""

    def make(name: str = "run", stage: dict[str, Any] | None = None, **settings: Any) -> RunConfig:
        held_out = tmp_path / "eval.jsonl"
        if not held_out.exists():
            rows("eval.jsonl", 9)
        config = small_run(name)
        return config.model_copy(
            update={
                "stages": (Stage.model_validate({**ONLY, **(stage or {})}),),
                "data": config.data.model_copy(update={"eval": str(held_out)}),
                "evaluate": Evaluate.model_validate({"every": 2, "max_tokens": 3, **settings}),
            }
        )

    return make


def train(config: RunConfig, **more: Any) -> str:
    console = Console(record=True, file=io.StringIO(), width=1000)
    Run(config, console=console, **more).train()
    return console.export_text()


def lines(config: RunConfig, name: str = "evals.jsonl") -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in read_lines(Path(config.out) / name)]


class Scripted:
    """Answers that are right as often as a list says, one entry each time it is asked."""

    def __init__(self, *scores: float) -> None:
        self.scores = list(scores)
        self.asked = 0

    def __call__(self, *args: Any, **settings: Any) -> dict[str, Any]:
        self.asked += 1
        torch.rand(3)  # what is drawn here must not move what training draws
        return {"accuracy": self.scores[self.asked - 1], "guess": 0.5, "tasks": {}}


# ---------------------------------------------------------------- nothing is changed by it


def test_a_run_that_is_measured_learns_the_same_bits(measured: Callable[..., RunConfig]) -> None:
    with_it = measured("with", every=1)
    without = measured("without").model_copy(update={"evaluate": None})
    train(with_it, examine=look_and_listen)
    train(without)
    a, b = (Path(config.out) / "model" / "model.safetensors" for config in (with_it, without))
    assert a.read_bytes() == b.read_bytes()
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert lines(with_it, name) == lines(without, name)
    assert not (Path(without.out) / "evals.jsonl").exists()
    assert [row["when"] for row in lines(with_it)] == ["before", *["during"] * 5, "after"]


def test_modes_and_generators_are_put_back_also_after_an_error(small_model: Any) -> None:
    model = small_model.model
    model.train()
    model.model.vision_tower.eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with contextlib.suppress(ZeroDivisionError), unmoved(model):
        assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
        torch.rand(9)
        raise ZeroDivisionError
    assert [module.training for module in model.modules()] == modes and torch.is_grad_enabled()
    assert torch.equal(torch.rand(4), expected)


# ---------------------------------------------------------------- what is measured


def test_losses_are_those_of_transformers_over_the_same_rows(
    measured: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """Row by row through the model's own loss, added up over targets by hand."""
    config = measured(rows=5)
    train(config)
    model, processor = load_model(tmp_path / "run" / "model")
    source = JsonLines(tmp_path / "eval.jsonl")

    def slow(numbers: Sequence[int]) -> float:
        total, targets = 0.0, 0
        for number in numbers:
            batch = processor.collate([processor.encode(source[number])], side="right")
            count = int((batch["labels"][0, 1:] != -100).sum())
            with torch.no_grad():
                total += float(model(**batch).loss) * count
            targets += count
        return total / targets

    after = lines(config)[-1]
    assert after["when"] == "after" and after["rows"] == 5
    assert after["loss"] == pytest.approx(slow([0, 1, 3, 5, 7]), rel=1e-5)  # 5 of 9, evenly spread
    assert after["text_loss"] == pytest.approx(slow([3, 7]), rel=1e-5)  # all that have no media
    before = lines(config)[0]
    assert before["forgotten"] == 0
    assert after["forgotten"] == pytest.approx(after["text_loss"] - before["text_loss"], abs=1e-12) != 0


def test_label_smoothing_and_words_for_media_are_left_out_of_the_figure(
    measured: Callable[..., RunConfig], rows: Callable[..., Path]
) -> None:
    rows("eval.jsonl", 8, alts=True)
    plain = measured("plain", max_tokens=1)
    changed = measured("changed", {"label_smoothing": 0.3, "describe": 1.0, "augment": {"noise": 1.0, "shift": 0.4}})
    for config in (plain, changed):
        train(config)
    assert lines(plain)[0]["loss"] == lines(changed)[0]["loss"]


def test_text_rows_of_another_file_are_read_without_their_media(
    measured: Callable[..., RunConfig], rows: Callable[..., Path]
) -> None:
    texts = rows("texts.jsonl", 6)
    config = measured(text=str(texts), answers=0)
    train(config)
    assert {"text_loss", "loss"} <= lines(config)[0].keys() and "accuracy" not in lines(config)[0]


def test_answers_tell_what_is_lost_with_media_of_other_rows(measured: Callable[..., RunConfig], tmp_path: Path) -> None:
    """The same figures by hand, from the report of `avlm eval`."""
    config = measured()
    train(config, examine=look_and_listen)
    model, processor = load_model(tmp_path / "run" / "model")
    samples = list(JsonLines(tmp_path / "eval.jsonl"))
    report = evaluate(model, processor, samples, max_tokens=3, seed=config.seed)
    line = lines(config)[-1]
    counts = {name: task.samples for name, task in report.tasks.items()}
    assert counts == {"vqa": 3, "hear": 2, "match": 2, "text": 2}
    right = sum(task.accuracy * task.samples for task in report.tasks.values())
    assert line["accuracy"] == pytest.approx(right / 9)
    for name, sense, tasks in (("looks", "image", ("vqa", "match")), ("listens", "audio", ("hear", "match"))):
        lost = {task: report.tasks[task].accuracy - report.tasks[task].swapped[sense] for task in tasks}
        assert line[name] == pytest.approx(sum(lost[t] * counts[t] for t in tasks) / sum(counts[t] for t in tasks))
        assert all(line["tasks"][task][name] == pytest.approx(lost[task]) for task in tasks)
    assert "looks" not in line["tasks"]["hear"]


def test_one_line_tells_it_and_the_page_draws_it(measured: Callable[..., RunConfig]) -> None:
    config = measured(patience=2, metric="accuracy")
    told = train(config, examine=Scripted(0.5, 0.25, 0.25, 0.25, 0.25))
    held_out = [line for line in told.splitlines() if "held out" in line]
    assert len(held_out) == 4  # before, steps 2 and 4, after
    assert held_out[0].startswith("only: held out at step 0/6: loss ")
    assert (
        "25.0% right, 50.0% by guessing; best at step 0; no better for so long that the stage ends here" in held_out[2]
    )
    page = write_report(Path(config.out)).read_text()
    assert "Held-out rows" in page and "Measurements on held-out rows" in page
    assert "only ended early, at step 4, because it became no better." in page
    assert "Not finished" not in page


# ---------------------------------------------------------------- the end of a stage

NOTHING_BETTER = (0.2, 0.5, 0.5, 0.4)
"""Before, and at steps 1 to 3: the best is at step 1."""


def test_a_stage_ends_when_patience_does(measured: Callable[..., RunConfig]) -> None:
    config = measured(every=1, patience=2, metric="accuracy")
    train(config, examine=Scripted(*NOTHING_BETTER, 0.9))
    assert [row["step"] for row in lines(config, "metrics.jsonl")] == [1, 2, 3]
    assert [row.get("best") for row in lines(config)] == [True, True, False, False, None]
    assert [row.get("stops") for row in lines(config)] == [False, False, False, True, None]


def test_a_stage_leaves_its_best_weights_where_that_is_wanted(measured: Callable[..., RunConfig]) -> None:
    """The loss goes down, so with the goal turned round the best weights are those that were measured first."""
    last, best = measured("last", every=2, goal="max"), measured("best", every=2, goal="max", leave="best")
    assert "leaves the weights" not in train(last)
    assert "leaves the weights of step 2, the best" in train(best)
    during = {line["stage_step"]: line["loss"] for line in lines(best) if line["when"] == "during"}
    assert set(during) == {2, 4, 6} and during[2] > during[6]
    (after,) = (line["loss"] for line in lines(best) if line["when"] == "after")
    assert after == during[2]
    (left,) = (line["loss"] for line in lines(last) if line["when"] == "after")
    assert left == during[6]


@pytest.mark.slow
def test_a_stage_whose_last_weights_are_best_leaves_those(measured: Callable[..., RunConfig]) -> None:
    last, best = measured("last"), measured("best", leave="best")
    train(last)
    assert "leaves the weights" not in train(best)
    for ours, theirs in zip(
        *(load_model(Path(run.out) / "model").model.parameters() for run in (last, best)), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.slow
def test_less_of_a_loss_is_better(measured: Callable[..., RunConfig]) -> None:
    config = measured(every=1, patience=1, metric="accuracy", goal="min")
    train(config, examine=Scripted(0.5, 0.4, 0.3, 0.3, 0.1))
    assert [row["step"] for row in lines(config, "metrics.jsonl")] == [1, 2, 3]


class KilledError(Exception):
    pass


@pytest.mark.parametrize("at", [2, *(pytest.param(at, marks=pytest.mark.slow) for at in (1, 3))])
def test_a_run_that_is_killed_ends_early_at_the_same_step(measured: Callable[..., RunConfig], at: int) -> None:
    """A checkpoint is written at every step, so the process is killed before, at and after the one that decides."""
    whole = measured("whole", every=1, patience=2, metric="accuracy")
    train(whole, examine=Scripted(*NOTHING_BETTER, 0.9))
    killed = measured("killed", every=1, patience=2, metric="accuracy")

    def kill(metrics: StepMetrics) -> None:
        if metrics.stage_step == at:
            raise KilledError

    with pytest.raises(KilledError):
        train(killed, examine=Scripted(*NOTHING_BETTER), on_step=kill)
    train(killed, examine=Scripted(*NOTHING_BETTER[at + 1 :], 0.9))
    for name in ("metrics.jsonl", "evals.jsonl", "samples.jsonl"):
        assert lines(killed, name) == lines(whole, name), name
    a, b = (Path(config.out) / "model" / "model.safetensors" for config in (whole, killed))
    assert a.read_bytes() == b.read_bytes()


def slow_standing(values: Sequence[float | None], goal: str) -> tuple[int | None, int]:
    known = [(i, v) for i, v in enumerate(values) if v is not None]
    if not known:
        return None, 0
    target = max(v for _, v in known) if goal == "max" else min(v for _, v in known)
    first = next(i for i, v in known if v == target)
    return first, sum(i > first for i, _ in known)


@given(st.lists(st.one_of(st.none(), st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]))), st.sampled_from(["max", "min"]))
def test_the_best_is_the_first_of_the_best_and_patience_counts_from_it(values: list[float | None], goal: Any) -> None:
    settings = Evaluate(metric="accuracy", goal=goal)
    measurements = [{"at": i} if v is None else {"at": i, "accuracy": v} for i, v in enumerate(values)]
    best, since = standing(measurements, settings)
    assert (None if best is None else best["at"], since) == slow_standing(values, goal)


def test_metrics_of_tasks_go_by_dotted_names_whatever_the_task_is_called() -> None:
    line = {"loss": 1.5, "tasks": {"a.b": {"accuracy": 0.25}, "odd": "no"}, "accuracy": float("nan"), "best": True}
    assert value_of(line, "tasks.a.b.accuracy") == 0.25
    assert value_of(line, "loss") == 1.5
    assert [value_of(line, name) for name in ("tasks.odd.accuracy", "tasks.c.accuracy", "accuracy", "looks")] == [
        None
    ] * 4


@given(st.integers(0, 200), st.integers(1, 60))
def test_rows_are_spread_evenly_over_all_of_them(rows: int, count: int) -> None:
    found = spread(range(rows), count)
    assert len(found) == min(rows, count) == len(set(found))
    gaps = [b - a for a, b in itertools.pairwise(found)]
    assert not gaps or max(gaps) - min(gaps) <= 1


# ---------------------------------------------------------------- what cannot work


def test_without_held_out_rows_nothing_can_be_measured(measured: Callable[..., RunConfig]) -> None:
    config = measured()
    config = config.model_copy(update={"data": config.data.model_copy(update={"eval": None})})
    with pytest.raises(ConfigError) as error:
        Run(config)
    assert str(error.value) == (
        "evaluate is set and data.eval is not, so there are no held-out rows to measure on. "
        "Add data.eval=FILE.jsonl, or set evaluate=null"
    )


def test_a_score_of_answers_needs_somebody_who_asks(measured: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match="a score of answers, and this run was started without anybody to ask"):
        Run(measured(metric="accuracy"), console=Console(quiet=True))


def test_a_metric_that_no_row_gives_is_refused_before_the_first_step(measured: Callable[..., RunConfig]) -> None:
    config = measured(metric="tasks.vqq.accuracy")
    with pytest.raises(ConfigError) as error:
        train(config, examine=Scripted(0.5))
    assert str(error.value) == (
        "evaluate.metric=tasks.vqq.accuracy: stage only was measured on the held-out rows and has no "
        "tasks.vqq.accuracy, so nothing would tell which of its steps is best. It has loss, text_loss, forgotten, "
        "accuracy. Set evaluate.metric to what there is, or add rows to data.eval that give it"
    )
    assert not lines(config, "metrics.jsonl")


def test_a_stage_without_rows_of_its_own_is_not_measured_and_goes_on(
    measured: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = measured(stage={"rows": "vision", "train": {"vision_connector": {"lr": 1e-3}}})
    kept = [line for line in (tmp_path / "eval.jsonl").read_text().splitlines() if json.loads(line)["task"] == "hear"]
    (tmp_path / "eval.jsonl").write_text("\n".join(kept))
    assert "only: no held-out row is for this stage, so nothing is measured" in train(config)
    assert len(lines(config, "metrics.jsonl")) == 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metric": "acuracy"}, "'acuracy' is nothing that is measured. Choose loss"),
        (
            {"metric": "looks", "answers": 0},
            "metric=looks is a score of answers, and with answers=0 none are asked for",
        ),
        ({"patience": 2}, "patience=2 counts measurements during a stage, and with every=null there are none"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message.replace(".", r"\.")):
        Evaluate.model_validate(settings)


@pytest.mark.slow
def test_parts_that_are_built_side_by_side_are_measured_too(
    apart: Callable[..., RunConfig], rows: Callable[..., Path]
) -> None:
    config = apart("run", ["side_by_side=3"])
    held_out = rows("eval.jsonl", 8, alts=True)
    update = {"data": config.data.model_copy(update={"eval": str(held_out)}), "evaluate": Evaluate(every=2)}
    config = config.model_copy(update=update)
    train(config)
    found = [(row["stage"], row["when"], row["step"]) for row in lines(config)]
    assert found == [
        (stage.name, when, 3 * i + step)
        for i, stage in enumerate(config.stages)
        for when, step in (("before", 0), ("during", 2), ("after", 3))
    ]
    assert all("loss" in row for row in lines(config))
    assert [row["stage"] for row in lines(config) if "text_loss" in row] == ["joint"] * 3
