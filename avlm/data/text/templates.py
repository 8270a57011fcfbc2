"""Chat templates to text pieces, with what is learned known by construction.

A conversation becomes a list of pieces: prompt text, media, answer text. The answer
pieces are the assistant's own words and the end token behind them. They are never
searched for: the template is rendered up to each answer and with it, and the answer
is what was added; it is rendered once more with a mark for an answer, and what stands
behind the mark closes it. Prompt and answer are turned into tokens apart, so training
sees exactly the ids that a prompt followed by generation would have.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from avlm.config.media import MediaSpec
from avlm.data.text.pieces import ANSWER, CUT, MARK, MARKS, RESERVED, SLOT, Piece, Shape, split, stripped_slots
from avlm.data.text.slots import only_writes
from avlm.errors import ConfigError, DataError
from avlm.samples import MediaItem, MediaKind, Sample, Text, Turn

if TYPE_CHECKING:
    import numpy as np

PLACEHOLDERS = {"image": "<image>", "audio": "<audio>", "video": "<video>"}
"""Placeholder tokens in the tokenizer, by the field's usual names; a tokenizer may have names of its own for them."""


_PLACEHOLDERS: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, dict[str, str]]] = WeakKeyDictionary()


def placeholders(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The tokens of a tokenizer that stand for media, by kind; a kind that it has none for is left out.

    A tokenizer names its own as transformers' multimodal ones do (`image_token`, `audio_token`, `video_token`);
    otherwise they go by the field's usual names.
    """
    size, found = _PLACEHOLDERS.get(tokenizer, (-1, {}))
    if size != len(tokenizer):
        own, added = tokenizer.special_tokens_map, tokenizer.get_added_vocab()
        names = {kind: str(own.get(f"{kind}_token") or token) for kind, token in PLACEHOLDERS.items()}
        found = {kind: token for kind, token in names.items() if token in added}
        _PLACEHOLDERS[tokenizer] = len(tokenizer), found
    return found


def placeholder_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Ids of the tokens that stand for media, by kind; a kind that the tokenizer has none for is left out."""
    return {kind: int(tokenizer.convert_tokens_to_ids(token)) for kind, token in placeholders(tokenizer).items()}


def wrap_tokens(media: MediaSpec) -> tuple[str, ...]:
    """The tokens that open and close media, of both senses."""
    wraps = [part.wrap for part in (media.vision, media.audio) if part is not None and part.wrap is not None]
    return tuple(dict.fromkeys(token for wrap in wraps for token in wrap))


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
            f"the tokenizer {tokenizer.name_or_path or ''} has no chat template, so a conversation cannot be written "
            "down. Set model.language.chat_template to a Jinja template"
        )
    return str(template)


def pieces(
    sample: Sample,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    *,
    prompt_only: bool = False,
    reserved: Sequence[str] = (),
) -> list[Piece]:
    """Render a conversation.

    Args:
        sample: Turns of any number, media anywhere in them.
        tokenizer: Its special tokens are known to the template.
        template: A Jinja chat template.
        prompt_only: Leave the last answer out (if there is one) and end where the model is to speak.
        reserved: More tokens that a message never becomes, such as those around media.

    Returns:
        Pieces in reading order.

    Raises:
        DataError: A text holds a placeholder that belongs to media, a medium finds no place, or nothing is to be said.
        ConfigError: The template rewrites what was said before, or closes an answer without an end token.
    """
    control = (*control_tokens(tokenizer, template), *reserved)
    messages = _messages(sample, control, _known(tokenizer, template).placeholders)
    while prompt_only and messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not prompt_only:
        while messages and messages[-1]["role"] != "assistant":
            messages.pop()  # nothing can be learned behind the last answer
    if not messages:
        what = "question to answer. Add a user turn" if prompt_only else "answer to learn from. Add an assistant turn"
        raise DataError(f"there is no {what}", where=sample.where, sample_id=sample.id)
    if prompt_only:
        found = _prompt(messages, tokenizer, template, sample)
    else:
        found, _ = _answered(messages, tokenizer, template, sample)
    wanted = [number for message in messages for number in MARKS.findall(message["content"])]
    if sorted(str(piece.media) for piece in found if piece.media is not None) != sorted(wanted):
        raise DataError(
            "the chat template does not write every medium of this conversation down once. "
            "Put media into the user's turns",
            where=sample.where,
            sample_id=sample.id,
        )
    return found


