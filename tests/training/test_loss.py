"""The loss of a row is next-token prediction's own, and the way a step is cut into rows does not change it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avlm.config.data import DataConfig
from avlm.config.run import RunConfig
from avlm.config.stage import Stage
from avlm.convert.compose import Composed
from avlm.data.encode import pack
from avlm.data.loader import StepLoader
from avlm.data.sources import JsonLines
from avlm.samples import Encoded, Row
from avlm.training.loss import row_loss
from avlm.training.stages import prepare

ALL = {p: {"lr": 1e-3} for p in ("vision", "vision_connector", "audio", "audio_connector", "language")}


@pytest.fixture
def samples(small_model: Composed, tmp_path: Path) -> list[Encoded]:
    source = JsonLines(tmp_path / "rows.jsonl")
    return [small_model.processor.encode(source[i]) for i in range(8)]


def test_equals_the_loss_of_transformers_on_a_text(small_model: Composed, samples: list[Encoded]) -> None:
    text = samples[3]
    assert not text.places
    llama = small_model.model.language_model
    llama.set_attn_implementation("eager")
    theirs = llama(input_ids=torch.tensor([text.ids]), labels=torch.tensor([text.labels])).loss
    llama.set_attn_implementation("avlm")
    ours = row_loss(small_model.model, pack([text]))
    torch.testing.assert_close(ours / text.num_targets(), theirs, rtol=1e-5, atol=0)


def test_equals_the_loss_of_transformers_with_pictures_and_sounds(
    small_model: Composed, samples: list[Encoded]
) -> None:
    model = small_model.model
    for sample in samples[:3]:
        row = pack([sample])
        theirs = model(
            input_ids=row.input_ids,
            labels=row.labels,
            pixel_values=row.pixel_values,
            input_features=row.input_features,
            input_features_mask=row.input_features_mask,
        ).loss
        torch.testing.assert_close(row_loss(model, row) / sample.num_targets(), theirs, rtol=1e-5, atol=0)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compare(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        worst = (ours[name] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-3)
        assert worst < 1e-5, f"{name}: {worst:.1e}"


def test_a_packed_row_has_the_gradients_of_a_padded_batch(small_model: Composed, samples: list[Encoded]) -> None:
    """The slow way: one padded batch through the model, one mean over all its targets."""
    model, processor = small_model
    prepare(model, Stage.model_validate({"name": "s", "train": ALL, "steps": 1}))
    batch = processor.collate(samples, side="right")
    labels = batch.pop("labels")
    logits = model(**batch).logits.float()
    slow = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    theirs = gradients(model, slow)

    row = pack(samples)
    loss = row_loss(model, row) / row.num_targets()
    torch.testing.assert_close(loss, slow, rtol=1e-5, atol=0)
    compare(gradients(model, loss), theirs)


@pytest.mark.parametrize("row_tokens", [24, 40, 64])
def test_a_step_in_many_rows_has_the_gradients_of_one_row(
    small_run: Callable[..., RunConfig], small_model: Composed, tmp_path: Path, row_tokens: int
) -> None:
    model, processor = small_model
    source = JsonLines(tmp_path / "rows.jsonl")

    def step(capacity: int) -> tuple[int, dict[str, Tensor]]:
        stage = Stage.model_validate(
            {"name": "s", "train": ALL, "steps": 1, "batch_samples": 12, "row_tokens": capacity}
        )
        prepare(model, stage)
        data = StepLoader(source, stage, processor, DataConfig(), seed=0).step(0)
        whole = copy.deepcopy(model)
        total = torch.stack([row_loss(whole, row) for row in data.rows]).sum()
        return len(data.rows), gradients(whole, total / data.num_targets())

    one, theirs = step(1000)
    many, ours = step(row_tokens)
    assert one == 1 and many > 2
    compare(ours, theirs)


def test_label_smoothing_equals_torchs_and_the_formula(small_model: Composed, samples: list[Encoded]) -> None:
    model, row = small_model.model, pack(samples)
    logits = model(
        input_ids=row.input_ids,
        position_ids=row.position_ids,
        row_lengths=row.lengths,
        pixel_values=row.pixel_values,
        input_features=row.input_features,
        input_features_mask=row.input_features_mask,
    ).logits[0]
    kept = row.labels[0, 1:] != -100
    logits, targets = logits[:-1][kept], row.labels[0, 1:][kept]
    theirs = nn.CrossEntropyLoss(reduction="sum", label_smoothing=0.1)(logits, targets)
    ours = row_loss(model, row, label_smoothing=0.1)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    logs = logits.log_softmax(-1)  # arXiv:1512.00567, equation 5: the target keeps 0.9, 0.1 is spread evenly
    by_hand = -(0.9 * logs.gather(1, targets[:, None]).sum() + 0.1 * logs.mean(1).sum())
    torch.testing.assert_close(ours, by_hand, rtol=1e-5, atol=0)
    assert (ours - row_loss(model, row)).abs() > 0.01


def test_a_row_without_targets_costs_nothing_and_has_no_gradient(small_model: Composed, samples: list[Encoded]) -> None:
    row: Row = pack(samples[:1])
    row.labels = torch.full_like(row.labels, -100)
    loss = row_loss(small_model.model, row)
    assert loss.item() == 0
    assert all(g.abs().max() == 0 for g in gradients(small_model.model, loss).values())
