"""The language model's vocabulary grows: which row each token begins with.

The tokenizer is the model's own with tokens added (words, placeholders), or another one,
as VITA's of 51,747 tokens for Mixtral's 32,000. A token that the model knows keeps its
row, wherever its number is now; a new one begins with the mean of all rows or of its
pieces' rows. Nothing begins with noise, in a table with room to spare neither.

Shapes in this file:
    V  rows of a table    D  their width

Source:
    Mean of the old rows: Hewitt (2021), "Initializing New Word Embeddings for Pretrained Language Models". Mean of the
    pieces' rows: as for added vocabulary in Chinese-LLaMA (arXiv:2304.08177) and before it in domain adaptation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

CHUNK = 8192
"""Rows that are read at a time in full precision."""

Beginning = Sequence[int]
"""Old rows whose mean a row begins with; none stands for all of them."""


def fit_vocabulary(
    model: PreTrainedModel,
    own: PreTrainedTokenizerBase,
    tokenizer: PreTrainedTokenizerBase,
    init: Literal["mean", "pieces"],
) -> None:
    """Give a released language model the rows that a tokenizer needs. Its tables never shrink.

    Args:
        model: Its embeddings and its head are changed in place; tied ones stay tied.
        own: The tokenizer that it was trained with.
        tokenizer: The one that it is to have.
        init: What a new token begins with.
    """
    rows = int(model.get_input_embeddings().num_embeddings)
    begins = beginnings(own, tokenizer, rows, init)
    if not begins:
        return
    known = sorted(i for i in set(own.get_vocab().values()) if i < rows)
    values = [_values(table, begins, known) for table in _tables(model)]
    needed = max(tokenizer.get_vocab().values()) + 1
    if needed > rows:
        model.resize_token_embeddings(needed, mean_resizing=False)
    at = torch.tensor(list(begins))
    with torch.no_grad():
        for table, new in zip(_tables(model), values, strict=True):
            table[at.to(table.device)] = new.to(table)
    _follow_ids(model, own, tokenizer)


def beginnings(
    own: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase, rows: int, init: Literal["mean", "pieces"]
) -> dict[int, Beginning]:
    """For every row that does not stay as it is, the old rows whose mean it begins with.

    Args:
        rows: V of the released tables, which may be more than ``own`` has tokens, or fewer.
    """
    old, new = own.get_vocab(), tokenizer.get_vocab()
    begins: dict[int, Beginning] = {}
    for token, number in new.items():
        before = old.get(token)
        if before is None or before >= rows:
            begins[number] = _pieces(token, own, tokenizer, rows) if init == "pieces" else ()
        elif before != number:
            begins[number] = (before,)
    free = {*old.values(), *range(rows, max(new.values()) + 1)} - set(new.values())
    return begins | dict.fromkeys(free, ())  # no token's any more, or yet: an average is no likely answer


def _pieces(token: str, own: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase, rows: int) -> tuple[int, ...]:
    """What the old tokenizer made of a new token's text; nothing where that is no whole text (a byte of a letter)."""
    text = token if token in tokenizer.get_added_vocab() else tokenizer.convert_tokens_to_string([token])
    if not text or "\N{REPLACEMENT CHARACTER}" in text:
        return ()
    return tuple(i for i in own(text, add_special_tokens=False)["input_ids"] if i < rows)


def _tables(model: PreTrainedModel) -> list[Tensor]:
    """Everything with a row for each token: the embeddings, and where it has its own, the head and its bias."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    tables = [embeddings.weight]
    if head is not None and head.weight is not embeddings.weight:
        tables.append(head.weight)
    if head is not None and getattr(head, "bias", None) is not None:
        tables.append(head.bias)
    return tables


@torch.no_grad()
def _values(table: Tensor, begins: dict[int, Beginning], known: Sequence[int]) -> Tensor:
    """The rows to begin with (changed, D), in single precision; a row that only moves keeps its bits."""
    average: Tensor | None = None
    found = []
    for sources in begins.values():
        if sources:
            found.append(table[list(sources)].float().mean(0))
            continue
        if average is None:
            chunks = torch.tensor(known, device=table.device).split(CHUNK)
            average = torch.stack([table[chunk].sum(0, dtype=torch.float32) for chunk in chunks]).sum(0) / len(known)
        found.append(average)
    return torch.stack(found)


def _follow_ids(model: PreTrainedModel, own: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase) -> None:
    """Settings name begin, end and pad by number. Where tokens got other numbers they name the same tokens again."""
    new = tokenizer.get_vocab()
    names = {number: token for token, number in own.get_vocab().items()}
    if all(new.get(token, number) == number for number, token in names.items()):
        return

    def now(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [number for number in map(now, value) if number is not None] or None
        return new.get(names.get(value, ""))

    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for settings in (model.config, model.generation_config):
            before = getattr(settings, name, None)
            if before is not None:
                followed = now(before)
                setattr(settings, name, getattr(tokenizer, name) if followed is None else followed)
    embeddings = model.get_input_embeddings()
    if embeddings.padding_idx is not None:
        embeddings.padding_idx = model.config.pad_token_id