def _answered(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, template: str, sample: Sample
) -> tuple[list[Piece], str]:
    """Pieces up to the last answer, and the text that they make up.

    How a template writes a conversation is known from the first one of the same shape: by the template's syntax, if
    that proves it, else where it gives the very text that the template makes of this conversation. Otherwise the
    template is asked answer by answer.
    """
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
    messages = messages[: last + 1]
    typed = bool(kinds_written(tokenizer, template))
    shape = _shape(messages, tokenizer, template, sample, typed)
    if shape is not None:
        said = {number: text for message in messages for number, text in _slots(message, typed).items()}
        if shape.stripped is not None:
            said |= {number: said[number].strip() for number in shape.stripped}
            return shape.filled(said)[:2]
        whole = _render(tokenizer, template, messages, False, sample)
        for change in (str, str.strip):  # many templates strip what is said
            found, done, rest = shape.filled({number: change(text) for number, text in said.items()})
            if done + rest == whole:
                return found, done
    return _answer_by_answer(messages, tokenizer, template, sample)


@dataclass(slots=True)
class _Known:
    """What was found out about a tokenizer of one size with one template."""

    placeholders: dict[str, str]
    control: tuple[str, ...] | None = None
    written: frozenset[str] | None = None
    listed: bool | None = None
    shapes: dict[tuple[Any, ...], Shape | None] = field(default_factory=dict)
    """How the template writes conversations of each shape that there was."""


_KNOWN: WeakKeyDictionary[PreTrainedTokenizerBase, dict[tuple[int, str], _Known]] = WeakKeyDictionary()


def _known(tokenizer: PreTrainedTokenizerBase, template: str) -> _Known:
    templates, key = _KNOWN.setdefault(tokenizer, {}), (len(tokenizer), template)
    found = templates.get(key)
    if found is None:
        found = templates[key] = _Known(placeholders(tokenizer))
    return found


MOST_SHAPES = 512
"""How many shapes of conversations are remembered for a template."""


def _shape(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, template: str, sample: Sample, typed: bool
) -> Shape | None:
    """How a template writes conversations of this shape; None where it writes none of them.

    Args:
        typed: Whether the template takes messages of typed parts: then what the parts are belongs to the shape.
    """
    media = [item.kind for item in sample.media()]
    key = tuple(
        (message["role"], turn.ended, _part_kinds(message, media) if typed else ())
        for message, turn in zip(messages, sample.turns, strict=False)
    )
    known = _known(tokenizer, template).shapes
    if key in known:
        return known[key]
    if len(known) >= MOST_SHAPES:
        known.clear()
    shape = None
    with suppress(ConfigError, DataError):  # it refuses the shape, or slots; the conversation itself will show which
        blank = [_blank(message, typed) for message in messages]
        found, done = _answer_by_answer(blank, tokenizer, template, sample)
        whole = _render(tokenizer, template, blank, False, sample)
        stripped = None
        if _is_plain(tokenizer) and only_writes(template, typed or takes_lists(tokenizer, template)):
            padded = [_blank(message, typed, " ") for message in messages]
            stripped = stripped_slots(whole, _render(tokenizer, template, padded, False, sample))
        shape = Shape.of(found, whole[len(done) :], stripped) if whole.startswith(done) else None
    known[key] = shape
    return shape


