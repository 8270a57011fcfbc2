"""What a stage learns from a row, computed only where there is something to learn.

Every loss of tokens is a sum. Divided by the number of target tokens of the whole step it is
that row's share of an exact mean, however the step was cut into rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from avlm.config.stage import Stage
from avlm.errors import ConfigError
from avlm.models.base import AvlmOutput
from avlm.models.fusion import causal_targets
from avlm.models.modeling import AvlmForConditionalGeneration
from avlm.samples import Row
from avlm.training.cross_entropy import linear_cross_entropy
from avlm.training.states import state_loss


class RowLosses(NamedTuple):
    """What one row costs."""

    tokens: Tensor
    """Sum over its target tokens, in float32."""
    balance: Tensor | None = None
    """How unevenly its tokens use a mixture's experts, where that was asked for: as many as the experts that a token
    goes to when all are used alike. It is the language model's own balance loss over the row's tokens, whether or not
    they are targets (Switch Transformers, arXiv:2101.03961, equations 4 to 6)."""
    states: Tensor | None = None
    """Sum over its states, weighted, where the stage has a state head."""
    margins: Tensor | None = None
    """Of its pairs of answers, where the stage compares them; ``tokens`` is then the sum over the pairs."""


def num_units(rows: Sequence[Row], stage: Stage) -> int:
    """What the sum of some rows' losses is divided by to be a mean: their pairs, or their target tokens."""
    if stage.loss == "dpo":
        return sum(len(row.lengths) for row in rows) // 2
    return sum(row.num_targets() for row in rows)


def stage_losses(model: AvlmForConditionalGeneration, row: Row, stage: Stage) -> RowLosses:
    """What a stage makes of a row: next-token prediction or distillation, its experts' balance, and its states."""
    if stage.loss == "next_token" and stage.state_head is None and not stage.balance:
        return RowLosses(row_loss(model, row, stage.label_smoothing))
    taught = teacher_logits(model, row) if stage.loss == "distill" else None
    output = _read(model, row, states=stage.state_head is not None, balance=stage.balance > 0)
    logits = _logits(output)
    if taught is not None:
        tokens = _divergence(logits, taught, stage.distill_temperature)
    else:
        tokens = _cross_entropy(logits, row, stage.label_smoothing)
    states = None
    if stage.state_head is not None:
        assert output.state_logits is not None
        states = state_loss(output.state_logits[0], row, stage.state_head)
    return RowLosses(tokens, output.aux_loss, states)


def row_loss(model: AvlmForConditionalGeneration, row: Row, label_smoothing: float = 0.0) -> Tensor:
    """Sum of the cross-entropies of a row's target tokens, in float32; no logits are held where that is possible."""
    head = model.plain_head()
    if head is None:
        return _cross_entropy(_logits(_read(model, row)), row, label_smoothing)
    hidden: Tensor = model.model(**row.inputs()).last_hidden_state[0]
    at = _targets(row).to(hidden.device)
    targets = row.labels[0, 1:].to(hidden.device)[at]
    # Not `hidden[at]`, whose gradient is added up one number at a time on a processor.
    return linear_cross_entropy(
        hidden.index_select(0, at), head.weight, targets, bias_V=head.bias, smoothing=label_smoothing
    )


def distill_loss(model: AvlmForConditionalGeneration, row: Row, temperature: float) -> Tensor:
    """Sum over a row's target tokens of how far the model is from its teacher, in float32.

    That is the divergence KL(teacher || model) of the two distributions at this temperature, from the first token of
    each answer to its end token. It is not multiplied by the temperature's square.

    Args:
        row: With its ``teacher``: the same samples in words.

    Source:
        Ultravox's loss (its README and `ultravox_model.py`), which leaves the first token of an answer out by one place
        and counts one place behind its end instead; here every token of the answer is learned, at its own place.
    """
    taught = teacher_logits(model, row)
    return _divergence(_logits(_read(model, row)), taught, temperature)


@torch.no_grad()
def teacher_logits(model: AvlmForConditionalGeneration, row: Row) -> Tensor:
    """What the model's own language model says where it reads the row's media in words: float32 (targets, V)."""
    assert row.teacher is not None, "the loader gives every row of a stage with loss=distill a teacher"
    return _logits(_read(model, row.teacher))


def check_balance(model: AvlmForConditionalGeneration, stage: Stage) -> None:
    """Make sure that a stage that balances experts has some.

    Raises:
        ConfigError: The language model is no mixture of experts, or has no balance loss.
    """
    knows = "output_router_logits" in inspect.signature(model.language_model.forward).parameters
    if stage.balance and not knows:
        kind = model.language_model.config.model_type
        raise ConfigError(
            f"stages.{stage.name}.balance={stage.balance:g}: the language model is a {kind}, which has no experts that "
            f"its family's balance loss could be about. Set stages.{stage.name}.balance=0"
        )


def _divergence(logits: Tensor, taught: Tensor, temperature: float) -> Tensor:
    assert logits.shape == taught.shape, "teacher and model have the same targets"
    theirs, ours = (taught / temperature).log_softmax(-1), (logits / temperature).log_softmax(-1)
    return F.kl_div(ours, theirs, reduction="sum", log_target=True)


def _cross_entropy(logits: Tensor, row: Row, label_smoothing: float) -> Tensor:
    targets = row.labels[0, _targets(row) + 1]
    return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)


def _logits(output: AvlmOutput) -> Tensor:
    """Of the one row that was read, float32 (targets, V)."""
    assert output.logits is not None
    return output.logits[0].float()


def _targets(row: Row) -> Tensor:
    """Positions whose next token is to be learned."""
    return causal_targets(row.labels)[0].nonzero().squeeze(1)


def _read(model: AvlmForConditionalGeneration, row: Row, *, states: bool = False, balance: bool = False) -> AvlmOutput:
    """Read a row: logits where there are targets, and the state head's where answers begin, if they are wanted."""
    output: AvlmOutput = model(
        **row.inputs(),
        logits_to_keep=_targets(row),
        state_positions=torch.tensor([at for at, _ in row.states], dtype=torch.long) if states else None,
        **({"output_router_logits": True} if balance else {}),
    )
    return output
