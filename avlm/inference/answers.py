"""An answer as it comes: text that is safe to show, and what is told of each token.

Text is held back while it may still change: half of a character waits for the rest of its bytes, and what could be
the beginning of a stop string waits until it is none.
"""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

FEW = 3
"""Tokens whose text is remembered."""
TEXTS = 8192
"""Texts that are: some 450 bytes each."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """What the model thought of one token of an answer, before anything was left out or drawn."""

    token: str
    bytes: builtins.bytes
    logprob: float
    top: tuple[tuple[str, builtins.bytes, float], ...]
    """The likeliest tokens in its place, itself among them where it is one: text, bytes, log probability."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Some of an answer."""

    text: str
    """It can be shown: no half characters, and nothing that a stop string may still swallow."""
    tokens: tuple[int, ...] = ()
    """Those that were read since the last piece."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of the tokens, where they were asked for."""


class Decoder:
    """Tokens to text, a few of them from memory: the same ones come again and again."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._few = lru_cache(maxsize=TEXTS)(self._decoded)

    def __call__(self, ids: Sequence[int]) -> str:
        return self._few(tuple(ids)) if len(ids) <= FEW else self._decoded(ids)

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)) if ids else ""


class AnswerText:
    """The text of an answer, token by token.

    Args:
        decode: Makes text of tokens.
        stop: Texts that end it where they would begin.
    """

    def __init__(self, decode: Decoder, stop: Sequence[str] = ()) -> None:
        self._decode, self.stop = decode, tuple(stop)
        self.ids: list[int] = []
        self.stopped = False
        """Whether a stop string has been met."""
        self._text = ""
        self._shown = 0
        self._from = self._to = 0
        """Tokens that are decoded again with the next one, since some depend on what stands before them."""
        self._before = ""

    def add(self, token: int) -> str:
        """Take the next token.

        Returns:
            What can be shown now; often nothing.
        """
        self.ids.append(token)
        behind = self._decode(self.ids[self._from :])
        if len(behind) > len(self._before) and behind.startswith(self._before) and not behind.endswith("\ufffd"):
            self._text += behind[len(self._before) :]
            self._from, self._to = self._to, len(self.ids)
            self._before = self._decode(self.ids[self._from : self._to])
        return self._next(ended=False)

    def end(self) -> str:
        """There is no further token.

        Returns:
            What was held back.
        """
        if self.stopped:
            return ""
        whole = self._decode(self.ids)
        rest = self._decode(self.ids[self._from :])[len(self._before) :]
        self._text = whole if whole.startswith(self._text) else self._text + rest
        return self._next(ended=True)

    def shown(self) -> str:
        """All that was shown until now."""
        return self._text[: self._shown]

    def _next(self, *, ended: bool) -> str:
        waiting = self._text[self._shown :]
        met = [at for at in map(waiting.find, self.stop) if at >= 0]
        if met:
            self.stopped = True
            waiting = waiting[: min(met)]
        elif not ended:
            waiting = waiting[: len(waiting) - _held(waiting, self.stop)]
        self._shown += len(waiting)
        return waiting


def _held(text: str, stop: Sequence[str]) -> int:
    """How many characters at its end may be the beginning of a stop string."""
    longest = max((len(word) - 1 for word in stop), default=0)
    return next((n for n in range(min(longest, len(text)), 0, -1) if any(w.startswith(text[-n:]) for w in stop)), 0)


def told(
    logits_V: Tensor, token: int, count: int, never: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> TokenLogprob:
    """What the model thought of a token.

    Args:
        logits_V: float32, as the model gave them.
        count: How many alternatives are told.
        never: Tokens that are no alternative.
    """
    logprobs = logits_V.log_softmax(-1)
    allowed = logprobs.index_fill(0, torch.tensor(never, dtype=torch.long, device=logprobs.device), -torch.inf)
    values, index = allowed.topk(min(count, len(allowed)))
    top = tuple((*spelled(tokenizer, i), v) for i, v in zip(index.tolist(), values.tolist(), strict=True))
    return TokenLogprob(*spelled(tokenizer, token), float(logprobs[token]), top)


def spelled(tokenizer: PreTrainedTokenizerBase, token: int) -> tuple[str, bytes]:
    """A token as text, and the bytes that it stands for: of half a character the text is a replacement character."""
    anchor = tokenizer("a", add_special_tokens=False).input_ids[-1:]
    lead = tokenizer.decode(anchor)
    text = str(tokenizer.decode([*anchor, token]))[len(lead) :]  # alone, some decoders drop the space before it
    if "\ufffd" not in text:
        return text, text.encode()
    own = str(tokenizer.convert_ids_to_tokens(token))
    if len(own) == 6 and own.startswith("<0x") and own.endswith(">"):
        return text, bytes([int(own[3:5], 16)])
    letters = _byte_letters()
    if all(letter in letters for letter in own):
        return text, bytes(letters[letter] for letter in own)
    return text, text.encode()


@lru_cache(maxsize=1)
def _byte_letters() -> dict[str, int]:
    """The letters that byte-level vocabularies are written in: those that can be printed as they are, others beyond.

    Source:
        GPT-2's vocabulary (Radford et al. 2019), whose bytes without a letter of their own follow from 256 on.
    """
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(b): b for b in printed} | {chr(256 + n): b for n, b in enumerate(others)}
