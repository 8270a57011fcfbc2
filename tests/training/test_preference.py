"""Pairs of answers: the loss is the paper's formula, pair by pair, against the model as the stage began."""

from __future__ import annotations

import io
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rich.console import Console
from torch import Tensor, nn

from avlm.config.data import DataConfig
from avlm.config.evaluate import Evaluate
from avlm.config.preference import Dpo
from avlm.config.run import RunConfig
from avlm.config.stage import Stage
from avlm.config.stage_fits import stage_problem
from avlm.convert.compose import Composed
from avlm.data.encode import cut
from avlm.data.loader import StepLoader
from avlm.data.sources import JsonLines
from avlm.errors import ConfigError, DataError
from avlm.samples import IGNORE, Encoded
from avlm.training import cross_entropy, preference
from avlm.training.chain import Run
from avlm.training.observe import read_lines
from avlm.training.preference import Preference, answer_logps, dpo
from avlm.training.stages import prepare
from tests.training.worlds import changed, train_in

LORA = {"rank": 4, "targets": ["q_proj", "v_proj"]}
WHOLE = {"vision_connector": {"lr": 1e-2}, "language": {"lr": 1e-2}}
ADAPTED = {"language": {"lr": 1e-2, "lora": LORA}}


def stage_of(**settings: Any) -> Stage:
    how = {"name": "only", "train": WHOLE, "steps": 4, "batch_samples": 4, "row_tokens": 1000, "loss": "dpo"}
    return Stage.model_validate({**how, **settings})


