"""What a model wants of its attention, and attention written out for what torch's own has no argument for.

Shapes in this file:
    B  rows    H  heads    K  key/value heads    T  queries    L  keys    D  head width
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class How:
    """What the model wants of its attention, beside who sees whom."""

    causal: bool
    window: int | None
    scale: float
    dropout: float
    softcap: float | None
    sinks: Tensor | None

    def written_out(self) -> bool:
        """Whether SDPA has no argument for it (Gemma 2's soft cap, gpt-oss's sinks)."""
        return self.softcap is not None or self.sinks is not None


def explicit(q_BHTD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, mask: Tensor | None, how: How) -> Tensor:
    """Softmax written out, for what SDPA has no argument for: (B, H, T, D).

    Args:
        mask: bool, True where a query sees a key, or what is added to the scores.
    """
    repeat = q_BHTD.shape[1] // k_BKLD.shape[1]
    k, v = k_BKLD.repeat_interleave(repeat, 1), v_BKLD.repeat_interleave(repeat, 1)
    scores = (q_BHTD @ k.transpose(-1, -2)) * how.scale
    if how.softcap is not None:
        scores = how.softcap * torch.tanh(scores / how.softcap)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    if how.sinks is not None:
        sink = how.sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        weights = torch.cat([scores, sink.to(scores.dtype)], -1).softmax(-1, dtype=torch.float32)[..., :-1]
    else:
        weights = scores.softmax(-1, dtype=torch.float32)
    return F.dropout(weights.to(v.dtype), how.dropout) @ v
