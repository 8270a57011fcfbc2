"""How the language model reads a running batch, token by token.

Two ways, and the engine takes the first that is right for the language model:

    SlotReader     each answer in a slot of its own; join, leave and reuse of what was read cost nothing
    CohortReader   those that joined together go on together, padded, in the cache that the language model makes for
                   itself: for states that cannot be cut (Mamba), and whatever else is no plain attention

Shapes in this file:
    B  answers that can have their next token    V  vocabulary    D  language-model width    T  tokens of a step
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import Cache
from transformers.utils import logging

from avlm.errors import AvlmError
from avlm.inference.prefixes import Prefix, Prefixes, closest, read, read_on
from avlm.inference.prompts import Prompt, Prompts
from avlm.models import attention
from avlm.models.modeling import AvlmForConditionalGeneration
from avlm.models.products import fast_products, wide
from avlm.models.reading import read_once
from avlm.models.slots import Run, Slots, Step
from avlm.models.vectors import FEW
from avlm.models.written import product_of

logger = logging.get_logger(__name__)

AT_ONCE = 1024
"""Tokens of prompts that are read in one step, so that answers that are running wait for no long one."""
WORTH = 8
"""Tokens in common from which on what was read before is copied rather than read again."""

WORTH_WAITING = 64
"""Tokens that somebody else is reading just now from which on it is better to wait for them."""


class Reading(Protocol):
    """What a reader has to know of a request."""

    @property
    def prompt(self) -> Prompt: ...
    @property
    def tokens(self) -> list[int]:
        """Of the answer until now."""

    kept_tokens: int


class UnfitError(Exception):
    """A reader is not right for a language model."""


class Reader(Protocol):
    """Reads what requests ask for."""

    def join(self, request: Any) -> None:
        """A request comes in; it is read from the next pass on."""

    def drop(self, request: Any) -> None:
        """A request is gone."""

    def read(self) -> tuple[list[Any], Tensor]:
        """One pass.

        Returns:
            Those that can have their next token, and logits (B, V) of it.
        """


def fits_slots(model: AvlmForConditionalGeneration) -> bool:
    """Whether answers may stand in slots, as far as a language model's own description tells."""
    language = model.language_model
    config = language.config.get_text_config()
    known = model.model.takes_slots is not False
    return (
        known and config._attn_implementation == attention.NAME and attention.can_pack(language) and not _moves(config)
    )


def _moves(config: Any) -> bool:
    """Whether positions are turned by how long the longest answer of a batch is, so that each must be read alone."""
    settings = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in settings.values() if isinstance(value, dict)]
    return any(one.get("rope_type") in ("dynamic", "longrope") for one in (settings, *nested))


@dataclass(slots=True, eq=False)
class _Seat:
    """A request in a slot."""

    request: Any
    past: int = 0
    """Tokens that its slot has read."""
    rest: Tensor | None = None
    """Embeddings of what is still to be read of its prompt; None before that has begun."""


