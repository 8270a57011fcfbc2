r"""Texts to ids word by word, so that a word is turned into tokens once and looked up ever after.

Most tokenizers part a text into pieces by a rule and turn each piece into tokens by itself. Where the rule parts every
text before a space that follows something else, what is before such a space and what is behind it are read as if the
other were not there, so a text's ids are those of its words end to end. Which rules do that is known here by what they
are made of; of any other tokenizer nothing is assumed, and it has no `Words`.

Why: let position i hold a space, and i - 1 something that is no white space. Every alternative of `_ALTERNATIVES`
matches a space at its own beginning only, or matches white space alone, so no match has position i inside. As white
space can always be matched by itself, one begins there. Nothing looks behind itself, so what is matched from i on
depends on nothing before it. Before i, nothing but ``\s+(?!\S)`` looks ahead, behind white space, which i - 1 is not;
everything else takes a space there for the end. A normalizer to NFC joins no space with anything, and no token that is
taken out of the text before has a space in it or takes one along.

Source:
    How the `tokenizers` library goes about it: added tokens, normalizer, pre-tokenizer, model, each on the pieces of
    the one before. The rules are those of GPT-2 (Radford et al., 2019), of the later ones of OpenAI (tiktoken), and of
    what was made after them: Llama 3, Qwen, Mistral's Tekken, DeepSeek, SmolLM.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

from tokenizers.models import BPE

MOST_WORDS = 65_536
"""How many words are remembered; then all of them are forgotten."""
LONGEST = 64
"""Characters of the longest word that is remembered."""

_LETTERS = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACE = r"\s+"
_ALTERNATIVES = {
    *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d", _SHORT),
    *(r" ?\p{L}+", r" ?\p{N}+", r"\p{N}", r"\p{N}+", r"\p{N}{1,3}"),
    *(r"[^\r\n\p{L}\p{N}]?\p{L}+", r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"),
    *(rf"[^\r\n\p{{L}}\p{{N}}]?{_LETTERS[0]}*{_LETTERS[1]}+{short}" for short in ("", f"{_SHORT}?")),
    *(rf"[^\r\n\p{{L}}\p{{N}}]?{_LETTERS[0]}+{_LETTERS[1]}*{short}" for short in ("", f"{_SHORT}?")),
    *(r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*"),
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
    *(r"\s*[\r\n]+", r"\s*[\r\n]", r"\s+(?!\S)", _SPACE),
}
"""What the known rules are made of."""
_BETWEEN = re.compile(r"\|(?![^(]*\))")
"""Parts the alternatives of a rule; those in brackets are one."""

_OTHER_SPACES = "\n\t\r\v\f\x1c\x1d\x1e\x1f"
"""White space of ASCII beside the space itself, which begins no word behind one of these."""
_STARTS = re.compile(r"(?<=\S)(?= )")

Ids = Sequence[int]


class Words:
    """The ids of texts, of which each word is read once. Safe for several threads.

    Args:
        read: Gives the ids of some texts. It has to be that of a tokenizer of which `parts_before_spaces` is true.
    """

    def __init__(self, read: Callable[[list[str]], Sequence[Ids]]) -> None:
        self.read = read
        self._first: dict[str, Ids] = {"": ()}
        """Of words that a text begins with."""
        self._next: dict[str, Ids] = {}
        """Of words with a space before them, by what is behind that."""

    def ids(self, text: str) -> list[int]:
        """Ids of a text."""
        first, *others = words_of(text)
        try:
            return [*self._first[first], *chain.from_iterable(map(self._next.__getitem__, others))]
        except KeyError:
            return list(chain.from_iterable(self._read(first, others)))

    def _read(self, first: str, others: list[str]) -> list[Ids]:
        """Ids of each word; those that are not known are read at once."""
        begin, found = self._first.get(first), list(map(self._next.get, others))
        new = list({word for word, ids in zip(others, found, strict=True) if ids is None})
        texts = [f" {word}" for word in new] + ([first] if begin is None else [])
        read = [tuple(ids) for ids in self.read(texts)]
        learned = dict(zip(new, read, strict=False))
        _remember(self._next, learned)
        if begin is None:
            begin = read[-1]
            _remember(self._first, {first: begin})
        return [begin, *(learned[word] if ids is None else ids for word, ids in zip(others, found, strict=True))]


def _remember(known: dict[str, Ids], learned: Mapping[str, Ids]) -> None:
    if len(known) + len(learned) > MOST_WORDS:
        known.clear()
    known.update((word, ids) for word, ids in learned.items() if len(word) <= LONGEST)


def words_of(text: str) -> list[str]:
    """A text cut before each space that follows something else; the spaces at the cuts are left out."""
    if text.isascii() and "  " not in text and not any(c in text and f"{c} " in text for c in _OTHER_SPACES):
        return text.split(" ")
    first, *others = _STARTS.split(text)
    return [first, *(word[1:] for word in others)]


def parts_before_spaces(backend: Any) -> bool:
    """Whether a tokenizer reads what is on both sides of a space that follows something else apart.

    Args:
        backend: A `tokenizers.Tokenizer`.
    """
    if backend.normalizer is not None and _settings(backend.normalizer) != {"type": "NFC"}:
        return False
    if not isinstance(backend.model, BPE) or backend.model.dropout:
        return False
    if any(_takes_spaces(token) for token in backend.get_added_tokens_decoder().values()):
        return False
    return backend.pre_tokenizer is not None and _rule_parts(_settings(backend.pre_tokenizer))


def _settings(part: Any) -> dict[str, Any]:
    """What a part of a tokenizer is made with, as its file has it; nothing where that is not told."""
    try:
        found = json.loads(part.__getstate__())
    except Exception:  # one that was written in Python has no file
        return {"type": ""}
    return found if isinstance(found, dict) else {"type": ""}


def _takes_spaces(token: Any) -> bool:
    """Whether an added token has white space in it, or takes along what is beside it."""
    return bool(token.lstrip or token.rstrip or not token.content or any(c.isspace() for c in token.content))


def _rule_parts(rule: dict[str, Any]) -> bool:
    """Whether a pre-tokenizer parts before such spaces, whatever else it parts."""
    steps = rule["pretokenizers"] if rule["type"] == "Sequence" else [rule]
    *before, last = steps
    bytewise = last["type"] == "ByteLevel" and last["add_prefix_space"] is False
    if not bytewise or not all(step["type"] == "Digits" or _is_known(step) for step in before):
        return False
    return bool(last["use_regex"]) or any(_SPACE in _alternatives(step) for step in before)


def _is_known(step: dict[str, Any]) -> bool:
    """Whether a step parts by a rule that is made of known alternatives, and keeps each match as a piece."""
    plain = step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]
    return plain and set(_alternatives(step)) <= _ALTERNATIVES


def _alternatives(step: dict[str, Any]) -> list[str]:
    return _BETWEEN.split(step.get("pattern", {}).get("Regex", "nothing"))
