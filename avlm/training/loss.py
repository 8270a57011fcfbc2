"""The loss of next-token prediction, computed only where there is something to learn."""

from __future__ import annotations

import inspect
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from avlm.config.run import Stage
from avlm.errors import ConfigError
from avlm.models.fusion import causal_targets
from avlm.models.modeling import AvlmForConditionalGeneration
from avlm.samples import Row


class RowLosses(NamedTuple):
    """What a row costs."""

    tokens: Tensor
    """Sum of the cross-entropies of its target tokens, in float32."""
    balance: Tensor | None = None
    """How unevenly its tokens use a mixture's experts, where that was asked for: as many as the experts that a token
    goes to when all are used alike."""


def row_loss(model: AvlmForConditionalGeneration, row: Row, label_smoothing: float = 0.0) -> Tensor:
    """Sum of the cross-entropies of a row's target tokens, in float32; see `row_losses`."""
    return row_losses(model, row, label_smoothing).tokens


def row_losses(
    model: AvlmForConditionalGeneration, row: Row, label_smoothing: float = 0.0, *, balance: bool = False
) -> RowLosses:
    """The losses of one row.

    Divided by the number of target tokens of the whole step the first is that row's share of an exact mean, however the
    step was cut into rows.

    Args:
        balance: Also tell how evenly experts are used: the language model's own balance loss over the row's tokens,
            whether or not they are targets (Switch Transformers, arXiv:2101.03961, equations 4 to 6).
    """
    at = causal_targets(row.labels)[0].nonzero().squeeze(1)
    output = model(
        input_ids=row.input_ids,
        position_ids=row.position_ids,
        row_lengths=row.lengths,
        places=row.places,
        pixel_values=row.pixel_values,
        image_sizes=row.image_sizes,
        pixel_values_videos=row.pixel_values_videos,
        input_features=row.input_features,
        input_features_mask=row.input_features_mask,
        input_features_beside=row.input_features_beside,
        input_features_beside_mask=row.input_features_beside_mask,
        logits_to_keep=at,
        **({"output_router_logits": True} if balance else {}),
    )
    targets = row.labels[0, at + 1]
    tokens = F.cross_entropy(output.logits[0].float(), targets, reduction="sum", label_smoothing=label_smoothing)
    return RowLosses(tokens, output.aux_loss)


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
