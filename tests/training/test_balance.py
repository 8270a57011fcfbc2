"""The balance loss of a mixture of experts: transformers' own number, whatever way the samples lie in rows."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from avlm.config.io import override
from avlm.config.stage import Stage
from avlm.convert.compose import Composed, compose
from avlm.data.encode import pack
from avlm.data.loader import StepLoader
from avlm.data.sources import JsonLines
from avlm.data.text.vocabulary import sample_texts
from avlm.errors import ConfigError
from avlm.samples import Encoded, Sample
from avlm.training.chain import train
from avlm.training.loss import stage_losses
from avlm.training.stages import prepare

MIXTRAL = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
QWEN_MOE = {"model_type": "qwen2_moe", "num_experts": 4, "moe_intermediate_size": 16, "decoder_sparse_step": 1}

Make = Callable[..., Composed]

BALANCED = Stage.model_validate({"name": "b", "train": {"language": {"lr": 1e-3}}, "steps": 1, "balance": 0.5})


def encoded(made: Composed, make_sample: Callable[..., Sample]) -> list[Encoded]:
    """Four samples of different lengths and senses."""
    kinds: list[tuple[str, ...]] = [(), ("image",), ("audio",), ("image", "audio")]
    return [made.processor.encode(make_sample(*k, text="What is it? " * (i + 1), seed=i)) for i, k in enumerate(kinds)]


def padded(made: Composed, samples: list[Encoded]) -> tuple[Tensor, Tensor, Tensor]:
    """The samples as a padded batch for the language model alone: embeddings, mask, labels."""
    rows = []
    for row in (pack([sample]) for sample in samples):
        embeds, _ = made.model.model.embed(
            row.input_ids,
            row.pixel_values,
            input_features=row.input_features,
            input_features_mask=row.input_features_mask,
        )
        rows.append(embeds[0])
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    labels = pad_sequence([torch.tensor(s.labels) for s in samples], batch_first=True, padding_value=-100)
    return pad_sequence(rows, batch_first=True), mask.long(), labels


@pytest.mark.parametrize("family", [MIXTRAL, QWEN_MOE], ids=["mixtral", "qwen2_moe"])
@pytest.mark.parametrize("packs", [True, False], ids=["packed", "laid out as a padded batch"])
def test_equals_that_of_transformers_on_a_padded_batch(
    make_model: Make, make_sample: Callable[..., Sample], family: dict[str, Any], packs: bool
) -> None:
    made = make_model(language=family)
    samples = encoded(made, make_sample)
    embeds, mask, labels = padded(made, samples)
    language = copy.deepcopy(made.model.language_model)
    language.set_attn_implementation("eager")
    theirs = language(inputs_embeds=embeds, attention_mask=mask, labels=labels, output_router_logits=True)
    if not packs:
        made.model.language_model.set_attn_implementation("eager")
    ours = stage_losses(made.model, pack(samples), BALANCED)
    assert ours.balance is not None
    torch.testing.assert_close(ours.balance, theirs.aux_loss, rtol=1e-5, atol=1e-6)
    tokens = theirs.loss - language.config.router_aux_loss_coef * theirs.aux_loss
    torch.testing.assert_close(ours.tokens / sum(s.num_targets() for s in samples), tokens, rtol=1e-5, atol=1e-6)
    assert (made.model.model._packs is True) == packs


@torch.no_grad()
def test_equals_the_formula_token_by_token(make_model: Make, make_sample: Callable[..., Sample]) -> None:
    """Switch Transformers, equations 4 to 6, over all layers; for several experts a token, as Mixtral counts them."""
    made = make_model(language=MIXTRAL)
    row = pack(encoded(made, make_sample))
    output = made.model(
        row.input_ids, position_ids=row.position_ids, row_lengths=row.lengths, pixel_values=row.pixel_values,
        input_features=row.input_features, input_features_mask=row.input_features_mask, output_router_logits=True,
    )  # fmt: skip
    tokens = sum(row.lengths)
    assert [tuple(layer.shape) for layer in output.router_logits] == [(tokens, 4)] * 2
    goes, likely = [0.0] * 4, [0.0] * 4
    for layer in output.router_logits:
        for logits in layer.double():
            shares = logits.softmax(0)
            for expert in shares.topk(2).indices.tolist():
                goes[expert] += 1 / (2 * tokens)
            for expert in range(4):
                likely[expert] += float(shares[expert]) / (2 * tokens)
    by_hand = 4 * sum(f * p for f, p in zip(goes, likely, strict=True))
    assert float(output.aux_loss) == pytest.approx(by_hand, rel=1e-5)
    assert float(load_balancing_loss_func(output.router_logits, 4, 2)) == pytest.approx(by_hand, rel=1e-5)
    assert by_hand > 2.01  # 2 would be a perfect balance


def test_the_models_own_loss_includes_it_as_the_language_models_does(
    make_model: Make, make_sample: Callable[..., Sample]
) -> None:
    made = make_model(language={**MIXTRAL, "router_aux_loss_coef": 0.5})
    samples = encoded(made, make_sample)
    embeds, mask, labels = padded(made, samples)
    inputs = {"attention_mask": mask, "labels": labels}
    theirs = made.model.language_model(inputs_embeds=embeds, **inputs, output_router_logits=True)
    ours = made.model(inputs_embeds=embeds, **inputs, output_router_logits=True)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-6, atol=0)
    assert ours.loss > made.model(inputs_embeds=embeds, **inputs).loss + 1
    assert made.model(inputs_embeds=embeds, **inputs).aux_loss is None


# ---------------------------------------------------------------- in training


@pytest.fixture
def mixture(small_run: Callable[..., Any]) -> Callable[..., Any]:
    """A run whose one stage trains a mixture on texts."""

    def make(name: str, balance: float, *overrides: str) -> Any:
        run = small_run(name)
        language = run.model.language.random | {"model_type": "mixtral", "num_local_experts": 4}
        stage = run.stages[0].model_copy(update={"builds": None, "name": "text", "balance": balance})
        model = run.model.model_copy(
            update={"language": run.model.language.model_copy(update={"random": language}), "audio": None}
        )
        return override(run.model_copy(update={"stages": (stage,), "model": model}), list(overrides))

    return make


def lines(run: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run.out) / "metrics.jsonl").read_text().splitlines()]


def test_it_is_reported_beside_the_loss_which_stays_the_token_mean(mixture: Callable[..., Any]) -> None:
    with_it, without = mixture("with", 0.02), mixture("without", 0)
    train(with_it)
    train(without)
    assert lines(with_it)[0]["loss"] == pytest.approx(lines(without)[0]["loss"], rel=1e-6)
    assert all("balance" in line for line in lines(with_it)) and not any("balance" in line for line in lines(without))


def test_a_step_descends_on_the_token_mean_and_the_rows_balance_by_their_tokens(mixture: Callable[..., Any]) -> None:
    run = mixture("rows", 0.5, "max_steps=1", "stages.text.row_tokens=40", "model.language.random.attention_dropout=0")
    (stage,) = run.stages
    source = JsonLines(run.data.train)
    model, processor = compose(run.model, seed=run.seed, texts=list(sample_texts(source)))
    (data,) = StepLoader(source, stage, processor, run.data, run.seed).steps(0, 1)
    assert len(data.rows) > 1 and len({sum(row.lengths) for row in data.rows}) > 1
    prepare(model, stage)
    objective, balance = torch.zeros(()), 0.0
    for row in data.rows:
        found = stage_losses(model, row, stage)
        assert found.balance is not None
        share = sum(row.lengths) / sum(sum(row.lengths) for row in data.rows)
        objective = objective + found.tokens / data.num_targets() + 0.5 * share * found.balance
        balance += share * float(found.balance)
    objective.backward()  # type: ignore[no-untyped-call]
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    train(run)
    (line,) = lines(run)
    assert line["balance"] == pytest.approx(balance, rel=1e-5)
    assert line["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


@pytest.mark.slow
def test_a_heavy_weight_evens_the_experts_out(mixture: Callable[..., Any]) -> None:
    run = mixture("heavy", 10.0, "stages.text.steps=40")
    train(run)
    told = [line["balance"] for line in lines(run)]
    assert told[-1] < told[0] - 0.05 and told[-1] < 2.1


@pytest.mark.parametrize("language", [{}, {"model_type": "gpt2"}], ids=["llama", "gpt2"])
def test_a_language_model_without_experts_is_refused(make_model: Make, language: dict[str, Any]) -> None:
    from steps import stage

    model = make_model("vision", language=language).model
    with pytest.raises(ConfigError) as error:
        prepare(model, stage({"language": {"lr": 1e-3}}, balance=0.02))
    kind = language.get("model_type", "llama")
    assert str(error.value) == (
        f"stages.s.balance=0.02: the language model is a {kind}, which has no experts that its family's balance loss "
        "could be about. Set stages.s.balance=0"
    )
