"""Whether a language model's logits are nothing but one matrix times its decoder's last hidden states.

Some scale the states before it (MiniCPM), or the logits behind it (Cohere, Granite), or bend them (Gemma 2). Those are
asked for logits as they make them; the others' losses can be computed without holding any.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@torch.no_grad()
def plain_head(language: PreTrainedModel) -> nn.Linear | None:
    """The language model's head if its logits are the head's output for the decoder's last hidden states, else None.

    Nothing is assumed: two made-up embeddings go through it, and what goes in and out of decoder and head is compared.
    """
    head = language.get_output_embeddings()
    if type(head) is not nn.Linear:
        return None
    seen: dict[str, Any] = {}

    def keep_decoded(module: nn.Module, args: Any, output: Any) -> None:
        seen["decoded"] = output[0] if isinstance(output, tuple) else output.last_hidden_state

    def keep_head(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen["taken"], seen["made"] = args[0].clone(), output.clone()

    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for module, hook in ((language.get_decoder(), keep_decoded), (head, keep_head)):
            stack.callback(module.register_forward_hook(hook).remove)
        torch.manual_seed(0)
        embeds = torch.randn(1, 2, language.get_input_embeddings().weight.shape[1]).to(head.weight)
        logits = language(inputs_embeds=embeds, use_cache=False, return_dict=True).logits
    if len(seen) < 3 or not bool(logits.any()):
        return None
    same = torch.equal(seen["decoded"], seen["taken"]) and torch.equal(seen["made"].float(), logits.float())
    return head if same else None
