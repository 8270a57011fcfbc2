"""Learning from pairs of answers: direct preference optimization.

A pair stands in its row as two samples, the better answer and behind it the worse. What the model said when the stage
began is told by a copy of it in which only what is trained is a copy: everything frozen is shared, so beside adapters
it takes next to no memory.

Shapes in this file:
    S  samples of a row, two for each pair    P  pairs    T  targets    V  vocabulary
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from avlm.config.preference import Dpo
from avlm.models.base import AvlmOutput
from avlm.models.fusion import causal_targets
from avlm.models.modeling import AvlmForConditionalGeneration
from avlm.samples import Row
from avlm.training.cross_entropy import CHUNK_VALUES
from avlm.training.loss import RowLosses


class Preference:
    """The loss of a stage that compares answers.

    Args:
        model: As the stage begins with it, with what is trained marked as such and nothing learned yet.
        settings: Of the stage.
    """

    def __init__(self, model: AvlmForConditionalGeneration, settings: Dpo) -> None:
        self.settings = settings
        self.reference = as_it_is(model)

    def losses(self, model: AvlmForConditionalGeneration, row: Row) -> RowLosses:
        """What a row of pairs costs: a sum over its pairs."""
        with torch.no_grad():
            before = answer_logps(self.reference, row)
        costs, margins = dpo(answer_logps(model, row), before, self.settings)
        return RowLosses(costs.sum(), margins=margins.detach())


def tally(margins: Sequence[Tensor]) -> list[float]:
    """The margins of some rows as numbers that processes add up: how many, how many above zero, their sum."""
    found = torch.cat([torch.zeros(0), *margins]).double()
    return [float(len(found)), float((found > 0).sum()), float(found.sum())]


def preferred(tallied: Sequence[float]) -> dict[str, Any]:
    """What a tally comes to, as a step or a measurement tells it; nothing where there was no pair."""
    pairs, above, total = tallied
    return {"preferred": above / pairs, "margin": total / pairs} if pairs else {}


def as_it_is(model: AvlmForConditionalGeneration) -> AvlmForConditionalGeneration:
    """A copy of a model that stays as it is while the model learns; it shares every weight that is frozen."""
    frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
    kept: AvlmForConditionalGeneration = copy.deepcopy(model, dict(frozen))  # type: ignore[arg-type]
    for parameter in kept.parameters():
        parameter.requires_grad_(False)
    kept.eval()
    return kept


def dpo(logps_S: Tensor, before_S: Tensor, settings: Dpo) -> tuple[Tensor, Tensor]:
    """Each pair's loss and margin.

    Args:
        logps_S: The logarithm of each answer's probability, the better and the worse of each pair in turn.
        before_S: The same, as the stage began.

    Returns:
        Losses (P) and margins (P): how much more the better answer has gained than the worse, times beta.

    Source:
        arXiv:2305.18290, equation 7; with label smoothing as its authors' later note on noisy preferences has it
        (conservative DPO, equation 3).
    """
    gained = logps_S - before_S
    margins = settings.beta * (gained[0::2] - gained[1::2])
    share = settings.label_smoothing
    return -(1 - share) * F.logsigmoid(margins) - share * F.logsigmoid(-margins), margins


def answer_logps(model: AvlmForConditionalGeneration, row: Row) -> Tensor:
    """The logarithm of the probability of each sample's targets, one after the other: float32 (S)."""
    at = causal_targets(row.labels)[0].nonzero().squeeze(1)
    owners = torch.repeat_interleave(torch.arange(len(row.lengths)), torch.tensor(row.lengths)).to(at.device)[at]
    head = model.plain_head()
    if head is None:
        output: AvlmOutput = model(**row.inputs(), logits_to_keep=at)
        assert output.logits is not None
        logits = output.logits[0].float()
        logps = logits.log_softmax(-1).gather(1, _targets(row, at, logits)[:, None])[:, 0]
    else:
        hidden = model.model(**row.inputs()).last_hidden_state[0]
        logps = _logps(hidden.index_select(0, at.to(hidden.device)), head, _targets(row, at, hidden))
    return logps.new_zeros(len(row.lengths)).index_add(0, owners.to(logps.device), logps)


def _targets(row: Row, at: Tensor, like: Tensor) -> Tensor:
    return row.labels[0, 1:][at].to(like.device)


def _logps(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """Of each target, a chunk at a time: the logits of a chunk are forgotten, and made again on the way back."""
    size = max(1, CHUNK_VALUES // len(head.weight))
    chunks = [
        checkpoint(
            _chunk,
            hidden[i : i + size],
            head.weight,
            head.bias,
            targets[i : i + size],
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for i in range(0, len(hidden), size)
    ]
    return torch.cat(chunks) if chunks else hidden.new_zeros(0, dtype=torch.float32)


def _chunk(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, weight, bias).float()
    return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(-1)
