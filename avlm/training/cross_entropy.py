"""Cross-entropy of a language model's head, without ever holding all of its logits.

Shapes in this file:
    T  target tokens    D  width    V  vocabulary    C  targets of one chunk
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_VALUES = 2**24
"""Logits that are computed at once: 64 MB in float32, which a processor's caches and a GPU's kernels both like."""


def linear_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, *, bias_V: Tensor | None = None, smoothing: float = 0.0
) -> Tensor:
    """Sum of the cross-entropies of ``softmax(hidden @ weight.T + bias)`` with the targets: float32, a scalar.

    Loss and gradients are made together, a chunk of targets at a time, so memory is one chunk's logits and the
    gradients themselves. What needs no gradient (a frozen head) is not computed. The products run in the dtype of the
    inputs, everything between them in float32.

    Args:
        hidden_TD: Hidden states at the targets.
        weight_VD: The head's matrix.
        targets_T: int64.
        smoothing: Share of the target's probability that is spread over the vocabulary (arXiv:1512.00567).

    Source:
        Chunked losses as in Liger Kernel (arXiv:2410.10989, section 3.2).
    """
    if not torch.is_grad_enabled():  # or the gradient of a head that learns would be made for nobody
        hidden_TD, weight_VD = hidden_TD.detach(), weight_VD.detach()
        bias_V = None if bias_V is None else bias_V.detach()
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_TD, weight_VD, bias_V, targets_T, smoothing
    )
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, smoothing: float
    ) -> Tensor:
        wanted = ctx.needs_input_grad
        by_hidden = torch.empty_like(hidden) if wanted[0] else None
        by_weight = torch.empty_like(weight) if wanted[1] else None  # large: the first chunk fills it
        if by_weight is not None and not len(hidden):
            by_weight.zero_()
        by_bias = torch.zeros_like(bias) if bias is not None and wanted[2] else None
        loss = hidden.new_zeros((), dtype=torch.float32)
        size = max(1, CHUNK_VALUES // len(weight))
        for first in range(0, len(hidden), size):
            part = slice(first, first + size)
            cost, slope = _chunk(hidden[part], weight, bias, targets[part], smoothing, any(wanted))
            loss += cost
            if slope is None:
                continue
            slope = slope.to(hidden.dtype)
            if by_hidden is not None:
                torch.mm(slope, weight, out=by_hidden[part])
            if by_weight is not None:
                torch.addmm(by_weight, slope.T, hidden[part], beta=min(first, 1), out=by_weight)
            if by_bias is not None:
                by_bias += slope.sum(0)
        ctx.gradients = by_hidden, by_weight, by_bias
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grads
        by_hidden, by_weight, by_bias = (
            # In place, where it can be done once only: nothing else holds them, and a head's gradient is large.
            None if found is None else found.mul_(scale.to(found.dtype))
            for found in ctx.gradients
        )
        ctx.gradients = ()
        return by_hidden, by_weight, by_bias, None, None


def _chunk(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, smoothing: float, learns: bool
) -> tuple[Tensor, Tensor | None]:
    """The summed loss of some targets, and its derivative by their logits (C, V)."""
    logits = hidden @ weight.T if bias is None else torch.addmm(bias, hidden, weight.T)
    logits = logits.float()
    total = logits.logsumexp(-1)
    cost = (total - (1 - smoothing) * logits.gather(1, targets[:, None])[:, 0]).sum()
    if smoothing:
        cost = cost - smoothing * logits.mean(-1).sum()
    if not learns:
        return cost, None
    slope = logits.sub_(total[:, None]).exp_()
    if smoothing:
        slope -= smoothing / len(weight)
    slope.scatter_add_(1, targets[:, None], slope.new_full((len(slope), 1), smoothing - 1))
    return cost, slope
