"""A decoder written out makes what the family's own code makes, or is not used."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from avlm.inference.generate import generate
from avlm.inference.sampling import Sampling
from avlm.models import attention
from avlm.models.slots import Run, Slots, Step
from avlm.models.written import layers_of, written_out
from avlm.samples import Sample

SHAPED: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, heads of their own width": {"head_dim": 16},
    "llama, biases": {"attention_bias": True, "mlp_bias": True},
    "llama, stretched positions": {
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0},
        "max_position_embeddings": 512,
    },
    "mistral without windows": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 8},
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 1]},
}
OTHERS: dict[str, dict[str, Any]] = {
    "mistral with windows": {"model_type": "mistral", "sliding_window": 4},
    "granite, which scales": {
        "model_type": "granite", "residual_multiplier": 0.5, "attention_multiplier": 0.1, "embedding_multiplier": 3.0,
    },
    "smollm3, a layer without positions": {"model_type": "smollm3", "no_rope_layers": [1, 0]},
    "gemma, norms around one": {"model_type": "gemma", "head_dim": 8},
    "olmo2, norms behind": {"model_type": "olmo2"},
    "helium, neighbours turned": {"model_type": "helium", "head_dim": 8},
    "phi3, one matrix for three": {"model_type": "phi3", "pad_token_id": 0},
}  # fmt: skip


def answers(model: Any, processor: Any, make_sample: Callable[..., Sample]) -> tuple[Any, Any]:
    """Of a batch in slots, and one by one, reading all anew for every token."""
    prompts = [
        processor.encode(make_sample(*k, seed=i), prompt_only=True) for i, k in enumerate(([], ["image"], ["audio"]))
    ]
    together = generate(model, processor, prompts, Sampling(max_tokens=6))
    return together, generate(model, processor, prompts, Sampling(max_tokens=6), use_cache=False)


@pytest.mark.parametrize("family", SHAPED)
def test_families_of_the_shape_are_written_out(
    family: str, make_model: Callable[..., Any], make_sample: Callable[..., Sample]
) -> None:
    model, processor = make_model(language=SHAPED[family])
    assert model.written_out() is not None
    found, wanted = answers(model, processor, make_sample)
    assert found == wanted and len({tuple(answer) for answer in found}) > 1


@pytest.mark.parametrize("family", OTHERS)
def test_families_that_differ_go_their_own_way(
    family: str, make_model: Callable[..., Any], make_sample: Callable[..., Sample]
) -> None:
    model, processor = make_model(language=OTHERS[family])
    assert model.written_out() is None
    found, wanted = answers(model, processor, make_sample)
    assert found == wanted


def test_weights_that_changed_are_the_ones_that_are_read(
    make_model: Callable[..., Any], make_sample: Callable[..., Sample]
) -> None:
    model, processor = make_model()
    before, _ = answers(model, processor, make_sample)
    with torch.no_grad():
        for parameter in model.language_model.parameters():
            parameter.mul_(-1.5)  # in place, as learning does
    found, wanted = answers(model, processor, make_sample)
    assert found == wanted != before
    first = model.written_out()
    layer = model.language_model.get_decoder().layers[0]
    layer.self_attn.q_proj.weight = torch.nn.Parameter(torch.randn_like(layer.self_attn.q_proj.weight))
    found, wanted = answers(model, processor, make_sample)
    assert found == wanted and model.written_out() is not first


def test_whoever_listens_in_is_heard(make_model: Callable[..., Any], make_sample: Callable[..., Sample]) -> None:
    model, processor = make_model()
    assert model.written_out() is not None
    heard: list[int] = []
    hook = model.language_model.get_decoder().layers[0].register_forward_hook(lambda *_: heard.append(1))
    assert model.written_out() is None
    answers(model, processor, make_sample)
    assert heard
    hook.remove()
    assert model.written_out() is not None


def test_adapters_and_other_precisions_are_left_to_the_family(make_model: Callable[..., Any]) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model, _ = make_model()
    model.train()
    assert layers_of(model.language_model) is None
    model.eval()
    assert layers_of(model.language_model.to(torch.bfloat16)) is None
    assert layers_of(model.language_model.to(torch.float32)) is not None
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), model.language_model)
    assert layers_of(model.language_model) is None


PIECES = st.lists(st.tuples(st.integers(1, 4), st.booleans()), max_size=3)


@settings(deadline=None, max_examples=25)
@given(texts=st.lists(PIECES, min_size=1, max_size=3))
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_texts_read_in_pieces_are_known_where_a_piece_ends(family: str, texts: list[list[tuple[int, bool]]]) -> None:
    """Several texts side by side, each in pieces of so many tokens, of which only some have their end asked for."""
    language = languages(family)
    written = written_out(language, layers_of(language) or [])
    assert written is not None
    embeds = [torch.randn(12, 32, generator=torch.Generator().manual_seed(i)) for i in range(len(texts))]
    slots, pasts = Slots(len(written.layers)), [0] * len(texts)
    for number in range(max(map(len, texts))):
        own = [(i, *pieces[number]) for i, pieces in enumerate(texts) if number < len(pieces)]
        runs = [Run(i, pasts[i], count, ends) for i, count, ends in own]
        step = slots.step = Step([], runs, torch.device("cpu"))
        slots.reserve(len(texts), step.needed)
        pieces = [embeds[run.slot][run.past : run.past + run.count] for run in runs]
        pasts = [pasts[i] + sum(run.count for run in runs if run.slot == i) for i in range(len(texts))]
        with torch.inference_mode():
            found = written.read(torch.cat(pieces), step, slots)
            wholes = [embeds[run.slot][None, : pasts[run.slot]] for run in runs if run.ends]
            wanted = [language.get_decoder()(inputs_embeds=whole).last_hidden_state[0, -1] for whole in wholes]
        assert len(found) == len(wanted)
        for state, known in zip(found, wanted, strict=True):
            torch.testing.assert_close(state, known, rtol=1e-4, atol=1e-5)


@cache
def languages(family: str) -> Any:
    """A small language model of a family, of width 32."""
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = AutoConfig.for_model(family, **small, num_key_value_heads=2, head_dim=8, vocab_size=20)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME).eval()
