"""Chat templates to text pieces, with what is learned known by construction.

A conversation becomes a list of pieces: prompt text, media, answer text. The answer
pieces are the assistant's own words and the end token behind them. They are never
searched for: the template is rendered up to each answer and with it, and the answer
is what was added. Prompt and answer are turned into tokens apart, so training sees
exactly the ids that a prompt followed by generation would have.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from avlm.errors import ConfigError, DataError
from avlm.samples import Sample, Text, Turn

PLACEHOLDERS = {"image": "<image>", "audio": "<audio>", "video": "<video>"}
"""Placeholder tokens in the tokenizer, by the field's usual names."""

_MARK = "\ue000{}\ue001"
"""Stands for a media item while a template is rendered; private-use characters, which no text has."""
_MARKS = re.compile("\ue000([0-9]+)\ue001")


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a rendered conversation: words, or the place of a media item."""

    text: str = ""
    media: int | None = None
    """Number of the media item in its sample."""
    answer: bool = False
    """Learned: the assistant's words with the end token."""


def chat_template(tokenizer: PreTrainedTokenizerBase, own: str | None) -> str:
    """The template to use: the run's own, else the tokenizer's.

    Raises:
        ConfigError: There is neither.
    """
    template = own or tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise ConfigError(
            f"the tokenizer {tokenizer.name_or_path or ''} has no chat template, so a conversation cannot be written down. "
            "Set model.language.chat_template to a Jinja template"
        )
    return str(template)


def pieces(
    sample: Sample, tokenizer: PreTrainedTokenizerBase, template: str, *, prompt_only: bool = False
) -> list[Piece]:
    """Render a conversation.

    Args:
        sample: Turns of any number, media anywhere in them.
        tokenizer: Its special tokens are known to the template.
        template: A Jinja chat template.
        prompt_only: Leave the last answer out (if there is one) and end where the model is to speak.

    Returns:
        Pieces in reading order.

    Raises:
        DataError: A text holds a placeholder that belongs to media, or there is nothing to answer.
        ConfigError: The template rewrites what was said before, or closes an answer without an end token.
    """
    messages = _messages(sample)
    if prompt_only:
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        return _split(_render(tokenizer, template, messages, True, sample), answer=False)
    found: list[Piece] = []
    done = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, template, messages[:i], True, sample)
        after = _render(tokenizer, template, messages[: i + 1], False, sample)
        if not (before.startswith(done) and after.startswith(before)):
            raise ConfigError(
                "the chat template changes earlier text when an answer is added, so what is to be learned cannot be "
                "told from the prompt. Use a template in which a longer conversation begins with the shorter one"
            )
        found += _split(before[len(done) :], answer=False)
        answer, rest = _close(after[len(before) :], message["content"], tokenizer)
        found.append(Piece(answer, answer=True))
        done = after[: len(after) - len(rest)]
    if not found:
        raise DataError(
            "there is no answer to learn from. Add an assistant turn", where=sample.where, sample_id=sample.id
        )
    return found


def _messages(sample: Sample) -> list[dict[str, str]]:
    number = 0
    messages: list[dict[str, str]] = []
    for turn in sample.turns:
        words = []
        for part in turn.parts:
            if isinstance(part, Text):
                words.append(_checked(part.text, sample))
            else:
                words.append(_MARK.format(number))
                number += 1
        messages.append({"role": turn.role, "content": "\n".join(_joined(words))})
    return messages


def _joined(words: list[str]) -> list[str]:
    """Media stand on the line of the text behind them; texts are parted by line breaks."""
    lines: list[str] = []
    for word in words:
        if lines and _MARKS.search(lines[-1]) and _MARKS.sub("", lines[-1]) == "":
            lines[-1] += word
        else:
            lines.append(word)
    return lines


def _checked(text: str, sample: Sample) -> str:
    for kind, token in PLACEHOLDERS.items():
        if token in text:
            raise DataError(
                f"a text holds the marker {token}, which stands for {kind} data, and no {kind} belongs to it there. "
                f'Give the {kind} as a part of its own ({{"type": "{kind}", "path": ...}}) or write the marker differently',
                where=sample.where,
                sample_id=sample.id,
            )
    return _MARKS.sub("", text)


def _render(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: Sequence[dict[str, Any]], prompt: bool, sample: Sample
) -> str:
    try:
        rendered = tokenizer.apply_chat_template(
            list(messages), chat_template=template, add_generation_prompt=prompt, tokenize=False
        )
    except Exception as error:  # a Jinja template raises whatever it likes, on purpose (roles in the wrong order, say)
        raise DataError(
            f"the chat template refuses this conversation ({error}). Correct the order of its turns",
            where=sample.where,
            sample_id=sample.id,
        ) from None
    return str(rendered)


def _split(text: str, *, answer: bool) -> list[Piece]:
    found: list[Piece] = []
    for i, chunk in enumerate(_MARKS.split(text)):
        if i % 2:
            found.append(Piece(media=int(chunk), answer=answer))
        elif chunk:
            found.append(Piece(chunk, answer=answer))
    return found


def _close(added: str, content: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Cut what an answer added behind its end token: (learned, the rest, which opens the next prompt)."""
    start = added.find(content.strip())
    tail = start + len(content.strip()) if start >= 0 else 0
    ends = [(added.find(token, tail), token) for token in tokenizer.all_special_tokens]
    ends = [(at, token) for at, token in ends if at >= 0]
    if not ends:
        raise ConfigError(
            f"the chat template closes an answer with {added[tail:]!r}, which has no special token, so the model could "
            "not learn where to stop. End the assistant's turn with the tokenizer's end token"
        )
    at, token = min(ends)
    return added[: at + len(token)], added[at + len(token) :]


def without_media(sample: Sample) -> Sample:
    """The same conversation with its media left out, for language-model pre-training."""
    turns = []
    for turn in sample.turns:
        parts = tuple(p for p in turn.parts if isinstance(p, Text))
        turns.append(Turn(turn.role, parts))
    return Sample(sample.id, tuple(turns), sample.task, sample.where)
