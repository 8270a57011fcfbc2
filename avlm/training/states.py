"""The state head: whether a question was meant for the model, told where its answer begins.

Source:
    VITA-1.5 (arXiv:2501.01957): two states and one class that no row has, over the last hidden state, with the
    cross-entropy weighted 1, 5 and 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from avlm.config.stage import Stage, StateHead
from avlm.models.modeling import AvlmForConditionalGeneration
from avlm.samples import Row


def train_state_head(model: AvlmForConditionalGeneration, stage: Stage, seed: int) -> list[dict[str, Any]]:
    """Make sure that the model has a state head, fresh if it had none, and let it learn.

    Returns:
        Its groups of parameters for the optimizer; weights decay as the stage says, biases never.
    """
    settings = stage.state_head
    assert settings is not None
    if model.state_head is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model.add_state_head(len(settings.weights))
    assert model.state_head is not None
    model.state_head.requires_grad_(True)
    facts = {"lr": settings.lr, "peak": settings.lr}
    decay = stage.optimizer.weight_decay
    return [
        {"params": [model.state_head.weight], "weight_decay": decay, **facts},
        {"params": [model.state_head.bias], "weight_decay": 0.0, **facts},
    ]


def state_loss(logits_KC: Tensor, row: Row, head: StateHead) -> Tensor:
    """Sum of the weighted cross-entropies of a row's states, in float32.

    Divided by `state_weight` of the whole step it is that row's share of torch's weighted mean.

    Args:
        logits_KC: The head's answer for each state of the row.
    """
    classes = torch.tensor([state for _, state in row.states], device=logits_KC.device, dtype=torch.long)
    weights = torch.tensor(head.weights, device=logits_KC.device)
    return F.cross_entropy(logits_KC.float(), classes, weight=weights, reduction="sum")


def state_weight(rows: Sequence[Row], head: StateHead) -> float:
    """What the states of a step weigh together."""
    return sum(head.weights[state] for row in rows for _, state in row.states)
