"""Decoding: prompts in, tokens out, one step at a time.

Prompts of a batch are padded on the left, so every one of them ends where its answer
begins; media are encoded once, with the prompt, and later steps read the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache

from avlm.data.processor import AvlmProcessor
from avlm.errors import ConfigError
from avlm.models.modeling import AvlmForConditionalGeneration
from avlm.samples import Encoded


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. Temperature 0 takes the likeliest one."""

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    """Choose among this many likeliest tokens; 0 among all."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that together have this probability (arXiv:1904.09751)."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens={self.max_tokens} leaves no room for an answer. Use at least 1")
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(
                f"temperature={self.temperature} is not a number that logits can be divided by. "
                "Use 0 for the likeliest token, or more"
            )
        if self.top_k < 0:
            raise ConfigError(
                f"top_k={self.top_k} is not a number of tokens to choose among. Use 0 for all of them, or more"
            )
        if not 0 < self.top_p <= 1:
            raise ConfigError(
                f"top_p={self.top_p} is not a probability to choose within. Use more than 0 and at most 1"
            )


def end_tokens(model: AvlmForConditionalGeneration, processor: AvlmProcessor) -> set[int]:
    """Ids that end an answer: the tokenizer's, and those of the model's generation settings."""
    ends = {processor.tokenizer.eos_token_id}
    settings = model.generation_config
    configured = settings.eos_token_id if settings is not None else None
    ends |= set(configured) if isinstance(configured, list) else {configured}
    return {int(end) for end in ends if end is not None}


@torch.inference_mode()
def stream(
    model: AvlmForConditionalGeneration,
    processor: AvlmProcessor,
    prompts: Sequence[Encoded],
    sampling: Sampling,
    *,
    use_cache: bool = True,
) -> Iterator[list[int | None]]:
    """Decode a batch of prompts. A placeholder of media is never an answer.

    Args:
        prompts: Encoded with ``prompt_only``.
        use_cache: Keep keys and values of what was read; without, all of it is read again for every token.

    Yields:
        For each step the next token of every prompt; None where the answer has ended (the end token is not yielded).

    Raises:
        ConfigError: A prompt is as long as the language model can read, or longer.
    """
    if not prompts:
        return
    device = model.device
    inputs = {k: v.to(device) for k, v in processor.collate(prompts).items() if k != "labels"}
    ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
    ends = torch.tensor(sorted(end_tokens(model, processor)), device=device, dtype=torch.long)
    never = torch.tensor(model.placeholder_ids(), device=device, dtype=torch.long)
    room = _room(model, ids.shape[1])
    generators = [torch.Generator().manual_seed(sampling.seed) for _ in prompts]
    open_ = torch.ones(len(prompts), dtype=torch.bool, device=device)
    cache: Cache | None = None  # the language model makes the kind it needs
    step_ids, media = ids, inputs
    for _ in range(min(room, sampling.max_tokens)):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        output = model(
            input_ids=step_ids,
            attention_mask=mask,
            position_ids=positions[:, -step_ids.shape[1] :],
            past_key_values=cache,
            use_cache=use_cache,
            logits_to_keep=1,
            **media,
        )
        token = _choose(output.logits[:, -1].float().index_fill(1, never, -math.inf), sampling, generators)
        open_ = open_ & ~torch.isin(token, ends)
        if not bool(open_.any()):
            return
        yield [int(t) if o else None for t, o in zip(token.tolist(), open_.tolist(), strict=True)]
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], 1)
        cache = output.past_key_values if use_cache else None
        if cache is not None:
            step_ids, media = token[:, None], {}
        else:
            step_ids = torch.cat([step_ids, token[:, None]], 1)


def _room(model: AvlmForConditionalGeneration, prompt: int) -> int:
    """How many tokens may follow a prompt of so many."""
    longest = getattr(model.config.text_config.get_text_config(), "max_position_embeddings", None)
    if longest is None:
        return 2**31
    if prompt >= longest:
        raise ConfigError(
            f"the conversation has {prompt} tokens, media included, and the language model was made for {longest}, "
            "the answer among them. Ask with less: fewer turns, fewer or shorter media"
        )
    return int(longest) - prompt


def generate(
    model: AvlmForConditionalGeneration,
    processor: AvlmProcessor,
    prompts: Sequence[Encoded],
    sampling: Sampling,
    *,
    use_cache: bool = True,
) -> list[list[int]]:
    """Decode a batch of prompts to the end; the answers' tokens without the end token."""
    answers: list[list[int]] = [[] for _ in prompts]
    for step in stream(model, processor, prompts, sampling, use_cache=use_cache):
        for answer, token in zip(answers, step, strict=True):
            if token is not None:
                answer.append(token)
    return answers


def _choose(logits_BV: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """The next token of each prompt. Each draws from its own generator, so a batch draws what one by one would."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    behind = logits_BV - logits_BV.max(-1, keepdim=True).values  # at most 0, so that no temperature is too small
    probabilities = (behind / max(sampling.temperature, 1e-30)).softmax(-1)
    ordered, index = probabilities.sort(-1, descending=True)
    keep = ordered.cumsum(-1) - ordered < sampling.top_p
    if sampling.top_k:
        keep[:, sampling.top_k :] = False
    ordered = (ordered * keep).cpu()
    drawn = [torch.multinomial(row, 1, generator=g) for row, g in zip(ordered, generators, strict=True)]
    return index.gather(1, torch.stack(drawn).to(index.device)).squeeze(1)
