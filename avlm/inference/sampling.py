"""How the next token is chosen: the settings of one answer, and the choice itself.

What is left out, and in which order, is as transformers' own logits processors do it: the repetition penalty, the
temperature, then the likeliest `top_k`, of these the likeliest that have `top_p` together, and of these those that are
at least `min_p` times as likely as the first. The draw is ours: one number of the answer's own generator, so an answer
drawn in a batch is the one that would have been drawn alone.

Shapes in this file:
    B  answers    V  vocabulary    C  candidates
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from avlm.errors import ConfigError

LARGEST_SEED = 2**63 - 1
FIRST = 256
"""Candidates that are looked at before all of a vocabulary is put in order."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen, and when there is no next one. Temperature 0 takes the likeliest one."""

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    """Choose among this many likeliest tokens; 0 among all."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that together have this probability (arXiv:1904.09751)."""
    min_p: float = 0.0
    """Leave out tokens that are less likely than this share of the likeliest one's probability (arXiv:2407.01082)."""
    repetition_penalty: float = 1.0
    """Divide the logits of tokens that have been read or said (multiply those below 0) by this (arXiv:1909.05858)."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer where they would begin."""
    seed: int = 0
    logprobs: int | None = None
    """How many alternatives to each token are told with their log probabilities; None: nothing is told."""

    def __post_init__(self) -> None:
        for wrong, message in (
            (self.max_tokens < 1, f"max_tokens={self.max_tokens} leaves no room for an answer. Use at least 1"),
            (
                not 0 <= self.temperature < math.inf,
                f"temperature={self.temperature} is not a number that logits can be divided by. "
                "Use 0 for the likeliest token, or more",
            ),
            (
                self.top_k < 0,
                f"top_k={self.top_k} is not a number of tokens to choose among. Use 0 for all of them, or more",
            ),
            (
                not 0 < self.top_p <= 1,
                f"top_p={self.top_p} is not a probability to choose within. Use more than 0 and at most 1",
            ),
            (
                not 0 <= self.min_p <= 1,
                f"min_p={self.min_p} is not a share of a probability. Use at least 0 and at most 1",
            ),
            (
                not 0 < self.repetition_penalty < math.inf,
                f"repetition_penalty={self.repetition_penalty} is not a number that logits can be divided by. "
                "Use 1 for none, or more",
            ),
            (
                isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop),
                f"stop={self.stop!r} is not a tuple of texts, each of at least one character, so an answer would end "
                "nowhere or at once. Give texts to end it at",
            ),
            (
                not 0 <= self.seed <= LARGEST_SEED,
                f"seed={self.seed} is not a seed that a generator takes. Use a whole number from 0 to {LARGEST_SEED}",
            ),
            (
                self.logprobs is not None and self.logprobs < 0,
                f"logprobs={self.logprobs} is not a number of alternatives. Use 0 for the token's own alone, or more",
            ),
        ):
            if wrong:
                raise ConfigError(message)

    def draws(self) -> bool:
        """Whether anything is left to chance."""
        return self.temperature > 0


class Choice:
    """How the tokens of one answer are chosen, one after the other.

    Args:
        sampling: The settings.
        read: Tokens of the prompt, which the repetition penalty counts as well.
    """

    def __init__(self, sampling: Sampling, read: Sequence[int] = ()) -> None:
        self.sampling = sampling
        self.generator = torch.Generator().manual_seed(sampling.seed) if sampling.draws() else None
        self.seen = set(read) if sampling.repetition_penalty != 1 else None

    def plain(self) -> bool:
        """Whether it is nothing but the likeliest token, so that many can be chosen at once."""
        return self.generator is None and self.seen is None

    def next(self, logits_V: Tensor) -> int:
        """The next token; it is remembered.

        Args:
            logits_V: float32; what may never be said is at minus infinity.
        """
        if self.seen is not None:
            logits_V = penalised(logits_V, self.seen, self.sampling.repetition_penalty)
        token = int(logits_V.argmax()) if self.generator is None else drawn(logits_V, self.sampling, self.generator)
        if self.seen is not None:
            self.seen.add(token)
        return token


def choose(logits_BV: Tensor, choices: Sequence[Choice]) -> list[int]:
    """The next token of each answer.

    Args:
        logits_BV: float32; what may never be said is at minus infinity.
    """
    if all(choice.plain() for choice in choices):
        found: list[int] = logits_BV.argmax(-1).tolist()
        return found
    return [choice.next(logits) for logits, choice in zip(logits_BV, choices, strict=True)]


def penalised(logits_V: Tensor, seen: set[int], penalty: float) -> Tensor:
    """Logits with those of the tokens that have been seen made smaller.

    Source:
        CTRL (arXiv:1909.05858, section 4.1), with the sign heeded, as `RepetitionPenaltyLogitsProcessor` does.
    """
    index = torch.tensor(sorted(seen), dtype=torch.long, device=logits_V.device)
    own = logits_V.index_select(0, index)
    return logits_V.index_copy(0, index, torch.where(own < 0, own * penalty, own / penalty))


def drawn(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """A token drawn by its probability among the candidates."""
    behind = logits_V - logits_V.max()  # at most 0, so that no temperature is too small
    scaled = (behind / max(sampling.temperature, 1e-30)).double()
    share = torch.rand((), generator=generator, dtype=torch.float64).to(scaled.device)
    if not sampling.top_k and sampling.top_p == 1 and not sampling.min_p:
        return _at(scaled.softmax(-1), share)
    weights, index = _candidates(scaled, sampling)
    return int(index[_at(weights, share)])


def _candidates(scaled_V: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Weights (C,) of the tokens that may be drawn, the likeliest first, and which ones they are."""
    size = len(scaled_V)
    count = min(sampling.top_k or size, size)
    whole = None if sampling.top_k else scaled_V.logsumexp(-1)  # of what top_p is a share of
    for looked_at in dict.fromkeys((min(FIRST, count), count)):
        ordered, index = scaled_V.topk(looked_at)
        of = ordered.logsumexp(-1) if whole is None and looked_at == count else whole
        if of is None:
            continue
        weights = (ordered - of).exp()
        keep = weights.cumsum(-1) - weights < sampling.top_p
        keep &= ordered >= ordered[0] + (math.log(sampling.min_p) if sampling.min_p else -math.inf)
        if looked_at == count or not bool(keep[-1]):
            break
    return weights[keep], index[keep]


def _at(weights_C: Tensor, share: Tensor) -> int:
    """Which of them has this share of their sum: their order makes up a line from 0 to 1."""
    line = weights_C.cumsum(-1)
    at = int(torch.searchsorted(line, share * line[-1], right=True))
    return min(at, int((weights_C > 0).nonzero()[-1]))