class SlotReader:
    """Reads in slots. Those that are answering have the first ones, then come those whose prompts are being read.

    Args:
        kept_bytes: For keys and values that are remembered.
    """

    def __init__(self, model: AvlmForConditionalGeneration, prompts: Prompts, kept_bytes: int) -> None:
        self.model, self.prompts = model, prompts
        self.language, self.head, self.written = model.language_model, model.plain_head(), model.written_out()
        self.to_logits = self.head if self.written is None or self.head is None else product_of(self.head) or self.head
        self.decoder, self.table, self.device = self.language.get_decoder(), model.get_input_embeddings(), model.device
        self.wide = self.device.type == "cpu" and wide(self.language)
        self.prefixes = Prefixes(kept_bytes)
        self.slots = Slots(int(self.language.config.get_text_config().num_hidden_layers))
        self.came: list[Reading] = []
        """Those that have no slot yet."""
        self.seats: list[_Seat] = []
        self.answering = 0

    def join(self, request: Reading) -> None:
        self.came.append(request)

    def drop(self, request: Reading) -> None:
        self.came = [one for one in self.came if one is not request]
        number = next((i for i, seat in enumerate(self.seats) if seat.request is request), None)
        if number is None:
            return
        self._remember(number)
        if number < self.answering:  # the last of those that answer takes the place
            self.answering -= 1
            self._move(self.answering, number)
            number = self.answering
        self._move(len(self.seats) - 1, number)
        self.seats.pop()

    def _move(self, source: int, target: int) -> None:
        if source != target:
            self.slots.copy(source, target, self.seats[source].past)
            self.seats[target] = self.seats[source]

    def _remember(self, number: int) -> None:
        """Keep what was read in a slot, if it is not known already."""
        seat = self.seats[number]
        if not self.prefixes.capacity or seat.past < WORTH:
            return
        whole = read_on(seat.request.prompt, seat.request.tokens, seat.past)
        self.prefixes.remember(whole, self.slots.seen(number, seat.past))

    # ------------------------------------------------------------ one pass

    def read(self) -> tuple[list[Any], Tensor]:
        self._begin()
        runs, parts, left = [], [], AT_ONCE
        for number, seat in enumerate(self.seats[self.answering :], self.answering):
            assert seat.rest is not None
            count = min(left, len(seat.rest))
            if count:
                runs.append(Run(number, seat.past, count, ends=count == len(seat.rest)))
                parts.append(seat.rest[:count])
                left -= count
        singles = self.seats[: self.answering]
        step = Step([seat.past for seat in singles], runs, self.device)
        self.slots.reserve(len(self.seats), step.needed)
        if singles:
            last = torch.tensor([seat.request.tokens[-1] for seat in singles], device=self.device)
            parts.insert(0, self.table(last))
        with fast_products(self.wide and step.tokens > FEW):
            logits = self._forward(parts[0] if len(parts) == 1 else torch.cat(parts), step)
        return self._behind(runs, len(step.ends)), logits

    def _behind(self, runs: Sequence[Run], ready: int) -> list[Any]:
        """Note what was read; those that can have a token now."""
        for seat in self.seats[: self.answering]:
            seat.past += 1
        for run in runs:
            seat = self.seats[run.slot]
            seat.past += run.count
            seat.rest = None if seat.rest is None else seat.rest[run.count :]
        self.answering = ready
        return [seat.request for seat in self.seats[:ready]]

    def _begin(self) -> None:
        """Give slots to those that came in, find what is remembered of their prompts, and embed the rest of them."""
        seated: list[_Seat] = []
        waiting = []
        for request in self.came:
            tokens, found = self._known(request.prompt)
            if self._soon_known(request.prompt) >= tokens + WORTH_WAITING:
                waiting.append(request)
                continue
            seat = _Seat(request)
            self.seats.append(seat)
            seated.append(seat)
            if tokens >= WORTH:
                self._recall(len(self.seats) - 1, tokens, found)
                seat.past = request.kept_tokens = tokens
        self.came = waiting
        embeds = self.prompts.embed([(seat.request.prompt, seat.past) for seat in seated]) if seated else []
        for seat, rest in zip(seated, embeds, strict=True):
            seat.rest = rest

    def _known(self, prompt: Prompt) -> tuple[int, Prefix | int]:
        """How much of a prompt was read before, and where that is: remembered, or in a slot (its number).

        Never all of it: its last token makes the first logits.
        """
        if not self.prefixes.capacity:
            return 0, -1
        wanted = read(prompt, len(prompt) - 1)
        others = ((i, read(seat.request.prompt, seat.past)) for i, seat in enumerate(self.seats) if seat.past)
        beside, neighbour = closest(wanted, others)
        tokens, prefix = self.prefixes.longest(wanted)
        return (tokens, prefix) if prefix is not None and tokens > beside else (beside, neighbour)

    def _soon_known(self, prompt: Prompt) -> int:
        """How much of a prompt others are reading just now."""
        if not self.prefixes.capacity:
            return 0
        others = (seat.request.prompt for seat in self.seats[self.answering :])
        wanted = read(prompt, len(prompt) - 1)
        return closest(wanted, ((i, read(other, len(other))) for i, other in enumerate(others)))[0]

    def _recall(self, number: int, tokens: int, found: Prefix | int) -> None:
        """Give a slot what was read before of its prompt."""
        self.slots.reserve(len(self.seats), tokens)
        if isinstance(found, Prefix):
            self.slots.put_in(number, self.prefixes.states(found, tokens), tokens)
        else:
            self.slots.copy(found, number, tokens)

    def _forward(self, embeds_TD: Tensor, step: Step) -> Tensor:
        """Logits (B, V) behind `step.ends`.

        Raises:
            UnfitError: Not every layer of the language model did as it should with the slots.
        """
        if self.written is not None or self.model.model.takes_slots:
            return self._pass(embeds_TD, step)
        for layer in self.slots.own:
            layer.written = 0
        try:
            logits = self._pass(embeds_TD, step)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except (AvlmError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise self._unfit(f"{type(error).__name__}: {error}") from error
        if not self.slots.proven(step):
            raise self._unfit("not every layer writes to its cache and attends through transformers' interface once")
        self.model.model.takes_slots = True
        return logits

    def _unfit(self, why: str) -> UnfitError:
        self.model.model.takes_slots = False
        logger.warning_once(
            f"{type(self.language).__name__} cannot have its answers in slots ({why}), so those that are asked for "
            "together are read as a padded batch: the same answers, more computing."
        )
        return UnfitError(why)

    def _pass(self, embeds_TD: Tensor, step: Step) -> Tensor:
        self.slots.step = step
        if self.written is not None and self.to_logits is not None:
            return self.to_logits(self.written.read(embeds_TD, step, self.slots)).float()
        whole = len(step.ends) == step.tokens
        index = None if whole else torch.tensor(step.ends, dtype=torch.long, device=self.device)
        if self.to_logits is None:
            kwargs = {**step.kwargs(embeds_TD, self.slots), "return_dict": True}
            kept: int | Tensor = 0 if index is None else index
            logits: Tensor = read_once(self.language, embeds_TD[None], kept, kwargs).logits[0]
            return logits.float()
        kwargs = step.kwargs(embeds_TD, self.slots)
        states = self.decoder(inputs_embeds=embeds_TD[None], return_dict=True, **kwargs).last_hidden_state[0]
        logits = self.to_logits(states if index is None else states[index])
        return logits.float()


@dataclass(slots=True, eq=False)
class _Cohort:
    """Requests that joined together, a row each."""

    rows: list[Any]
    """None where one is gone."""
    mask: Tensor | None = None
    """int64 (rows, tokens read); None before anything was."""
    cache: Cache | None = None


class CohortReader:
    """Reads those that joined together side by side, padded on the left, until the last of them has gone."""

    def __init__(self, model: AvlmForConditionalGeneration, prompts: Prompts) -> None:
        self.model, self.prompts = model, prompts
        self.alone = _moves(model.language_model.config.get_text_config())
        self.came: list[Reading] = []
        self.cohorts: list[_Cohort] = []

    def join(self, request: Reading) -> None:
        self.came.append(request)

    def drop(self, request: Reading) -> None:
        self.came = [one for one in self.came if one is not request]
        for cohort in self.cohorts:
            cohort.rows = [None if one is request else one for one in cohort.rows]
        self.cohorts = [cohort for cohort in self.cohorts if any(one is not None for one in cohort.rows)]

    def read(self) -> tuple[list[Any], Tensor]:
        self.cohorts += [_Cohort([one]) for one in self.came] if self.alone else [_Cohort(self.came)] * bool(self.came)
        self.came = []
        found = [self._pass(cohort) for cohort in self.cohorts]
        return [one for cohort in self.cohorts for one in cohort.rows], torch.cat(found)

    def _pass(self, cohort: _Cohort) -> Tensor:
        if cohort.mask is None:
            embeds, cohort.mask = self._side_by_side(cohort.rows)
        else:
            self._close_ranks(cohort)
            tokens = torch.tensor([[one.tokens[-1]] for one in cohort.rows], device=self.model.device)
            embeds = self.model.get_input_embeddings()(tokens)
            cohort.mask = torch.cat([cohort.mask, cohort.mask.new_ones(len(tokens), 1)], 1)
        positions = (cohort.mask.cumsum(1) - 1).clamp(min=0)[:, -embeds.shape[1] :]
        kwargs = {
            "attention_mask": cohort.mask,
            "position_ids": positions,
            "past_key_values": cohort.cache,
            "use_cache": True,
            "return_dict": True,
        }
        output = read_once(self.model.language_model, embeds, 1, kwargs)
        cohort.cache = output["past_key_values"]
        logits: Tensor = output["logits"]
        return logits[:, -1].float()

    def _side_by_side(self, requests: Sequence[Reading]) -> tuple[Tensor, Tensor]:
        """Embeddings of prompts, padded on the left, and a mask of what is real."""
        embeds = self.prompts.embed([(one.prompt, 0) for one in requests])
        longest = max(len(own) for own in embeds)
        rows = embeds[0].new_zeros(len(embeds), longest, embeds[0].shape[1])
        mask = torch.zeros(len(embeds), longest, dtype=torch.long, device=rows.device)
        for row, inside, own in zip(rows, mask, embeds, strict=True):
            row[longest - len(own) :] = own
            inside[longest - len(own) :] = 1
        return rows, mask

    def _close_ranks(self, cohort: _Cohort) -> None:
        """Leave the rows out that are gone."""
        assert cohort.mask is not None and cohort.cache is not None
        there = [i for i, one in enumerate(cohort.rows) if one is not None]
        if len(there) < len(cohort.rows):
            index = torch.tensor(there, device=cohort.mask.device)
            cohort.cache.reorder_cache(index)
            cohort.mask, cohort.rows = cohort.mask[index], [cohort.rows[i] for i in there]
