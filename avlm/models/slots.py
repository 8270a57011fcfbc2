"""Keys and values of several answers side by side, written in place, and attention over them.

transformers' own cache grows by copying all of itself for every token, pads its rows to one length, and cannot have a
row join or leave. Here each answer has a slot of its own in memory that is there already; all tokens of a step, one of
each running answer and any number of a prompt, go through the model as one row end to end, so nothing is padded.

Shapes in this file:
    S  slots    C  tokens that a slot has room for    L  tokens of the longest answer in a step
    T  tokens of a step    H  heads    K  key/value heads    G  heads to a key/value head    D  head width
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from avlm.models.softmax import How, explicit

Kept = list[tuple[Tensor, Tensor]]
"""For each layer the keys and the values (K, tokens, D) of some tokens."""
LEAST = 256
"""Tokens that a slot has room for at first."""


@dataclass(frozen=True, slots=True)
class Run:
    """Some tokens that one answer's slot reads in a step."""

    slot: int
    past: int
    """Tokens that it has read before."""
    count: int
    ends: bool = True
    """Whether it is known behind its last token what comes next, rather than in a later step."""


class Step:
    """Who reads what in one pass: first one token of each of the first slots, then runs of others.

    Args:
        pasts: How many tokens each of the first slots has read before.
        runs: What other slots read.
        device: Where the model is.
    """

    def __init__(self, pasts: Sequence[int], runs: Sequence[Run], device: torch.device) -> None:
        self.pasts, self.runs, self.device = list(pasts), list(runs), device
        self.longest = max(self.pasts, default=-1) + 1
        self.even = len(set(self.pasts)) <= 1
        self.tokens = len(self.pasts) + sum(run.count for run in runs)
        self.needed = max([self.longest, *(run.past + run.count for run in runs)])
        """Tokens that a slot must have room for."""
        self.calls = 0
        """How often attention over the slots was asked for."""
        self._where: dict[tuple[int, int], Tensor] = {}
        self._masks: dict[tuple[int, int | None, torch.dtype], Tensor | None] = {}

    @cached_property
    def slots_T(self) -> Tensor:  # noqa: N802
        """The slot of each token."""
        slots = list(range(len(self.pasts)))
        for run in self.runs:
            slots += [run.slot] * run.count
        return torch.tensor(slots, device=self.device)

    @cached_property
    def places_T(self) -> Tensor:  # noqa: N802
        """Position of each token in its own answer."""
        places = list(self.pasts)
        for run in self.runs:
            places += range(run.past, run.past + run.count)
        return torch.tensor(places, device=self.device)

    @cached_property
    def ends(self) -> list[int]:
        """Which of the step's tokens have something behind them that is wanted now: those of the first slots, and the
        last one of each run that ends."""
        found, done = list(range(len(self.pasts))), len(self.pasts)
        for run in self.runs:
            done += run.count
            if run.ends:
                found.append(done - 1)
        return found

    def of_ends(self) -> Step:
        """The same step as those tokens alone know it; what is before them has been written."""
        last = [Run(run.slot, run.past + run.count - 1, 1) for run in self.runs if run.ends]
        return Step(self.pasts, last, self.device)

    def single(self) -> bool:
        """Whether it is one token, of the answer in the first slot."""
        return len(self.pasts) == 1 and not self.runs

    def where(self, heads: int, room: int) -> Tensor:
        """Index (T * K,) of where each token's keys go, in slots laid out as (S, K, C) and taken as one list."""
        found = self._where.get((heads, room))
        if found is None:
            head = torch.arange(heads, device=self.device)
            found = ((self.slots_T[:, None] * heads + head) * room + self.places_T[:, None]).flatten()
            self._where[heads, room] = found
        return found

    def kwargs(self, embeds_TD: Tensor, slots: Slots) -> dict[str, Any]:
        """What a language model's forward needs to know, beside the embeddings of the step's tokens."""
        return {
            "position_ids": self.places_T[None],
            # A mask that was made elsewhere, as transformers knows it by its dimensions: none is made.
            "attention_mask": embeds_TD.new_ones(1, 1, 1, len(embeds_TD)),
            "past_key_values": slots,
            "use_cache": True,
            "slots": self,
        }

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, how: How) -> Tensor:
        """Attention of each token over what its own answer has read, as transformers has its tensors.

        Args:
            query: (1, H, T, D).
            keys, values: All slots, (S, K, C, D).

        Returns:
            (1, T, H, D).
        """
        self.calls += 1
        return self.attend_tokens(query[0].transpose(0, 1), keys, values, how)[None]

    def attend_tokens(self, q_THD: Tensor, keys: Tensor, values: Tensor, how: How) -> Tensor:
        """As `attend`: (T, H, D)."""
        start = len(self.pasts)
        if not self.runs:
            return self._singles(q_THD, keys, values, how)
        found = [self._singles(q_THD[:start], keys, values, how)] if start else []
        for number, run in enumerate(self.runs):
            own = q_THD[start : start + run.count].transpose(0, 1)[None]
            found.append(self._run(number, run, own, keys, values, how).transpose(1, 2)[0])
            start += run.count
        return found[0] if len(found) == 1 else torch.cat(found)

    def _singles(self, q_SHD: Tensor, keys: Tensor, values: Tensor, how: How) -> Tensor:
        """One token of each of the first slots: (S, H, D). Heads that share keys go as if they were several tokens."""
        slots, heads, _ = q_SHD.shape
        first = max(0, self.longest - how.window) if self.even and how.window is not None else 0
        k, v = keys[:slots, :, first : self.longest], values[:slots, :, first : self.longest]
        mask = None if self.even else self._mask(-1, how.window, q_SHD.dtype)
        if how.written_out():
            return explicit(q_SHD[:, :, None], k, v, mask, how).squeeze(2)
        q_SKGD = q_SHD.unflatten(1, (k.shape[1], heads // k.shape[1]))
        return F.scaled_dot_product_attention(q_SKGD, k, v, mask, scale=how.scale).flatten(1, 2)

    def _run(self, number: int, run: Run, query: Tensor, keys: Tensor, values: Tensor, how: How) -> Tensor:
        """Tokens of one answer: (1, H, count, D)."""
        total = run.past + run.count
        k, v = keys[run.slot, :, :total][None], values[run.slot, :, :total][None]
        mask = self._mask(number, how.window, query.dtype)
        if how.written_out():
            if mask is None and run.count > 1:
                mask = self._band(run, None)
            return explicit(query, k, v, mask, how)
        causal = mask is None and run.count > 1
        gqa = k.shape[1] != query.shape[1]
        return F.scaled_dot_product_attention(query, k, v, mask, is_causal=causal, scale=how.scale, enable_gqa=gqa)

    def _mask(self, number: int, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """Who sees whom in a run, or (number -1) in the first slots; None where torch needs no telling."""
        key = number, window, dtype
        if key not in self._masks:
            allowed = self._allowed(number, window)
            if allowed is not None:  # added to the scores, which every layer would make of it otherwise
                allowed = torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, -torch.inf)
            self._masks[key] = allowed
        return self._masks[key]

    def _allowed(self, number: int, window: int | None) -> Tensor | None:
        if number >= 0:
            run = self.runs[number]
            banded = window is not None and window < run.past + run.count
            plain = not run.past or run.count == 1
            return None if plain and not banded else self._band(run, window if banded else None)
        at = torch.arange(self.longest, device=self.device)
        last = self.places_T[: len(self.pasts), None]
        allowed = at <= last
        if window is not None:
            allowed &= at > last - window
        return allowed[:, None, None]

    def _band(self, run: Run, window: int | None) -> Tensor:
        """bool (count, tokens read behind it): each token sees itself and what is before it, in its window."""
        keys = torch.arange(run.past + run.count, device=self.device)
        own = keys[run.past :, None]
        allowed = keys <= own
        return allowed if window is None else allowed & (keys > own - window)


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values."""

    is_sliding = False

    def __init__(self, slots: Slots) -> None:
        super().__init__()
        self.slots = slots
        self.written = 0
        """How often it was written to."""
        self._seen: tuple[Tensor, np.ndarray, np.ndarray] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        # Zeros, since what a mask hides is multiplied all the same, and memory as it comes may hold what is no number.
        self.keys, self.values = (
            t.new_zeros(self.slots.count, t.shape[1], self.slots.room, t.shape[3]) for t in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the keys and values (1, K, T, D) of a step.

        Returns:
            Those of all slots (S, K, C, D), which attention takes apart again.
        """
        return self.write(key_states[0].transpose(0, 1), value_states[0].transpose(0, 1))

    def write(self, keys_TKD: Tensor, values_TKD: Tensor) -> tuple[Tensor, Tensor]:
        """As `update`, a token after the other."""
        if not self.is_initialized:
            self.lazy_initialization(*(t.transpose(0, 1)[None] for t in (keys_TKD, values_TKD)))
        assert self.slots.step is not None and self.keys is not None and self.values is not None
        self.written += 1
        where = self.slots.step.where(keys_TKD.shape[1], self.slots.room)
        self.keys.view(-1, keys_TKD.shape[2]).index_copy_(0, where, keys_TKD.flatten(0, 1))
        self.values.view(-1, values_TKD.shape[2]).index_copy_(0, where, values_TKD.flatten(0, 1))
        return self.keys, self.values

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values (K, C, D) of the first slot, as NumPy's arrays in the same memory, to be written to."""
        assert self.keys is not None and self.values is not None
        if self._seen is None or self._seen[0] is not self.keys:
            self._seen = self.keys, self.keys[0].numpy(), self.values[0].numpy()
        return self._seen[1:]

    def resize(self) -> None:
        """Take the size that the slots have now, with what is there."""
        self._seen = None
        if not self.is_initialized:
            return
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(self.slots.count, old.shape[1], self.slots.room, old.shape[3])
            new[: old.shape[0], :, : old.shape[2]] = old
            setattr(self, name, new)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots.room, 0

    def get_seq_length(self) -> int:
        return 0 if self.slots.step is None else self.slots.step.longest

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        """As `get_max_length` was called before transformers 5.17."""
        return -1


class Slots(Cache):
    """The cache of a running batch. It grows by doubling, in slots and in what each has room for.

    Args:
        layers: Of the language model.
    """

    def __init__(self, layers: int) -> None:
        self.count, self.room = 0, 0
        self.step: Step | None = None
        self.own = [SlotLayer(self) for _ in range(layers)]
        super().__init__(layers=list(self.own))

    def reserve(self, slots: int, tokens: int) -> None:
        """Make room for so many slots, each of so many tokens."""
        count, room = _doubled(self.count, slots, 1), _doubled(self.room, tokens, LEAST)
        if (count, room) != (self.count, self.room):
            self.count, self.room = count, room
            for layer in self.own:
                layer.resize()

    def proven(self, step: Step) -> bool:
        """Whether in the first step every layer wrote once, and attention was over the slots as often."""
        return all(layer.written == 1 for layer in self.own) and step.calls == len(self.own)

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Give a slot what the first tokens of another one left."""
        for layer in self.own:
            for states in (layer.keys, layer.values):
                states[target, :, :tokens] = states[source, :, :tokens]

    def seen(self, slot: int, tokens: int) -> Kept:
        """What the first tokens of a slot left, where it lies: until the next step, or until the slots grow."""
        return [(layer.keys[slot, :, :tokens], layer.values[slot, :, :tokens]) for layer in self.own]

    def put_in(self, slot: int, kept: Kept, tokens: int) -> None:
        """Give a slot what the first tokens of one left."""
        for layer, (keys, values) in zip(self.own, kept, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(keys[None], values[None])
            layer.keys[slot, :, :tokens] = keys[:, :tokens]
            layer.values[slot, :, :tokens] = values[:, :tokens]


def _doubled(size: int, wanted: int, least: int) -> int:
    size = max(size, least)
    while size < wanted:
        size *= 2
    return size
