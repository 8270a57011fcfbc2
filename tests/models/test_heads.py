"""Which language models' logits are one matrix times the last hidden states is seen, not assumed."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from avlm.models.heads import plain_head

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}


def language(kind: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **settings))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "mixtral", "gemma", "qwen3"])
@pytest.mark.parametrize("training", [True, False])
def test_a_plain_head_is_found(kind: str, training: bool) -> None:
    model = language(kind, attention_dropout=0.5).train(training)
    before = torch.random.get_rng_state()
    head = plain_head(model)
    assert head is model.lm_head
    assert torch.equal(torch.random.get_rng_state(), before)
    ids = torch.tensor([[1, 2, 3]])
    model.eval()
    torch.testing.assert_close(head(model.get_decoder()(ids).last_hidden_state), model(ids).logits)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("gemma2", {"final_logit_softcapping": 0.1}),
        ("cohere", {"logit_scale": 0.5}),
        ("granite", {"logits_scaling": 8.0}),
    ],
)
def test_a_head_with_something_behind_it_is_none(kind: str, settings: dict[str, Any]) -> None:
    assert plain_head(language(kind, **settings)) is None