@pytest.fixture
def pairs(rows: Callable[..., Path]) -> Path:
    """The mixed rows, each but one in five with a worse answer of another length; one has two turns."""
    path = rows(alts=True)
    found = [json.loads(line) for line in path.read_text().splitlines()]
    for i, row in enumerate(found):
        if i % 5 != 4:
            row["rejected"] = ["blue and green", "no", "green is not red"][i % 3]
    found[0]["messages"] += [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "yes"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


@pytest.fixture
def made(make_model: Callable[..., Composed]) -> Composed:
    made: Composed = make_model()
    return made


@pytest.fixture
def loader(made: Composed, pairs: Path) -> Callable[..., StepLoader]:
    def load(**settings: Any) -> StepLoader:
        return StepLoader(JsonLines(pairs), stage_of(**settings), made.processor, DataConfig(), seed=0)

    return load


# ---------------------------------------------------------------- the formula


def slow_logp(made: Composed, sample: Encoded) -> float:
    """Of the answer alone, token by token, from all logits of the model."""
    model, processor = made
    batch = processor.collate([sample], side="right")
    labels = batch.pop("labels")[0].tolist()
    with torch.no_grad():
        logits = model(**batch).logits[0].double()
    total = 0.0
    for i, label in enumerate(labels):
        if i and label != IGNORE:
            total += float(logits[i - 1][label]) - math.log(sum(math.exp(x) for x in logits[i - 1].tolist()))
    return total


def slow_dpo(better: float, worse: float, better_ref: float, worse_ref: float, beta: float, share: float) -> float:
    """Equation 7 of arXiv:2305.18290, and equation 3 of the note on conservative DPO."""
    margin = beta * ((better - better_ref) - (worse - worse_ref))
    return (1 - share) * math.log(1 + math.exp(-margin)) + share * math.log(1 + math.exp(margin))


def test_the_loss_is_the_formula_s_for_any_numbers() -> None:
    torch.manual_seed(0)
    now, before = 5 * torch.randn(8, dtype=torch.float64), 5 * torch.randn(8, dtype=torch.float64)
    for beta, share in itertools.product((0.1, 0.5, 2.0), (0.0, 0.2)):
        costs, margins = dpo(now, before, Dpo(beta=beta, label_smoothing=share))
        for i in range(4):
            a, b, c, d = (float(x) for x in (now[2 * i], now[2 * i + 1], before[2 * i], before[2 * i + 1]))
            assert float(costs[i]) == pytest.approx(slow_dpo(a, b, c, d, beta, share), rel=1e-9)
            assert float(margins[i]) == pytest.approx(beta * (a - c - b + d), rel=1e-9)


def moved(model: nn.Module) -> None:
    """Some learning: whatever is trained is no longer what it was."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("train", [WHOLE, ADAPTED], ids=["whole", "adapters"])
def test_packed_pairs_cost_what_a_slow_loop_over_them_finds(
    made: Composed, loader: Callable[..., StepLoader], train: dict[str, Any]
) -> None:
    steps = loader(train=train, batch_samples=9)
    assert len(steps.rows) == 10  # of twelve rows two are no pairs
    data = steps.step(0)
    (row,) = data.rows
    assert data.num_samples == 9 and len(row.lengths) == 18
    found = [steps.prepare(wanted) for wanted in steps.assigned(0)[0]]
    by_id = {sample.id: sample for sample in found if isinstance(sample, Encoded)}
    stage = stage_of(train=train)
    before = {name: (slow_logp(made, s), slow_logp(made, s.rejected)) for name, s in by_id.items() if s.rejected}

    prepare(made.model, stage)
    learned = Preference(made.model, Dpo())
    assert float(learned.losses(made.model, row).tokens.detach()) == pytest.approx(9 * math.log(2), rel=1e-5)
    moved(made.model)
    expected, gains = 0.0, []
    for name in row.ids[::2]:
        sample = by_id[name]
        assert sample.rejected is not None
        now = slow_logp(made, sample), slow_logp(made, sample.rejected)
        expected += slow_dpo(*now, *before[name], 0.1, 0.0)
        gains.append(0.1 * (now[0] - before[name][0] - now[1] + before[name][1]))
    costs = learned.losses(made.model, row)
    assert float(costs.tokens.detach()) == pytest.approx(expected, rel=1e-4)
    assert costs.margins is not None and costs.margins.tolist() == pytest.approx(gains, rel=1e-3, abs=1e-4)
    assert abs(expected - 9 * math.log(2)) > 0.01


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_are_those_of_whole_logits_also_in_chunks(
    made: Composed, loader: Callable[..., StepLoader], monkeypatch: pytest.MonkeyPatch
) -> None:
    (row,) = loader().step(0).rows
    prepare(made.model, stage_of())
    learned = Preference(made.model, Dpo(beta=0.5))
    moved(made.model)
    assert made.model.plain_head() is not None
    monkeypatch.setattr(preference, "CHUNK_VALUES", 3 * 400)  # three targets at a time
    ours = gradients(made.model, learned.losses(made.model, row).tokens)

    logits = made.model(**row.inputs()).logits[0].float().log_softmax(-1)
    ends = list(itertools.accumulate(row.lengths, initial=0))
    sums = []
    for start, end in itertools.pairwise(ends):
        at = [i for i in range(start + 1, end) if row.labels[0, i] != IGNORE]
        sums.append(sum(logits[i - 1, row.labels[0, i]] for i in at))
    with torch.no_grad():
        before = answer_logps(learned.reference, row)
    margins = [0.5 * ((sums[i] - before[i]) - (sums[i + 1] - before[i + 1])) for i in range(0, len(sums), 2)]
    slow = sum(-torch.log(torch.sigmoid(margin)) for margin in margins)
    theirs = gradients(made.model, slow)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        worst = (ours[name] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-3)
        assert worst < 1e-4, f"{name}: {worst:.1e}"
    assert cross_entropy.CHUNK_VALUES > 10**6


def test_only_the_last_answers_count_and_both_have_the_same_media(loader: Callable[..., StepLoader]) -> None:
    steps = loader()
    sample = steps.prepare((0, 0))  # two turns, a picture
    assert isinstance(sample, Encoded) and sample.rejected is not None
    tokens = steps.processor.tokenizer
    said = [tokens.decode([x for x in s.labels if x != IGNORE]) for s in (sample, sample.rejected)]
    assert said[0].startswith("yes") and said[1].startswith("blue and green")
    assert sample.images and all(a is b for a, b in zip(sample.images, sample.rejected.images, strict=True))
    assert sample.room() == len(sample) + len(sample.rejected)


def test_counting_ahead_finds_what_encoding_does(loader: Callable[..., StepLoader]) -> None:
    steps = loader()
    for number in steps.rows:
        sample = steps.source[number]
        encoded = steps.prepare((number, 0))
        assert isinstance(encoded, Encoded) and encoded.rejected is not None
        counts = steps.prepare.writer.count(sample, steps.processor.reader().measure)
        assert (counts.tokens, counts.targets) == (encoded.room(), encoded.num_targets())
        assert counts.load.tiles == len(encoded.images) + len(encoded.rejected.images)


# ---------------------------------------------------------------- what the copy shares


@pytest.mark.parametrize(("train", "copied"), [(WHOLE, True), (ADAPTED, False)])
def test_the_reference_shares_what_is_frozen_and_stays_as_it_was(
    made: Composed, train: dict[str, Any], copied: bool
) -> None:
    model = made.model
    prepare(model, stage_of(train=train))
    reference = Preference(model, Dpo()).reference
    own = dict(model.named_parameters())
    theirs = dict(reference.named_parameters())
    assert own.keys() == theirs.keys()
    for name, parameter in own.items():
        assert (theirs[name] is parameter) == (not parameter.requires_grad), name
        assert not theirs[name].requires_grad or theirs[name] is parameter
    embedding = "model.language_model.model.embed_tokens.weight"
    assert (theirs[embedding] is not own[embedding]) == copied
    kept = {name: p.detach().clone() for name, p in theirs.items()}
    moved(model)
    trained = [name for name, p in own.items() if p.requires_grad]
    assert trained and all(torch.equal(theirs[name], kept[name]) for name in trained)


# ---------------------------------------------------------------- a run


def one_stage(small_run: Callable[..., RunConfig], name: str, **settings: Any) -> RunConfig:
    config = small_run(name)
    return config.model_copy(update={"stages": (stage_of(**settings),)})


def train(config: RunConfig, **more: Any) -> Path:
    return Run(config, console=Console(file=io.StringIO()), **more).train()


def test_a_run_learns_to_prefer_and_tells_how_well(
    small_run: Callable[..., RunConfig], pairs: Path, tmp_path: Path
) -> None:
    config = one_stage(small_run, "run", steps=20, batch_samples=10, dpo={"beta": 0.5}, train=ADAPTED)
    data = config.data.model_copy(update={"eval": str(pairs)})
    train(config.model_copy(update={"data": data, "evaluate": Evaluate(metric="margin", every=10)}))
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=0.1)  # nothing is gained yet, but for dropout
    assert lines[-1]["loss"] < 0.4 and lines[-1]["preferred"] == 1.0 and lines[-1]["margin"] > 0.5
    assert all(line["samples"] == 10 for line in lines)
    before, _, after = read_lines(tmp_path / "run" / "evals.jsonl")
    assert before["loss"] == pytest.approx(math.log(2), rel=1e-4)  # nothing is gained yet
    assert after["preferred"] == 1.0 and after["margin"] > 0.5 > before["margin"]


def test_shares_of_the_weights_are_refused_before_the_first_stage(
    small_run: Callable[..., RunConfig], pairs: Path, tmp_path: Path
) -> None:
    """Though it is a later stage that cannot be trained so."""
    first = small_run().stages[2].model_dump(mode="json")
    stages = [first, stage_of().model_dump(mode="json")]
    two = changed(small_run(), tmp_path / "two", stages=stages, parallel={"mode": "fsdp"}, device="cpu")
    found = train_in(2, two)
    assert [kind for kind, _ in found] == ["ConfigError"] * 2
    assert found[0][1] == (
        "stage only has loss=dpo, which compares the model with a copy of what it was, and with parallel.mode=fsdp no "
        "process has all of it. Set parallel.mode=data"
    )
    assert read_lines(tmp_path / "two" / "metrics.jsonl") == []


@pytest.mark.slow
def test_a_resumed_run_compares_with_where_the_stage_began(
    small_run: Callable[..., RunConfig], pairs: Path, tmp_path: Path
) -> None:
    whole, killed = (one_stage(small_run, name) for name in ("whole", "killed"))
    train(whole)

    class KilledError(Exception):
        pass

    def kill(metrics: Any) -> None:
        if metrics.stage_step == 2:
            raise KilledError

    with pytest.raises(KilledError):
        train(killed, on_step=kill)
    train(killed)
    a, b = (tmp_path / name / "model" / "model.safetensors" for name in ("whole", "killed"))
    assert a.read_bytes() == b.read_bytes()
    losses = [[line["loss"] for line in read_lines(tmp_path / name / "metrics.jsonl")] for name in ("whole", "killed")]
    assert losses[0] == losses[1]


def test_a_step_is_the_same_however_it_is_cut_into_rows(
    small_run: Callable[..., RunConfig], pairs: Path, tmp_path: Path
) -> None:
    for capacity in (1000, 90):
        train(one_stage(small_run, str(capacity), row_tokens=capacity, train={"vision_connector": {"lr": 1e-3}}))
    one, many = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("1000", "90"))
    assert one[0]["rows"] == 1 and many[0]["rows"] > 1
    for a, b in zip(one, many, strict=True):
        for name in ("loss", "grad_norm", "margin"):  # pairs of text alone have a margin of 0, with the noise of sums
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), name


# ---------------------------------------------------------------- what cannot work


def test_rows_without_pairs_are_refused_before_anything_is_loaded(
    small_run: Callable[..., RunConfig], rows: Callable[..., Path]
) -> None:
    with pytest.raises(ConfigError) as error:
        Run(one_stage(small_run, "run", epochs=1, steps=None))
    assert str(error.value) == (
        "stage only learns from rows with two answers (chosen and rejected), and the data has none. "
        "Add such rows, or give the stage its own with stages.only.data"
    )


def test_a_pair_longer_than_a_row_is_never_cut(loader: Callable[..., StepLoader]) -> None:
    sample = loader().prepare((1, 0))
    assert isinstance(sample, Encoded)
    with pytest.raises(
        DataError, match=f"a pair of answers that take {sample.room()} tokens together, and a row holds"
    ):
        cut(sample, sample.room() - 1)
    assert cut(sample, sample.room()) is sample


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"supervise": "everything"}, "has loss=dpo and supervise=everything, and it is answers that are compared"),
        ({"label_smoothing": 0.1}, "Set stages.only.label_smoothing=0, or stages.only.dpo.label_smoothing"),
        ({"state_head": {"lr": 1e-3}}, "has loss=dpo and a state_head, which learns from single answers"),
        ({"loss": "next_token", "dpo": {}}, "has settings of dpo and loss=next_token, so they would do nothing"),
        ({"balance": 0.1}, "Set stages.only.balance=0, or train it in another stage"),
        ({"builds": "language", "train": {"language": {"lr": 1e-3}}}, "has loss=dpo and builds the language part"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    problem = stage_problem(stage_of(**settings), ("vision", "vision_connector", "language"))
    assert problem is not None and message in problem


def test_smoothing_of_half_the_pairs_would_prefer_nothing() -> None:
    with pytest.raises(ValidationError):
        Dpo(label_smoothing=0.5)
