"""Packed rows: every sample of a row comes out as it does alone, whatever language model reads it."""

import math
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from avlm.errors import LayoutError
from avlm.models import attention
from avlm.models.attention import packed_attention, packed_kwargs
from avlm.models.configuration import AvlmConfig
from avlm.models.modeling import AvlmForConditionalGeneration

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 4},
    "mixtral": EXPERTS,
    "gemma2": {"sliding_window": 4, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gpt_oss": {"sliding_window": 4, **EXPERTS},
}
"""Windows are shorter than most samples; gemma2 has soft caps, gpt_oss sinks; all have two key heads for four."""

NO_SDPA = {"gemma2", "gpt_oss"}
WAYS = [
    (family, way) for family in FAMILIES for way in ("avlm", "sdpa", "eager") if way != "sdpa" or family not in NO_SDPA
]


def lengths_of(seed: int, count: int = 5) -> list[int]:
    """Lengths from 2 to 19, and one sample of a single token among them."""
    drawn = np.random.default_rng(seed).integers(2, 20, count).tolist()
    return [*drawn[:2], 1, *drawn[2:]]


def transformers_model(family: str, **changes: Any) -> PreTrainedModel:
    """A tiny model of a family as transformers runs it by itself, with weights large enough for every leak to show."""
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES.get(family, {}), **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or "sink" in name:
                parameter.normal_(0, 0.25)
    return model


def ours(reference: PreTrainedModel, way: str | None) -> AvlmForConditionalGeneration:
    """The same weights inside our model, text alone."""
    model = AvlmForConditionalGeneration(AvlmConfig(reference.config.to_dict())).eval()
    model.language_model.load_state_dict(reference.state_dict())
    if way is not None:
        model.language_model.set_attn_implementation(way)
    return model


def token_rows(lengths: list[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 64, (1, length), generator=generator) for length in lengths]


def gradients(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    named = {n.removeprefix("model.language_model."): p for n, p in model.named_parameters()}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.detach().abs().max()) + 1e-9)


# ---------------------------------------------------------------- whole language models


@pytest.mark.parametrize(("family", "way"), WAYS)
def test_a_packed_row_is_each_sample_alone(family: str, way: str) -> None:
    reference = transformers_model(family)
    lengths = lengths_of(seed=len(family))
    samples = token_rows(lengths)
    weights = torch.randn(sum(lengths), 64, generator=torch.Generator().manual_seed(1))
    model = ours(reference, way)

    alone = torch.cat([reference(input_ids=ids, use_cache=False).logits for ids in samples], 1)
    packed = model(input_ids=torch.cat(samples, 1), row_lengths=lengths).logits

    close(packed, alone)
    theirs = gradients(reference, (alone[0] * weights).sum())
    for name, gradient in gradients(model, (packed[0] * weights).sum()).items():
        close(gradient, theirs[name])


@pytest.mark.parametrize(
    ("family", "way"), [("llama", "avlm"), ("mistral", "avlm"), ("gpt_oss", "avlm"), ("llama", "sdpa")]
)
def test_nothing_crosses_a_border(family: str, way: str) -> None:
    model = ours(transformers_model(family), way)
    lengths = [5, 1, 9, 4]
    samples = token_rows(lengths)
    before = model(input_ids=torch.cat(samples, 1), row_lengths=lengths).logits
    samples[2] = (samples[2] + 7) % 60 + 3
    after = model(input_ids=torch.cat(samples, 1), row_lengths=lengths).logits

    others = [*range(6), *range(15, 19)]
    torch.testing.assert_close(after[:, others], before[:, others], rtol=0, atol=1e-6)
    assert (after[:, 6:15] - before[:, 6:15]).abs().max() > 0.1


