"""Attention over packed rows, for transformers' attention interface.

A row holds many samples end to end, and no token may look across a border. The
borders come down as ``cu_seq_lens_q``, as they do for flash attention, so any
language model whose attention goes through the interface can be packed. Without
them this is transformers' own SDPA attention, mask and all.

Shapes in this file:
    H  heads    K  key/value heads    T  tokens in the row    D  head width
    G  samples of about the same length    L  the longest of them
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from avlm.errors import LayoutError

NAME = "avlm"
"""The implementation's name: ``attn_implementation="avlm"``."""


def register() -> None:
    """Make ``attn_implementation="avlm"`` known to transformers. Calling it twice changes nothing."""
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def packed_kwargs(lengths: Iterable[int], device: torch.device) -> dict[str, Any]:
    """What a model's forward needs to know about the borders in a row.

    Args:
        lengths: Tokens of each sample, in order.
        device: Where the model is.

    Returns:
        Keyword arguments named as transformers names them for flash attention.
    """
    lengths = tuple(lengths)
    edges = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
    longest = max(lengths)
    return {
        "cu_seq_lens_q": edges,
        "cu_seq_lens_k": edges,
        "max_length_q": longest,
        "max_length_k": longest,
        "row_lengths": lengths,  # the same borders without a copy from the device in every layer
    }


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within each sample of a row; plain SDPA when there are no borders.

    Args:
        query: (1, H, T, D) for a packed row.
        key, value: (1, K, T, D).
        attention_mask: Ignored in a packed row, whose mask is its borders.
        kwargs: ``cu_seq_lens_q`` makes the row packed; ``sliding_window``, ``softcap`` and ``s_aux`` (attention
            sinks) are honoured.

    Returns:
        Output of shape (1, T, H, D), and no attention weights.

    Raises:
        LayoutError: The model asks for an attention bias, which cannot be cut at borders.
    """
    borders = kwargs.get("cu_seq_lens_q")
    if borders is None:
        sdpa = AttentionInterface()["sdpa"]
        output, _ = sdpa(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
        return output, None
    if kwargs.get("position_bias") is not None:
        raise LayoutError(
            f"{type(module).__name__} adds a bias to its attention, which cannot be cut at the borders of a packed row. "
            "Run this model on padded rows"
        )
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window, softcap, sinks = kwargs.get("sliding_window"), kwargs.get("softcap"), kwargs.get("s_aux")
    lengths = kwargs.get("row_lengths") or tuple(torch.diff(borders).tolist())
    output = torch.empty_like(query)
    for index, counts in _groups(lengths):
        index = index.to(query.device)
        attended = _attend_group(query, key, value, index, counts, causal, window, scale, dropout, softcap, sinks)
        inside = _inside(counts, index.shape[1], query.device)
        output = output.index_copy(2, index[inside], attended.permute(1, 0, 2, 3)[:, inside].unsqueeze(0))
    return output.transpose(1, 2), None


@lru_cache(maxsize=256)
def _groups(lengths: tuple[int, ...]) -> tuple[tuple[Tensor, tuple[int, ...]], ...]:
    """Gather samples of about the same length, so that little is padded.

    Returns:
        For each group an index (G, L) into the row (padding points at the sample's first token) and the true lengths.
    """
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    groups: list[list[int]] = []
    for i in order:
        if not lengths[i]:
            continue
        if groups and lengths[i] * 4 >= lengths[groups[-1][0]] * 3:
            groups[-1].append(i)
        else:
            groups.append([i])
    found = []
    for members in groups:
        longest = lengths[members[0]]
        offsets = torch.arange(longest)
        counts = tuple(lengths[i] for i in members)
        index = torch.tensor([starts[i] for i in members])[:, None] + offsets
        inside = offsets < torch.tensor(counts)[:, None]
        found.append((torch.where(inside, index, index[:, :1]), counts))
    return tuple(found)


def _inside(counts: tuple[int, ...], longest: int, device: torch.device) -> Tensor:
    """bool (G, L): which places of a group are real."""
    return torch.arange(longest, device=device) < torch.tensor(counts, device=device)[:, None]


def _attend_group(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index_GL: Tensor,
    counts: tuple[int, ...],
    causal: bool,
    window: int | None,
    scale: float,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of the samples of one group, (G, H, L, D)."""
    q, k, v = (t[0][:, index_GL].transpose(0, 1) for t in (query, key, value))
    longest = index_GL.shape[1]
    same = counts[-1] == longest
    banded = window is not None and window < longest
    mask = None
    if banded or not (causal or same) or softcap is not None or sinks is not None:
        # Causal rows padded at their end need no mask: what is real never looks that far.
        mask = _mask(counts, longest, causal, window, query.device)
    if softcap is not None or sinks is not None:
        return _explicit(q, k, v, mask, scale, dropout, softcap, sinks)
    return F.scaled_dot_product_attention(
        q, k, v, mask, dropout, is_causal=causal and mask is None, scale=scale, enable_gqa=k.shape[1] != q.shape[1]
    )


def _mask(counts: tuple[int, ...], longest: int, causal: bool, window: int | None, device: torch.device) -> Tensor:
    """bool (G, 1, L, L): who may look at whom. Padding looks at itself, so that no row is empty."""
    at = torch.arange(longest, device=device)
    allowed = _inside(counts, longest, device)[:, None, None, :].expand(-1, 1, longest, -1)
    if causal:
        allowed = allowed & (at[:, None] >= at)
    if window is not None:
        allowed = allowed & ((at[:, None] - at).abs() < window)
    return allowed | torch.eye(longest, dtype=torch.bool, device=device)


def _explicit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Softmax written out, for what SDPA has no argument for (Gemma 2's soft cap, gpt-oss's sinks)."""
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = (q @ k.transpose(-1, -2)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        sink = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], 1)
        weights = torch.cat([scores, sink.to(scores.dtype)], -1).softmax(-1, dtype=torch.float32)[..., :-1]
    else:
        weights = scores.softmax(-1, dtype=torch.float32)
    return F.dropout(weights.to(v.dtype), dropout) @ v
