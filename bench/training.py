"""A training step's arithmetic: samples of uneven length in one packed row against a padded batch."""

from __future__ import annotations

import numpy as np
import torch
from harness import Case, Table, timed
from transformers import LlamaConfig, LlamaForCausalLM

from avlm.models import attention


def main() -> list[Table]:
    """Forward and backward of a small Llama."""
    torch.manual_seed(0)
    attention.register()
    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=8, vocab_size=1000)
    )
    lengths = [int(n) for n in np.random.default_rng(0).lognormal(4, 0.8, 16).clip(8, 512)]
    samples = [torch.randint(0, 1000, (n,)) for n in lengths]
    row, positions = torch.cat(samples)[None], torch.cat([torch.arange(n) for n in lengths])[None]
    batch = torch.stack([torch.nn.functional.pad(s, (0, max(lengths) - len(s))) for s in samples])
    mask = torch.stack([(torch.arange(max(lengths)) < n).long() for n in lengths])

    def packed() -> torch.Tensor:
        model.set_attn_implementation(attention.NAME)
        kwargs = attention.packed_kwargs(lengths, torch.device("cpu"))
        blank = torch.zeros(1, 1, 1, 1)
        return model(input_ids=row, position_ids=positions, attention_mask=blank, use_cache=False, **kwargs).logits[0]

    def padded() -> torch.Tensor:
        model.set_attn_implementation("sdpa")
        return model(input_ids=batch, attention_mask=mask, use_cache=False).logits[mask.bool()]

    def check() -> None:
        torch.testing.assert_close(packed(), padded(), atol=1e-4, rtol=1e-3)

    table = Table("training", "A training step on 16 samples of uneven length", "ms", ["Forward and backward."])
    table.lines += timed(
        Case(
            "packed row",
            lambda: packed().sum().backward(),
            {"padded batch": lambda: padded().sum().backward()},
            rounds=7,
            check=check,
        )
    )
    return [table]