def test_without_borders_the_samples_would_see_each_other() -> None:
    reference = transformers_model("llama")
    lengths = [5, 6]
    samples = token_rows(lengths)
    alone = torch.cat([reference(input_ids=ids).logits for ids in samples], 1)
    joined = ours(reference, "avlm")(input_ids=torch.cat(samples, 1)).logits
    assert (joined[:, 5:] - alone[:, 5:]).abs().max() > 0.1


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_is_what_transformers_makes_of_it(family: str, side: str) -> None:
    reference = transformers_model(family)
    if family not in NO_SDPA:
        reference.set_attn_implementation("sdpa")
    lengths = [7, 1, 12]
    ids, mask = torch.zeros(3, 12, dtype=torch.long), torch.zeros(3, 12, dtype=torch.long)
    for i, row in enumerate(token_rows(lengths)):
        at = slice(12 - lengths[i], 12) if side == "left" else slice(0, lengths[i])
        ids[i, at], mask[i, at] = row[0], 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = reference(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    found = ours(reference, "avlm")(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    close(found[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "mistral"])
def test_decoding_with_a_cache_is_reading_the_whole(family: str) -> None:
    reference = transformers_model(family)
    model = ours(reference, "avlm")
    (ids,) = token_rows([11])
    expected = reference(input_ids=ids).logits
    cache, found = None, []
    for step in ids.split([6, 1, 1, 1, 1, 1], dim=1):
        output = model(input_ids=step, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        found.append(output.logits)
    close(torch.cat(found, 1), expected)


def test_rows_packed_the_way_of_flash_attention_need_no_lengths_beside_the_borders() -> None:
    reference = transformers_model("llama")
    lengths = [4, 9, 1]
    samples = token_rows(lengths)
    model = reference.__class__(reference.config)
    model.load_state_dict(reference.state_dict())
    model.eval().set_attn_implementation("avlm")
    borders = packed_kwargs(lengths, torch.device("cpu"))
    del borders["row_lengths"]
    packed = model(
        input_ids=torch.cat(samples, 1),
        position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
        use_cache=False,
        **borders,
    ).logits
    close(packed, torch.cat([reference(input_ids=ids).logits for ids in samples], 1))


def test_what_inference_mode_remembers_can_be_trained_on() -> None:
    model = ours(transformers_model("llama"), "avlm")
    lengths = [3, 8, 5]
    ids = torch.cat(token_rows(lengths), 1)
    attention._groups.cache_clear()
    with torch.inference_mode():
        model(input_ids=ids, row_lengths=lengths)
    model(input_ids=ids, row_lengths=lengths).logits.sum().backward()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0


# ---------------------------------------------------------------- those that cannot be packed

UNPACKABLE: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_ff_dim": 32},
    "llama4_text": {
        "layer_types": ["chunked_attention", "full_attention"],
        "attention_chunk_size": 3,
        "intermediate_size_mlp": 32,
        **EXPERTS,
    },
    "nemotron": {},
    "bloom": {"n_layer": 2, "n_head": 4},
    "falcon_mamba": {"state_size": 4},
}
"""A convolution along the row, a pattern that stands in the mask alone, borders that are dropped on the way, a bias, a
state along the row."""


@pytest.mark.parametrize("family", UNPACKABLE)
@pytest.mark.parametrize("way", [None, "avlm"])
def test_a_model_that_cannot_be_packed_reads_padded_rows_with_the_same_result(
    family: str, way: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr("avlm.models.modeling.logger.warning_once", warnings.append)
    reference = transformers_model(family, **UNPACKABLE[family])
    lengths = [7, 1, 5]
    samples = token_rows(lengths)
    model = ours(reference, None)
    if way is not None:
        attention.use(model.language_model)
    at = torch.tensor([0, 6, 7, 12])

    alone = torch.cat([reference(input_ids=ids, use_cache=False).logits for ids in samples], 1)
    packed = model(input_ids=torch.cat(samples, 1), row_lengths=lengths)
    kept = model(input_ids=torch.cat(samples, 1), row_lengths=lengths, logits_to_keep=at).logits

    close(packed.logits, alone)
    close(kept, alone[:, at])
    assert len(warnings) == 2 and "cannot keep the samples of a packed row apart" in warnings[0]
    assert not model.model._packs


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_can_be_packed_is(family: str) -> None:
    model = ours(transformers_model(family), None)
    attention.use(model.language_model)
    model(input_ids=torch.cat(token_rows([3, 4]), 1), row_lengths=[3, 4])
    assert model.language_model.config._attn_implementation == "avlm"
    assert model.model._packs is True


def test_models_that_attend_in_their_own_way_keep_it() -> None:
    model = transformers_model("llama4_text", **UNPACKABLE["llama4_text"])
    before = model.config._attn_implementation
    attention.use(model)
    assert model.config._attn_implementation == before != "avlm"


# ---------------------------------------------------------------- the function itself


def slow_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: list[int],
    *,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """One query at a time, one head at a time."""
    heads, groups = query.shape[1], query.shape[1] // key.shape[1]
    out = torch.zeros(query.shape[2], heads, value.shape[-1], dtype=query.dtype)
    for start, stop in zip([0, *accumulate(lengths)], accumulate(lengths), strict=False):
        for i in range(start, stop):
            for h in range(heads):
                seen = [
                    j for j in range(start, stop) if (not causal or j <= i) and (window is None or abs(i - j) < window)
                ]
                scores = [float(query[0, h, i] @ key[0, h // groups, j]) / math.sqrt(query.shape[-1]) for j in seen]
                if softcap is not None:
                    scores = [softcap * math.tanh(s / softcap) for s in scores]
                top = max([*scores, *([] if sinks is None else [float(sinks[h])])])
                parts = [math.exp(s - top) for s in scores]
                total = sum(parts) + (0.0 if sinks is None else math.exp(float(sinks[h]) - top))
                for j, part in zip(seen, parts, strict=True):
                    out[i, h] += part / total * value[0, h // groups, j]
    return out[None]


class Module(torch.nn.Module):
    is_causal = True


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"window": 3},
        {"causal": False},
        {"causal": False, "window": 2},
        {"softcap": 1.5},
        {"softcap": 1.5, "window": 4},
        {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)},
        {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64), "window": 2, "causal": False},
    ],
)
def test_matches_the_slow_loop(how: dict[str, Any]) -> None:
    lengths = [6, 1, 5, 3]
    torch.manual_seed(3)
    query = torch.randn(1, 4, 15, 8, dtype=torch.float64)
    key, value = torch.randn(1, 2, 15, 8, dtype=torch.float64), torch.randn(1, 2, 15, 6, dtype=torch.float64)
    named = {"window": "sliding_window", "softcap": "softcap", "sinks": "s_aux", "causal": "is_causal"}
    found, weights = packed_attention(
        Module(),
        query,
        key,
        value,
        None,
        **{named[k]: v for k, v in how.items()},
        **packed_kwargs(lengths, torch.device("cpu")),
    )
    assert weights is None and found.is_contiguous()
    torch.testing.assert_close(found, slow_attention(query, key, value, lengths, **how), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("few", [1, 10_000], ids=["one by one", "in groups"])
@pytest.mark.parametrize("how", [{}, {"window": 3}, {"causal": False}, {"softcap": 1.5}])
def test_samples_one_by_one_are_samples_in_groups(
    few: int, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways match the slow loop; which one is taken depends on how long the samples are."""
    monkeypatch.setattr(attention, "FEW", few)
    attention._groups.cache_clear()
    lengths = [6, 1, 5, 3, 6]
    assert (attention._groups(tuple(lengths), torch.device("cpu"))[1] is None) == (few == 1)
    torch.manual_seed(3)
    query, key, value = (torch.randn(1, heads, 21, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    named = {"window": "sliding_window", "softcap": "softcap", "causal": "is_causal"}
    wanted = {named[k]: v for k, v in how.items()}
    borders = packed_kwargs(lengths, torch.device("cpu"))

    def attend(*given: Tensor) -> Tensor:
        return packed_attention(Module(), *given, None, **wanted, **borders)[0]

    expected = slow_attention(query.detach(), key.detach(), value.detach(), lengths, **how)
    torch.testing.assert_close(attend(query, key, value), expected, rtol=1e-6, atol=1e-6)
    if "softcap" not in how:  # whose softmax is taken in float32, too coarse for differences
        assert torch.autograd.gradcheck(attend, (query, key, value), fast_mode=True)
    attention._groups.cache_clear()


@pytest.mark.parametrize("how", [{}, {"window": 3}, {"causal": False}, {"causal": False, "window": 2}])
def test_torchs_kernel_for_rows_is_asked_for_the_same(how: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel runs on CUDA alone: here a slow one stands in for it that does what its documentation says."""

    def documented(q: Tensor, k: Tensor, v: Tensor, q_at: Tensor, k_at: Tensor, max_q: int, max_k: int, *,
                   scale: float, window_size: tuple[int, int], enable_gqa: bool) -> Tensor:  # fmt: skip
        assert q_at is k_at and q_at.dtype == torch.int32 and max_q == max_k == 6 and enable_gqa
        before, behind = window_size
        out = torch.zeros(len(q), q.shape[1], v.shape[2], dtype=q.dtype)
        for start, stop in zip(q_at[:-1].tolist(), q_at[1:].tolist(), strict=True):
            for i in range(start, stop):
                first = start if before < 0 else max(start, i - before)
                last = stop if behind < 0 else min(stop, i + behind + 1)
                for h in range(q.shape[1]):
                    scores = k[first:last, h // 2] @ q[i, h] * scale
                    out[i, h] = scores.softmax(0) @ v[first:last, h // 2]
        return out

    monkeypatch.setattr(attention, "varlen_attn", documented)
    lengths = [6, 1, 5, 3]
    torch.manual_seed(3)
    query, key, value = (torch.randn(1, heads, 15, 8, dtype=torch.float64) for heads in (4, 2, 2))
    wanted = attention.How(how.get("causal", True), how.get("window"), 8**-0.5, 0.0, None, None)
    borders = packed_kwargs(lengths, torch.device("cpu"))["cu_seq_lens_q"]
    found = attention._varlen(query, key, value, borders, max(lengths), wanted)[None]
    torch.testing.assert_close(found, slow_attention(query, key, value, lengths, **how), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("rows", "lengths"), [(1, [3, 4]), (1, [3, 6]), (2, [4, 4])])
def test_borders_that_do_not_cut_the_row_are_refused(rows: int, lengths: list[int]) -> None:
    tensor = torch.randn(rows, 2, 8, 4)
    with pytest.raises(LayoutError, match="A packed batch is one row"):
        packed_attention(Module(), tensor, tensor, tensor, None, **packed_kwargs(lengths, torch.device("cpu")))


def test_an_attention_bias_is_refused_in_a_packed_row() -> None:
    tensor = torch.randn(1, 2, 8, 4)
    with pytest.raises(LayoutError) as error:
        packed_attention(
            Module(), tensor, tensor, tensor, None, position_bias=tensor, **packed_kwargs([8], torch.device("cpu"))
        )
    assert str(error.value) == (
        "Module adds a bias to its attention, which cannot be cut at the borders of a packed row. "
        "Run this model on padded rows"
    )


@pytest.mark.parametrize(
    ("batch", "lengths", "message"),
    [
        ((1, 9), [4, 4], "row_lengths add up to 8 tokens, and the batch has 1 rows of 9"),
        ((2, 4), [4, 4], "row_lengths add up to 8 tokens, and the batch has 2 rows of 4"),
    ],
)
def test_row_lengths_that_are_not_the_rows_are_refused(
    batch: tuple[int, int], lengths: list[int], message: str
) -> None:
    model = ours(transformers_model("llama"), "avlm")
    with pytest.raises(LayoutError, match=message):
        model(input_ids=torch.full(batch, 5), row_lengths=lengths)


@torch.no_grad()
def test_a_mask_over_a_packed_row_is_refused_and_not_ignored() -> None:
    model = ours(transformers_model("llama"), "avlm")
    ids, lengths = torch.arange(3, 11)[None], [5, 3]
    mask = torch.ones_like(ids)
    expected = model(input_ids=ids, row_lengths=lengths).logits
    assert torch.equal(model(input_ids=ids, row_lengths=lengths, attention_mask=mask).logits, expected)
    mask[0, 1] = 0
    with pytest.raises(LayoutError) as error:
        model(input_ids=ids, row_lengths=lengths, attention_mask=mask)
    assert str(error.value) == (
        "attention_mask hides tokens of a packed row, and row_lengths alone say who sees whom in one, so the mask "
        "would do nothing. Leave row_lengths out for a padded batch, or attention_mask for a packed row"
    )
    padded = model(input_ids=ids, attention_mask=mask).logits  # the advice holds: there it counts
    assert not torch.allclose(padded[:, 2:], model(input_ids=ids).logits[:, 2:])