def _is_plain(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer applies a template as transformers does, and does nothing else to a conversation."""
    own = PreTrainedTokenizerBase.apply_chat_template
    return getattr(tokenizer.apply_chat_template, "__func__", None) is own


def _part_kinds(message: dict[str, Any], media: Sequence[str]) -> tuple[str, ...]:
    """What the parts of a message are: the kinds of its media, and nothing for words."""
    marks = [MARKS.fullmatch(word) for word in message["parts"]]
    return tuple("" if mark is None else media[int(mark[1])] for mark in marks)


def _blank(message: dict[str, Any], typed: bool, beside: str = "") -> dict[str, Any]:
    """A message with slots for what is said. Media that a template writes by itself stay where they are.

    Args:
        beside: Stands on both sides of each slot.
    """
    slots = iter([f"{beside}{SLOT.format(name)}{beside}" for name in _slots(message, typed)])
    if not typed:
        return {**message, "content": next(slots)}
    parts = [word if MARKS.fullmatch(word) else next(slots) for word in message["parts"]]
    return {**message, "content": "".join(parts), "parts": parts}


def _slots(message: dict[str, Any], typed: bool) -> dict[str, str]:
    """What is said in a message, by the numbers of its slots: all of it together, or each of its texts."""
    said = [word for word in message["parts"] if not MARKS.fullmatch(word)] if typed else [message["content"]]
    return {f"{message['number']}{i:06}": text for i, text in enumerate(said)}


def _answer_by_answer(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, template: str, sample: Sample
) -> tuple[list[Piece], str]:
    """The same, by rendering up to each answer and with it."""
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
        found += split(before[len(done) :])
        marked = _render(tokenizer, template, [*messages[:i], {"role": "assistant", "content": ANSWER}], False, sample)
        words, end = _end_of_answer(after, marked, tokenizer, sample)
        done = after[:end]
        learned = end if sample.turns[i].ended else words
        found.append(Piece(after[len(before) : learned], answer=True))
        if learned < end:
            found.append(Piece(after[learned:end]))
    return found, done


def _prompt(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, template: str, sample: Sample
) -> list[Piece]:
    """The same pieces that training sees for the answers given so far, then the rest of the prompt."""
    whole = _render(tokenizer, template, messages, True, sample)
    try:
        found, done = _answered(messages, tokenizer, template, sample)
    except (ConfigError, DataError):  # a template that cannot be trained with can be answered with
        return split(whole)
    return [*found, *split(whole[len(done) :])] if whole.startswith(done) else split(whole)


def _end_of_answer(after: str, marked: str, tokenizer: PreTrainedTokenizerBase, sample: Sample) -> tuple[int, int]:
    """Where an answer's words end in a rendered conversation, and where it ends itself: behind the first special token
    that the template puts there.

    Args:
        after: The conversation with its answer.
        marked: The same with a mark for the answer.
    """
    closing = marked.rpartition(ANSWER)[2]
    if ANSWER not in marked or not after.endswith(closing):
        raise DataError(
            "the chat template does not write this answer down as it does others, so its end is not known. "
            "Give the answer as plain text",
            where=sample.where,
            sample_id=sample.id,
        )
    ends = [(closing.find(token), -len(token)) for token in special_tokens(tokenizer) if token in closing]
    if not ends:
        raise ConfigError(
            f"the chat template closes an answer with {closing!r}, which has no special token, so the model could "
            "not learn where to stop. End the assistant's turn with the tokenizer's end token"
        )
    at, length = min(ends)
    words = len(after) - len(closing)
    return words, words + at - length


_SPECIAL: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, tuple[str, ...]]] = WeakKeyDictionary()


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Every special token of a tokenizer but the placeholders."""
    size, found = _SPECIAL.get(tokenizer, (-1, ()))
    if size != len(tokenizer):
        added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        tokens = {str(token) for token in [*tokenizer.all_special_tokens, *added]}
        tokens -= {*PLACEHOLDERS.values(), *placeholders(tokenizer).values()}
        found = tuple(sorted(tokens - {""}))
        _SPECIAL[tokenizer] = len(tokenizer), found
    return found


def control_tokens(tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[str, ...]:
    """Special tokens that build the conversation: those the template writes, and the tokenizer's own named ones.

    What somebody writes in a message never becomes one of them; other special tokens (a state token, say) may be
    written in messages.
    """
    known = _known(tokenizer, template)
    if known.control is None:
        asked, answered = {"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}
        written = template
        for messages in ([asked, answered], [{"role": "system", "content": "x"}, asked]):
            try:
                written += _render(tokenizer, template, messages, True, Sample("", ()))
            except DataError:
                continue  # a template without system turns, say
        named = {str(token) for token in tokenizer.special_tokens_map.values() if isinstance(token, str)}
        known.control = tuple(t for t in special_tokens(tokenizer) if t in named or t in written)
    return known.control


def written(sample: Sample, tokenizer: PreTrainedTokenizerBase, template: str, *, prompt: bool) -> str:
    """A conversation as one text, with the placeholder of its kind for each media item.

    Args:
        prompt: End where the model is to speak.
    """
    names = placeholders(tokenizer)
    kinds = [names.get(item.kind, PLACEHOLDERS[item.kind]) for item in sample.media()]
    text = _render(tokenizer, template, _messages(sample, (), {}), prompt, sample)
    return MARKS.sub(lambda mark: kinds[int(mark[1])], text)


def read_back(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Piece], list[str]]:
    """Pieces of a text that `written` made (or somebody else), and the kinds of its media in order."""
    found: list[Piece] = []
    kinds: list[str] = []
    names = {token: kind for kind, token in placeholders(tokenizer).items()}
    for chunk in re.split("(" + "|".join(map(re.escape, names)) + ")", _plain(text)):
        if chunk in names:
            found.append(Piece(media=len(kinds)))
            kinds.append(names[chunk])
        elif chunk:
            found.append(Piece(chunk))
    return found, kinds


def _messages(sample: Sample, control: Sequence[str], markers: dict[str, str]) -> list[dict[str, Any]]:
    """A conversation as templates take it, a mark for each medium; `parts` has the words and marks one by one."""
    number = 0
    messages: list[dict[str, Any]] = []
    for turn in sample.turns:
        words = []
        for part in turn.parts:
            if isinstance(part, Text):
                words.append(_checked(part.text, control, markers, sample))
                continue
            if turn.role == "assistant":
                raise DataError(
                    f"an assistant turn holds {part.name()}, and models answer in words. Move it to a user turn",
                    where=sample.where,
                    sample_id=sample.id,
                )
            words.append(MARK.format(number))
            number += 1
        content = "".join(words) if turn.verbatim else "\n".join(_joined(words))
        messages.append({"role": turn.role, "content": content, "parts": words, "number": len(messages) + 1})
    return messages


def _joined(words: list[str]) -> list[str]:
    """Media stand on the line of the text behind them; texts are parted by line breaks."""
    lines: list[str] = []
    for word in words:
        if lines and MARKS.search(lines[-1]) and MARKS.sub("", lines[-1]) == "":
            lines[-1] += word
        else:
            lines.append(word)
    return lines


def _plain(text: str) -> str:
    """A text without marks of ours."""
    return text if text.isascii() else RESERVED.sub("", text)


def _checked(text: str, control: Sequence[str], markers: dict[str, str], sample: Sample) -> str:
    """A text as it may stand in a conversation: without marks of ours, and without control tokens."""
    text = _plain(text)
    for kind, token in markers.items():
        if token in text:
            raise DataError(
                f"a text holds the marker {token}, which stands for {kind} data, and no {kind} belongs to it there. "
                f'Give the {kind} as a part of its own ({{"type": "{kind}", "path": ...}}) or write the marker in '
                "another way",
                where=sample.where,
                sample_id=sample.id,
            )
    for token in control:
        if token in text:
            text = text.replace(token, token[0] + CUT + token[1:])
    return text


def unmarked(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """An answer as it can be told again: a marker that a model spelled out stands for nothing, and gets a space."""
    for token in placeholders(tokenizer).values():
        text = text.replace(token, f"{token[:-1]} {token[-1]}")
    return text


def _render(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: Sequence[dict[str, Any]], prompt: bool, sample: Sample
) -> str:
    """The template's text with a mark for each medium, whether the template writes the placeholders or we do."""
    kinds, listed = kinds_written(tokenizer, template), takes_lists(tokenizer, template)
    media = [item.kind for item in sample.media()]
    rendered = _applied(tokenizer, template, [_message(m, media, kinds, listed) for m in messages], prompt, sample)
    numbers = [int(n) for m in messages for n in MARKS.findall(m["content"]) if media[int(n)] in kinds]
    if not numbers:
        return rendered
    waiting = {token: [n for n in numbers if media[n] == kind] for kind, token in placeholders(tokenizer).items()}
    places = "|".join(re.escape(token) for token, of_kind in waiting.items() if of_kind)
    return re.sub(places, lambda at: MARK.format(waiting[at[0]].pop(0)) if waiting[at[0]] else at[0], rendered)


def _message(message: dict[str, Any], media: Sequence[str], kinds: frozenset[str], listed: bool) -> dict[str, Any]:
    """A message as the template wants it: one text, alone or listed, or typed parts with the media among them."""
    if not kinds:
        content = message["content"]
        return {"role": message["role"], "content": [{"type": "text", "text": content}] if listed else content}
    parts: list[dict[str, str]] = []
    for word in message.get("parts", [message["content"]]):
        mark = MARKS.fullmatch(word)
        kind = media[int(mark[1])] if mark else ""
        parts.append({"type": kind} if kind in kinds else {"type": "text", "text": word})
    return {"role": message["role"], "content": parts}


def kinds_written(tokenizer: PreTrainedTokenizerBase, template: str) -> frozenset[str]:
    """Kinds of media that a template writes placeholders for, given messages of typed parts as multimodal ones are.

    A template that takes only texts has none; then the placeholder is written into the text.
    """
    known = _known(tokenizer, template)
    if known.written is None:
        found = set()
        for kind, token in placeholders(tokenizer).items():
            asked = [{"role": "user", "content": [{"type": kind}, {"type": "text", "text": "x"}]}]
            try:
                text = _applied(tokenizer, template, asked, True, Sample("", ()))
            except DataError:
                continue
            if text.count(token) == 1 and "'type'" not in text and '"type"' not in text:
                found.add(kind)
        known.written = frozenset(found)
    return known.written


def takes_lists(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Whether a template wants even a text alone in a list of parts.

    Of a text that comes by itself it writes nothing: it goes over letters as over parts, none of which is a text.
    """
    known = _known(tokenizer, template)
    if known.listed is None:
        listed = [{"type": "text", "text": ANSWER}]
        known.listed = not _is_written(ANSWER, tokenizer, template) and _is_written(listed, tokenizer, template)
    return known.listed


def _is_written(content: Any, tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Whether a template writes down what a user says in this form."""
    try:
        text = _applied(tokenizer, template, [{"role": "user", "content": content}], True, Sample("", ()))
    except DataError:
        return False
    return ANSWER in text and "'type'" not in text and '"type"' not in text


def _applied(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: Sequence[dict[str, Any]], prompt: bool, sample: Sample
) -> str:
    try:
        rendered = tokenizer.apply_chat_template(
            list(messages), chat_template=template, add_generation_prompt=prompt, tokenize=False
        )
    except TemplateSyntaxError as error:
        raise ConfigError(f"the chat template is not Jinja ({error}, line {error.lineno}). Correct it") from None
    except Exception as error:  # a Jinja template raises whatever it likes, on purpose (roles in the wrong order, say)
        raise DataError(
            f"the chat template refuses this conversation ({error}). Correct the order of its turns",
            where=sample.where,
            sample_id=sample.id,
        ) from None
    return str(rendered)


def without_media(sample: Sample) -> Sample:
    """The same conversation in words alone: each medium's `alt` in its place, for language-model pre-training."""
    return worded(sample, [True] * len(sample.media()))


def described(sample: Sample, share: float, rng: np.random.Generator, only: Collection[MediaKind] = ()) -> Sample:
    """The same conversation with a share of its media, those drawn, in words, as far as their `alt` is known.

    Args:
        only: If any, all media of other kinds are given in words too.
    """
    if not share and not only:
        return sample
    return worded(sample, [bool(i.alt) and (rng.random() < share or strange(i, only)) for i in sample.media()])


def strange(item: MediaItem, only: Collection[MediaKind]) -> bool:
    """Whether a medium is of none of these kinds, if there are any."""
    return bool(only) and item.kind not in only


def worded(sample: Sample, chosen: Iterable[bool]) -> Sample:
    """The same conversation with some of its media in words.

    Args:
        chosen: For each medium, in reading order, whether its `alt` stands in its place.
    """
    wanted = list(chosen)
    if not any(wanted):
        return sample
    draws = iter(wanted)

    def in_words(part: Text | MediaItem, turn: Turn) -> Text | MediaItem:
        if isinstance(part, Text) or not next(draws):
            return part
        return Text(f"{part.alt}\n" if part.alt and not turn.verbatim else part.alt)

    turns = [replace(turn, parts=tuple(in_words(part, turn) for part in turn.parts)) for turn in sample.turns]
    return replace(sample, turns=tuple(turns))
