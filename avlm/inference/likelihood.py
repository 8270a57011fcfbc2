"""How likely an answer is that somebody else wrote."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from avlm.data.processor import AvlmProcessor
from avlm.models.modeling import AvlmForConditionalGeneration
from avlm.samples import Sample, Text, Turn


@torch.inference_mode()
def answer_likelihood(
    model: AvlmForConditionalGeneration, processor: AvlmProcessor, sample: Sample, answer: str
) -> tuple[Tensor, bool, int]:
    """Read a conversation with an answer to it.

    Returns:
        Log probability of each token of the answer, float32 (tokens,), its end not counted; whether each of them is the
        likeliest one there; and how many tokens were read.
    """
    begun = Turn("assistant", (Text(answer),), verbatim=True, ended=False)
    start = len(processor.encode(sample, prompt_only=True))
    whole = processor.encode(replace(sample, turns=(*sample.turns, begun)))
    count = sum(label >= 0 for label in whole.labels[start:])
    inputs = {k: v.to(model.device) for k, v in processor.collate([whole]).items() if k != "labels"}
    logits = model(**inputs, use_cache=False).logits[0, start - 1 : start - 1 + count].float().log_softmax(-1)
    targets = torch.tensor(whole.ids[start : start + count], dtype=torch.long, device=logits.device)
    likely = logits.gather(1, targets[:, None]).squeeze(1)
    return likely, bool((logits.argmax(-1) == targets).all()), len(whole)
