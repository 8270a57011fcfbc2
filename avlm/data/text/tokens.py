"""Text to ids for one tokenizer and template, each text once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from avlm.data.text.pieces import CUT
from avlm.data.text.templates import control_tokens, pieces, placeholder_ids, placeholders
from avlm.data.text.words import Words, parts_before_spaces
from avlm.errors import ConfigError, DataError
from avlm.samples import Sample, Text, Turn

REMEMBERED = 256
"""Longest text, in characters, whose tokens are remembered."""

_LETTER = re.compile(r"\w")
_PROBES = ("x", " x", "x y\n", "  x", "\n\nx 1.5 \u00e9\u6f22", "")
"""Texts that the quick way to ids has to read as the tokenizer does."""


class Tokens:
    """Text to ids for one tokenizer and template, remembering short texts, which come again."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.size = len(tokenizer)
        """Of the vocabulary that is remembered here; tokens that are added later want another `Tokens`."""
        self.placeholders = placeholder_ids(tokenizer)
        kind, self.stand_in = next(iter(placeholders(tokenizer).items()), ("", ""))
        """The token that holds the place of a medium, whatever its kind, while a text is turned into tokens."""
        self.stand_in_id = self.placeholders.get(kind, -1)
        self._short = lru_cache(maxsize=65_536)(self._read)
        self.token_id = lru_cache(maxsize=64)(self._token_id)
        self._read_slowly("x")  # drops what the tokenizer's file says of padding now, not in two threads at once
        self._backend = _backend(tokenizer)
        if any(self._read_quickly(text) != self._read_slowly(text) for text in _PROBES):
            self._backend = None
        by_words = self._backend is not None and parts_before_spaces(self._backend)
        self._words = Words(self._read_all) if by_words else None
        self._anchors = anchors(tokenizer, control_tokens(tokenizer, template))

    def _token_id(self, token: str) -> int:
        """Id of one token."""
        return int(self.tokenizer.convert_tokens_to_ids(token))

    def _read(self, text: str) -> tuple[int, ...]:
        read = self._read_quickly if self._words is None else self._words.ids
        if CUT not in text:
            return tuple(read(text)) if text else ()
        return tuple(i for part in text.split(CUT) if part for i in read(part))

    def _read_quickly(self, text: str) -> list[int]:
        return self._read_all([text])[0]

    def _read_all(self, texts: list[str]) -> list[list[int]]:
        """Ids alone, without the offsets and masks that come with a call of the tokenizer."""
        backend = self._backend
        if backend is None or backend.padding is not None or backend.truncation is not None:  # others may set them
            return [self._read_slowly(text) for text in texts]
        return [found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _read_slowly(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return found

    def ids(self, text: str) -> tuple[int, ...]:
        """Ids of a text. What stands on both sides of a cut is turned into tokens apart."""
        return self._short(text) if self._words is None and len(text) <= REMEMBERED else self._read(text)

    def answer_end(self) -> int | None:
        """The token that ends an answer; None where the template ends it with no special token."""
        sample = Sample("", (Turn("user", (Text("x"),)), Turn("assistant", (Text("x"),))))
        try:
            last = pieces(sample, self.tokenizer, self.template)[-1]
        except (ConfigError, DataError):
            return None
        return self.ids(last.text)[-1] if last.answer else None

    def after(self, before: str, text: str) -> tuple[int, ...]:
        """Ids of a text behind another: as both are written together where the border is kept, else by itself."""
        before = self._near(before) if before else ""
        if not before:
            return self.ids(text)
        first, both = self.ids(before), self.ids(before + text)
        return both[len(first) :] if both[: len(first)] == first else self.ids(text)

    def _near(self, before: str) -> str:
        """The end of a text that the ids behind it can depend on: what is before an anchor or a cut cannot matter."""
        start = before.rfind(CUT) + 1
        return before[max([start, *(before.rfind(token, start) for token in self._anchors)]) :]


def _backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The `tokenizers` object behind a tokenizer, where there is one that reads as the tokenizer's settings say."""
    backend = getattr(tokenizer, "backend_tokenizer", None) if tokenizer.is_fast else None
    return None if backend is None or backend.encode_special_tokens else backend


def anchors(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> tuple[str, ...]:
    """Those of some special tokens that part a text: how what is behind one is read depends on nothing before it.

    The `tokenizers` library takes special tokens out of a text before it does anything else, and reads what is between
    them by itself. A token that others may overlap with is not found by looking for its letters, and is left out; so is
    one that a word may touch, where some tokens are looked for as whole words.
    """
    if _backend(tokenizer) is None:
        return ()
    added = {str(token): token for token in tokenizer.added_tokens_decoder.values()}
    apart = [t for t in tokens if t in added and not added[t].normalized and not added[t].single_word]
    if any(token.single_word for token in added.values()):
        apart = [t for t in apart if not (_LETTER.match(t[0]) or _LETTER.match(t[-1]))]
    return tuple(t for t in apart if not any(_overlap(other, t) for other in added))


def _overlap(other: str, token: str) -> bool:
    """Whether another token, found first, could take letters of this one."""
    if other != token and token in other:
        return True
    return any(token.startswith(other[-length:]) for length in range(1, min(len(other), len(token))))
