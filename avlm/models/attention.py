"""Attention over packed rows, for transformers' attention interface.

A row holds many samples end to end, and no token may look across a border. The
borders come down as ``cu_seq_lens_q``, as they do for flash attention, so any
language model whose attention goes through the interface can be packed; `can_pack`
and `proven` say whether it does. Without borders this is transformers' own SDPA
attention, mask and all, with soft caps and sinks honoured too.

Shapes in this file:
    H  heads    K  key/value heads    T  tokens in the row    D  head width
    G  samples of about the same length    L  the longest of them
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from inspect import signature
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from avlm.errors import LayoutError
from avlm.models.softmax import How, explicit

varlen_attn: Callable[..., Any] | None
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None
if varlen_attn is not None and not {"window_size", "enable_gqa", "scale"} <= signature(varlen_attn).parameters.keys():
    varlen_attn = None  # torch 2.10's and 2.11's has no windows and no grouped heads

NAME = "avlm"
"""The implementation's name: ``attn_implementation="avlm"``."""


def register(function: Callable[..., Any] | None = None) -> None:
    """Make ``attn_implementation="avlm"`` known to transformers. Calling it twice changes nothing.

    Args:
        function: What it stands for, if not `packed_attention` as it is.
    """
    AttentionInterface.register(NAME, function or packed_attention)
    AttentionMaskInterface.register(NAME, AttentionMaskInterface()["sdpa"])


def use(model: PreTrainedModel) -> None:
    """Give a language model our attention, where its layers can be packed; the others keep their own."""
    register()
    if can_pack(model):
        model.set_attn_implementation(NAME)


def can_pack(model: PreTrainedModel) -> bool:
    """Whether a language model's samples can be walled off in a row, as far as its own description tells.

    A state that runs along the row (Mamba, linear attention, convolutions) leaks from sample to sample, and attention
    whose pattern stands in the mask alone (Llama 4's chunks) loses it.
    """
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    attends = layers <= {"full_attention", "sliding_attention", "attention"}
    return attends and bool(model._supports_attention_backend) and not model._is_stateful


def proven(calls: list[str], model: PreTrainedModel) -> bool:
    """Whether in a packed pass every layer handed the borders to `packed_attention`; some families drop them."""
    return len(calls) >= int(model.config.get_text_config().num_hidden_layers)


@dataclass(frozen=True, slots=True, eq=False)
class RowLengths:
    """Tokens of each sample of a row, as one thing: numbers by themselves would be looked at by torch.compile, which
    would make other code for every number of samples."""

    tokens: tuple[int, ...]


def packed_kwargs(lengths: Iterable[int], device: torch.device) -> dict[str, Any]:
    """What a model's forward needs to know about the borders in a row.

    Args:
        lengths: Tokens of each sample, in order.
        device: Where the model is.

    Returns:
        Keyword arguments named as transformers names them for flash attention.
    """
    lengths = tuple(int(length) for length in lengths)
    edges = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
    longest = max(lengths)
    return {
        "cu_seq_lens_q": edges,
        "cu_seq_lens_k": edges,
        "max_length_q": longest,
        "max_length_k": longest,
        "row_lengths": RowLengths(lengths),  # the same borders without a copy from the device in every layer
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
            sinks) are honoured. ``packed_calls``, a list, is told of every call. ``slots``, a `slots.Step`, makes it
            attention over slots, whose keys and values then come whole.

    Returns:
        Output of shape (1, T, H, D), and no attention weights.

    Raises:
        LayoutError: The borders do not fit the row, or the model asks for an attention bias, which cannot be cut.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    how = How(causal, kwargs.get("sliding_window"), scale, dropout, kwargs.get("softcap"), kwargs.get("s_aux"))
    borders, step = kwargs.get("cu_seq_lens_q"), kwargs.get("slots")
    if step is not None:
        _refuse_bias(module, kwargs)
        return step.attend(query, key, value, how), None
    if borders is None:
        if how.written_out():
            mask = _plain_mask(attention_mask, query, key, causal)
            return explicit(query, key, value, mask, how).transpose(1, 2).contiguous(), None
        sdpa = AttentionInterface()["sdpa"]
        output, _ = sdpa(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
        return output, None
    _refuse_bias(module, kwargs)
    given = kwargs.get("row_lengths")
    lengths = tuple(torch.diff(borders).tolist()) if given is None else given.tokens
    _check_row(lengths, query, key)
    if kwargs.get("packed_calls") is not None:
        kwargs["packed_calls"].append(type(module).__name__)
    if _takes_varlen(query, value, how):
        return _varlen(query, key, value, borders, max(lengths), how)[None], None
    groups, order = _groups(tuple(lengths), query.device)
    if order is None:
        return _one_by_one(query, key, value, lengths, how)[None], None
    rows = [t[0].transpose(0, 1) for t in (query, key, value)]
    found = []
    for index, inside in groups:
        # Not `row[index]`, whose gradient is added up one number at a time on a processor.
        q, k, v = (row.index_select(0, index.flatten()).unflatten(0, index.shape).transpose(1, 2) for row in rows)
        side_by_side = _attend(q, k, v, inside, how).transpose(1, 2).flatten(0, 1)
        found.append(side_by_side.index_select(0, inside.flatten().nonzero().squeeze(1)))
    return torch.cat(found).index_select(0, order)[None], None


def _refuse_bias(module: torch.nn.Module, kwargs: dict[str, Any]) -> None:
    if kwargs.get("position_bias") is not None:
        raise LayoutError(
            f"{type(module).__name__} adds a bias to its attention, which cannot be cut at the borders of a packed "
            "row. Run this model on padded rows"
        )


def _one_by_one(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], how: How) -> Tensor:
    """Attention of each sample of a row by itself, (T, H, D): nothing is gathered, padded or masked."""
    samples = zip(*(t.split(list(lengths), 2) for t in (query, key, value)), strict=True)
    return torch.cat([_attend(q, k, v, None, how).transpose(1, 2)[0] for q, k, v in samples if q.shape[2]])


