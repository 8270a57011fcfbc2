"""How the language model reads rows: packed where it can be, side by side where it must be.

Shapes in this file:
    B  rows or prompts    T  token positions    D  language-model width
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import ModelOutput

from avlm.errors import LayoutError
from avlm.models import attention


def read_once(
    reader: nn.Module, embeds: Tensor, logits_to_keep: int | Tensor | None, kwargs: dict[str, Any]
) -> ModelOutput:
    """One pass, with logits only where they are wanted, whether or not the language model knows how to do that."""
    knows = logits_to_keep is not None and "logits_to_keep" in inspect.signature(reader.forward).parameters
    output: ModelOutput = reader(
        inputs_embeds=embeds, **kwargs, **({"logits_to_keep": logits_to_keep} if knows else {})
    )  # fmt: skip
    if logits_to_keep is not None and not knows:
        output["logits"] = _keep(output["logits"], logits_to_keep)
    return output


def borders(embeds: Tensor, lengths: list[int], calls: list[str] | None) -> dict[str, Any]:
    """What tells a language model of the samples in a row, which has no mask: its borders are its mask.

    transformers would build a mask of T x T from the positions, for those families that hand it the positions. Its door
    for a mask made elsewhere (four dimensions, passed on as it is) keeps it from doing so. It is one for every token,
    which a mixture's balance loss counts by.
    """
    borders = attention.packed_kwargs(lengths, embeds.device)
    if calls is not None:
        borders["packed_calls"] = calls
    return {**borders, "attention_mask": embeds.new_ones(1, 1, 1, embeds.shape[1])}


def read_padded(
    reader: nn.Module,
    embeds: Tensor,
    lengths: list[int],
    logits_to_keep: int | Tensor | None,
    kwargs: dict[str, Any],
) -> ModelOutput:
    """A packed row through a language model that must have its samples side by side."""
    rows = pad_sequence(list(embeds[0].split(lengths)), batch_first=True)
    inside = torch.arange(rows.shape[1], device=rows.device) < torch.tensor(lengths, device=rows.device)[:, None]
    positions = pad_sequence(list(kwargs["position_ids"][0].split(lengths)), batch_first=True)
    output = read_once(reader, rows, None, {**kwargs, "attention_mask": inside.long(), "position_ids": positions})
    for name in ("logits", "last_hidden_state"):
        if output.get(name) is not None:
            output[name] = output[name][inside][None]
    if output.get("hidden_states") is not None:
        output["hidden_states"] = tuple(states[inside][None] for states in output["hidden_states"])
    if output.get("router_logits") is not None:
        output["router_logits"] = tuple(layer[inside.flatten()] for layer in output["router_logits"])
    if logits_to_keep is not None:
        output["logits"] = _keep(output["logits"], logits_to_keep)
    return output


def refuse_mask(attention_mask: Tensor | None) -> None:
    """A packed row is walled off by its lengths alone, so a mask that hides something in it would do nothing.

    Raises:
        LayoutError: There is one.
    """
    if attention_mask is not None and not bool((attention_mask == 1).all()):
        raise LayoutError(
            "attention_mask hides tokens of a packed row, and row_lengths alone say who sees whom in one, so the mask "
            "would do nothing. Leave row_lengths out for a padded batch, or attention_mask for a packed row"
        )


def checked_lengths(row_lengths: Sequence[int], embeds: Tensor) -> list[int]:
    lengths = [int(length) for length in row_lengths if length]
    if embeds.shape[0] != 1 or sum(lengths) != embeds.shape[1]:
        raise LayoutError(
            f"row_lengths add up to {sum(lengths)} tokens, and the batch has {embeds.shape[0]} rows of "
            f"{embeds.shape[1]}. A packed batch is one row whose samples lie end to end"
        )
    return lengths


def _keep(logits: Tensor, positions: int | Tensor) -> Tensor:
    """What `logits_to_keep` means, for a language model that does not know it."""
    if isinstance(positions, int):
        return logits[:, -positions:] if positions else logits
    return logits[:, positions]
