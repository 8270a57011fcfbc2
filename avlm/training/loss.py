"""The loss of next-token prediction, computed only where there is something to learn."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from avlm.models.fusion import causal_targets
from avlm.models.modeling import AvlmForConditionalGeneration
from avlm.samples import Row


def row_loss(model: AvlmForConditionalGeneration, row: Row, label_smoothing: float = 0.0) -> Tensor:
    """Sum of the cross-entropies of a row's target tokens, in float32.

    Divided by the number of target tokens of the whole step it is that row's share of an exact mean, however the step
    was cut into rows.
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
        logits_to_keep=at,
    )
    targets = row.labels[0, at + 1]
    return F.cross_entropy(output.logits[0].float(), targets, reduction="sum", label_smoothing=label_smoothing)