def _takes_varlen(query: Tensor, value: Tensor, how: How) -> bool:
    """Whether torch's kernel for rows of samples takes it: half precision on CUDA, where torch has it."""
    half = query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] == value.shape[-1]
    plain = not how.written_out() and not how.dropout and query.shape[-1] <= 256
    return query.is_cuda and half and plain and varlen_attn is not None


def _varlen(query: Tensor, key: Tensor, value: Tensor, borders: Tensor, longest: int, how: How) -> Tensor:
    """The whole row in one call of torch's flash attention, (T, H, D): nothing is gathered, padded or masked."""
    assert varlen_attn is not None
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    # A window of n sees n - 1 tokens before itself; -1 is no limit.
    before = -1 if how.window is None else how.window - 1
    output: Tensor = varlen_attn(
        q, k, v, borders, borders, longest, longest, scale=how.scale,
        window_size=(before, 0 if how.causal else before), enable_gqa=k.shape[1] != q.shape[1],
    )  # fmt: skip
    return output


def _check_row(lengths: tuple[int, ...], query: Tensor, key: Tensor) -> None:
    """Borders must cut exactly the one row that came; anything else would leave places without a value."""
    rows, tokens = query.shape[0], query.shape[2]
    if rows != 1 or sum(lengths) != tokens or key.shape[2] != tokens:
        raise LayoutError(
            f"samples of {sum(lengths)} tokens in all were announced for {rows} rows of {tokens} tokens with "
            f"{key.shape[2]} keys. A packed batch is one row, its lengths add up to it, and it has no cache"
        )


def _plain_mask(attention_mask: Tensor | None, query: Tensor, key: Tensor, causal: bool) -> Tensor | None:
    """The mask of an unpacked batch: what transformers made, or the causal one that it left to SDPA."""
    if attention_mask is not None or not causal or query.shape[2] == 1:
        return attention_mask
    at = torch.arange(key.shape[2], device=query.device)
    return (at[-query.shape[2] :, None] >= at)[None, None]


FEW = 128
"""Tokens of a sample, on average, from which on each sample is attended to by itself, without being gathered."""


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # what is kept is used in training too, whoever asked first
def _groups(lengths: tuple[int, ...], device: torch.device) -> tuple[tuple[tuple[Tensor, Tensor], ...], Tensor | None]:
    """Gather short samples of about the same length, so that there are few calls and little is padded.

    Returns:
        For each group an index (G, L) into the row (padding points at the sample's first token), and which places of it
        are real: bool (G, L); and where in the groups, end to end without padding, each of the row's tokens is: None
        where samples are better taken one by one. The layers of a model ask for the same groups one after the other.
    """
    starts = list(accumulate(lengths, initial=0))
    order = sorted((i for i, length in enumerate(lengths) if length), key=lambda i: -lengths[i])
    groups: list[list[int]] = []
    for i in order:
        if groups and lengths[i] * 4 >= lengths[groups[-1][0]] * 3:
            groups[-1].append(i)
        else:
            groups.append([i])
    if starts[-1] >= FEW * len(order) or len(groups) == len(order):
        return (), None
    found = []
    for members in groups:
        longest = lengths[members[0]]
        offsets = torch.arange(longest, device=device)
        index = torch.tensor([starts[i] for i in members], device=device)[:, None] + offsets
        inside = offsets < torch.tensor([lengths[i] for i in members], device=device)[:, None]
        found.append((torch.where(inside, index, index[:, :1]), inside))
    gathered = torch.cat([index[inside] for index, inside in found])
    return tuple(found), gathered.argsort()


def _attend(q: Tensor, k: Tensor, v: Tensor, inside_GL: Tensor | None, how: How) -> Tensor:
    """Attention of samples side by side, (G, H, L, D), whose real places are told unless they all are."""
    longest = q.shape[2]
    banded = how.window is not None and how.window < longest
    mask = None
    if banded or how.written_out() or (not how.causal and inside_GL is not None):
        # Causal rows padded at their end need no mask: what is real never looks that far.
        whole = q.new_ones(1, longest, dtype=torch.bool) if inside_GL is None else inside_GL
        mask = _mask(whole, how.causal, how.window)
    if how.written_out():
        return explicit(q, k, v, mask, how)
    return F.scaled_dot_product_attention(
        q, k, v, mask, how.dropout, is_causal=how.causal and mask is None, scale=how.scale,
        enable_gqa=k.shape[1] != q.shape[1],
    )  # fmt: skip


def _mask(inside_GL: Tensor, causal: bool, window: int | None) -> Tensor:
    """bool (G, 1, L, L): who may look at whom. Padding looks at itself, so that no row is empty."""
    longest = inside_GL.shape[1]
    at = torch.arange(longest, device=inside_GL.device)
    allowed = inside_GL[:, None, None, :].expand(-1, 1, longest, -1)
    if causal:
        allowed = allowed & (at[:, None] >= at)
    if window is not None:
        allowed = allowed & ((at[:, None] - at).abs() < window)
    return allowed | torch.eye(longest, dtype=torch.bool, device=at.device)
