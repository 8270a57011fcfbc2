"""What avlm's own audio encoders have in common: what they return, and what they refuse.

Shapes in this file:
    N  clips    M  mel frames    n  embeddings of the longest clip    C  encoder width
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.modeling_outputs import ModelOutput

from avlm.errors import LayoutError


@dataclass
class HeardOutput(ModelOutput):
    """What an audio encoder returns.

    Attributes:
        last_hidden_state: (N, n, C).
        attention_mask: bool (N, n), True where an embedding is of the clip. What stands elsewhere means nothing.
        hidden_states: The input of every layer and the output, each (N, n, C), where they were asked for.
    """

    last_hidden_state: Tensor | None = None
    attention_mask: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


def checked_mask(features: Tensor, mask: Tensor | None, shortest: int, longest: int) -> Tensor:
    """The mask of a batch that an encoder can hear.

    Args:
        features: (N, bins, M).
        mask: bool (N, M), True where there is sound, from the first frame on; None for all of it.
        shortest: Frames that make the first embedding.
        longest: Frames that the encoder hears at once.

    Returns:
        bool (N, M).

    Raises:
        LayoutError: The batch makes no embedding, or is longer than the encoder hears.
    """
    frames = features.shape[2]
    if not shortest <= frames <= longest:
        raise LayoutError(
            f"clips of {frames} mel frames were given, and the audio encoder hears {shortest} to {longest} at once. "
            "Leave out what is shorter, and cut what is longer into chunks"
        )
    if mask is None:
        return torch.ones(features.shape[0], frames, dtype=torch.bool, device=features.device)
    return mask.bool()
