# ruff: noqa: E501 (templates)
"""Chat templates of real families in their usual form, a small tokenizer for each, and what they write by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from avlm.config.media import AudioSpec, MediaSpec, Reduction, VideoSpec, VisionSpec
from avlm.data.processor import AvlmProcessor
from avlm.data.text.templates import PLACEHOLDERS

Message = tuple[str, str]
Span = tuple[str, bool]
"""Text, and whether it is learned."""

MEDIA = MediaSpec(
    vision=VisionSpec(image_size_px=28, cell_px=14),
    audio=AudioSpec(reduction=Reduction(stack=8)),
    video=VideoSpec(fps=1, max_frames=4),
)
TEXTS = [
    "You are a helpful assistant.",
    "What is in the picture? What do you hear? A red circle, two blue squares and a green triangle.",
    "The quick brown fox jumps over the lazy dog. yes no one two three four user assistant system USER ASSISTANT",
] * 4


@dataclass(frozen=True)
class Family:
    """One family: its template, its special tokens, and its format written out by hand."""

    name: str
    template: str
    special: tuple[str, ...]
    end: str
    by_hand: Callable[[list[Message]], list[Span]]
    has_system: bool = True


CHATML = Family(
    "chatml",
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    "<|im_end|>",
    lambda messages: [
        span
        for role, text in messages
        for span in (
            [("<|im_start|>assistant\n", False), (f"{text}<|im_end|>", True), ("\n", False)]
            if role == "assistant"
            else [(f"<|im_start|>{role}\n{text}<|im_end|>\n", False)]
        )
    ],
)


def _vicuna(messages: list[Message]) -> list[Span]:
    spans: list[Span] = []
    for role, text in messages:
        if role == "system":
            spans.append((f"{text} ", False))
        elif role == "user":
            spans.append((f"USER: {text} ", False))
        else:
            spans += [("ASSISTANT:", False), (f" {text}</s>", True)]
    return spans


VICUNA = Family(
    "vicuna",
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }} {% elif m['role'] == 'user' %}"
    "USER: {{ m['content'] }} {% else %}ASSISTANT: {{ m['content'] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
    ("<s>", "</s>", "<unk>"),
    "</s>",
    _vicuna,
)


def _llama3(messages: list[Message]) -> list[Span]:
    spans: list[Span] = [("<|begin_of_text|>", False)]
    for role, text in messages:
        spans.append((f"<|start_header_id|>{role}<|end_header_id|>\n\n", False))
        spans.append((f"{text.strip()}<|eot_id|>", role == "assistant"))
    return spans


LLAMA3 = Family(
    "llama-3",
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "<|end_of_text|>",  # as in the base model: what ends a turn is another token, known only as an added one
    _llama3,
)


def _mistral(messages: list[Message]) -> list[Span]:
    spans: list[Span] = [("<s>", False)]
    for role, text in messages:
        spans += [(f"[INST] {text} [/INST]", False)] if role == "user" else [(f" {text}</s>", True)]
    return spans


MISTRAL = Family(
    "mistral",
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token}}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}",
    ("<s>", "</s>", "<unk>"),
    "</s>",
    _mistral,
    has_system=False,
)


def _gemma(messages: list[Message]) -> list[Span]:
    spans: list[Span] = [("<bos>", False)]
    for role, text in messages:
        model = role == "assistant"
        spans.append((f"<start_of_turn>{'model' if model else role}\n", False))
        spans += [(f"{text.strip()}<end_of_turn>", model), ("\n", False)]
    return spans


GEMMA = Family(
    "gemma",
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
    ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
    "<eos>",
    _gemma,
    has_system=False,
)

PARTS = Family(
    "chatml of parts, texts alone",
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n'}}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{{'<|im_end|>\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    CHATML.special,
    CHATML.end,
    CHATML.by_hand,
)

FAMILIES = [CHATML, VICUNA, LLAMA3, MISTRAL, GEMMA, PARTS]


@cache
def tokenizer(family: Family, *, pieces: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE, or with ``pieces`` one that marks spaces as SentencePiece does, with the family's tokens."""
    made = Tokenizer(models.BPE(byte_fallback=pieces, unk_token="<unk>" if pieces else None))
    special = [*family.special, *PLACEHOLDERS.values()]
    if pieces:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        made.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        alphabet = sorted({*"▁\n", *"".join(TEXTS)} - {" "})
        special += [f"<0x{byte:02X}>" for byte in range(256)]
    else:
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=family.special[0],
        eos_token=family.end,
        pad_token=family.end,
        clean_up_tokenization_spaces=False,
    )


@cache
def processor(family: Family, *, pieces: bool = False) -> AvlmProcessor:
    """A processor that writes as the family does."""
    return AvlmProcessor(
        tokenizer(family, pieces=pieces), media=MEDIA.model_dump(mode="json"), chat_template=family.template
    )


def spans_by_hand(family: Family, messages: list[Message]) -> list[tuple[str, bool]]:
    """What the family writes, up to the end token of the last answer, neighbours of one kind joined."""
    spans = family.by_hand(messages)
    while not spans[-1][1]:
        spans.pop()
    return [("".join(text for text, _ in run), kind) for kind, run in itertools.groupby(spans, key=lambda s: s[1])]
