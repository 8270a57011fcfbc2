"""Operations counted from shapes are those that torch counts as it computes, and those of the papers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from avlm.convert.compose import Composed
from avlm.data.encode import pack
from avlm.samples import Row
from avlm.training.counting.flops import StepFlops, language_attention

ATTENTION = ("scaled_dot_product", "flash_attention")


def torchs(model: Any, row: Row, *, backward: bool) -> dict[str, int]:
    """What torch counts in a pass over a row, by kind: products, and attention."""
    with FlopCounterMode(display=False) as counter:
        output = model(**row.inputs(), logits_to_keep=targets(row))
        if backward:
            output.logits.float().square().sum().backward()
    counts = counter.get_flop_counts()["Global"]
    attention = sum(n for op, n in counts.items() if any(kind in str(op) for kind in ATTENTION))
    return {"products": sum(counts.values()) - attention, "attention": attention}


def targets(row: Row) -> torch.Tensor:
    return (row.labels[0, 1:] != -100).nonzero().squeeze(1)


def ours(model: Any, row: Row, flops: StepFlops) -> int:
    flops.take()
    with flops.row(row):
        model(**row.inputs(), logits_to_keep=targets(row))
    return flops.take()


def make_row(made: Composed, make_sample: Callable[..., Any], *kinds: tuple[str, ...]) -> Row:
    return pack([made.processor.encode(make_sample(*kind, seed=i)) for i, kind in enumerate(kinds)])


@pytest.fixture
def row_of(make_sample: Callable[..., Any]) -> Callable[..., Row]:
    """Two samples of the same length, so that no attention is padded."""

    def make(made: Composed) -> Row:
        return make_row(made, make_sample, ("image", "audio"), ("image", "audio"))

    return make


FREE = {
    "all": (),
    "connectors alone": ("model.vision_tower", "model.audio_tower", "model.language_model"),
    "language model alone": ("model.vision", "model.audio"),
    "nothing": ("model",),
}


@pytest.mark.parametrize("frozen", FREE)
def test_as_many_products_as_torch_counts(
    make_model: Callable[..., Composed], row_of: Callable[..., Row], frozen: str
) -> None:
    made = make_model(vision={"vision_use_head": False})  # which nobody looks at
    model, row = made.model, row_of(made)
    model.plain_head()
    model(**row.inputs())  # the first pass looks whether rows can be packed
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(FREE[frozen]) if FREE[frozen] else True)
    learning = frozen != "nothing"
    flops = StepFlops(model)
    with torch.set_grad_enabled(learning):
        counted = ours(model, row, flops)
    whole = torchs(model, row, backward=learning)
    assert counted == pytest.approx(expected(model, row, whole, learning), rel=1e-12)


def expected(model: Any, row: Row, torch_counts: dict[str, int], learning: bool) -> int:
    """Products as torch counts them, and attention by hand; torch's own backward of attention computes scores twice."""
    text, vision, audio = (getattr(model.config, f"{part}_config") for part in ("text", "vision", "audio"))
    assert row.pixel_values is not None and row.input_features is not None
    patches = (vision.image_size // vision.patch_size) ** 2
    moments = row.input_features.shape[-1] // 2
    seen = 4 * len(row.pixel_values) * patches**2 * vision.hidden_size * vision.num_hidden_layers
    heard = 4 * len(row.input_features) * moments**2 * audio.d_model * audio.encoder_layers
    read = 4 * sum(n * n for n in row.lengths) * text.hidden_size * text.num_hidden_layers
    own = {
        "vision": next(model.model.vision_tower.parameters()).requires_grad,
        "audio": next(model.model.audio_tower.parameters()).requires_grad,
    }
    thrice = {name: 3 if learning and trained else 1 for name, trained in own.items()}
    attention = seen * thrice["vision"] + heard * thrice["audio"] + read * (3 if learning else 1)
    return torch_counts["products"] + attention


def test_attention_forward_is_what_torch_counts(
    make_model: Callable[..., Composed], row_of: Callable[..., Row]
) -> None:
    made = make_model(language={"num_key_value_heads": 4}, vision={"vision_use_head": False})
    model, row = made.model.eval(), row_of(made)
    model(**row.inputs())
    with torch.no_grad():
        fused = torchs(model, row, backward=False)  # torch does not count the processor's own fused attention
        with sdpa_kernel(SDPBackend.MATH):
            apart = torchs(model, row, backward=False)
    counted = apart["products"] - fused["products"]
    text, vision, audio = (getattr(model.config, f"{part}_config") for part in ("text", "vision", "audio"))
    assert row.pixel_values is not None and row.input_features is not None
    seen = 4 * len(row.pixel_values) * 4**2 * vision.hidden_size * vision.num_hidden_layers
    heard = (
        4 * len(row.input_features) * (row.input_features.shape[-1] // 2) ** 2 * audio.d_model * audio.encoder_layers
    )
    assert language_attention(text, row.lengths) + seen + heard == counted


def test_a_large_language_model_as_in_palm() -> None:
    """PaLM's appendix B: 12 L H Q T operations a token for attention, forward and backward; Llama 3 8B at 8,192."""
    from transformers import LlamaConfig

    config = LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8)
    length = 8192
    assert 3 * language_attention(config, [length]) == 12 * 32 * 32 * 128 * length * length


def test_a_window_is_as_far_as_attention_looks() -> None:
    from transformers import MistralConfig

    config = MistralConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, sliding_window=8)
    config.layer_types = ["full_attention", "sliding_attention"]
    assert language_attention(config, [10, 4]) == 4 * 64 * (100 + 16) + 4 * 64 * (80 + 16)


def test_experts_count_where_tokens_go(make_model: Callable[..., Composed], make_sample: Callable[..., Any]) -> None:
    """Of four experts two are used for each token: gate, up and down, three products each."""
    mixture = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    made = make_model("vision", language=mixture)
    row = make_row(made, make_sample, ())
    model = made.model.eval().requires_grad_(False)
    model(**row.inputs())
    flops = StepFlops(model)
    with torch.no_grad():
        counted = ours(model, row, flops)
    tokens, width, inner = sum(row.lengths), 32, 64
    dense = 2 * tokens * (width * width * 2 + width * 16 * 2)  # q and o, k and v
    experts = 2 * tokens * 2 * 3 * width * inner
    head = 2 * model.config.text_config.vocab_size * width * len(targets(row))
    assert counted == 2 * (dense + experts + 4 * tokens**2 * width) + head  # two layers


def test_nothing_is_counted_outside_a_row(make_model: Callable[..., Composed], row_of: Callable[..., Row]) -> None:
    made = make_model()
    flops = StepFlops(made.model)
    made.model(**row_of(made).inputs())
    assert flops.take() == 0
