"""Prompts in, answers' tokens out, all at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from avlm.data.processor import AvlmProcessor
from avlm.inference.engine import Engine, end_tokens, room
from avlm.inference.sampling import Choice, Sampling, choose
from avlm.models.modeling import AvlmForConditionalGeneration
from avlm.samples import Encoded

__all__ = ["Sampling", "end_tokens", "generate"]


def generate(
    model: AvlmForConditionalGeneration,
    processor: AvlmProcessor,
    prompts: Sequence[Encoded],
    sampling: Sampling,
    *,
    use_cache: bool = True,
) -> list[list[int]]:
    """Decode a batch of prompts to the end. A placeholder of media is never an answer.

    Args:
        prompts: Encoded with ``prompt_only``.
        use_cache: Keep keys and values of what was read; without, all of it is read again for every token.

    Returns:
        The answers' tokens without the end token.

    Raises:
        ConfigError: A prompt is as long as the language model can read, or longer.
    """
    if not prompts:
        return []
    if not use_cache:
        return [_read_again(model, processor, prompt, sampling) for prompt in prompts]
    engine = Engine(model, processor, slots=len(prompts), kept_bytes=0)
    requests = [engine.join_encoded(prompt, sampling) for prompt in prompts]
    while engine.busy:
        engine.step()
    return [request.tokens for request in requests]


@torch.inference_mode()
def _read_again(
    model: AvlmForConditionalGeneration, processor: AvlmProcessor, prompt: Encoded, sampling: Sampling
) -> list[int]:
    """One answer, for each token of which all before it is read, media included: what a cache must not change."""
    inputs = {k: v.to(model.device) for k, v in processor.collate([prompt]).items() if k != "labels"}
    ids, ends = inputs.pop("input_ids"), end_tokens(model, processor)
    never = torch.tensor(model.placeholder_ids(), device=model.device, dtype=torch.long)
    choice, answer = Choice(sampling, prompt.ids), list[int]()
    del inputs["attention_mask"]  # nothing is padded
    for _ in range(min(room(model, len(prompt)), sampling.max_tokens)):
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=1, **inputs).logits[:, -1].float()
        (token,) = choose(logits.index_fill(1, never, -math.inf), [choice])
        if token in ends:
            break
        answer.append(token)
        ids = torch.cat([ids, ids.new_tensor([[token]])], 1)
    return answer
