"""What a run computes again comes out as it would have without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from avlm.config.io import build
from avlm.config.model import ModelConfig
from avlm.config.speed import Recompute, Speed
from avlm.convert.compose import compose
from avlm.data.encode import pack
from avlm.errors import ConfigError
from avlm.layout import Segment
from avlm.models.modeling import AvlmForConditionalGeneration
from avlm.samples import Encoded, Place
from avlm.training.loss import row_loss
from avlm.training.quicken import quicken, recompute_layers, use_liger
from avlm.training.stages import prepare, set_modes
from tests.conftest import LLAMA, SIGLIP, TEMPLATE
from tests.training.steps import stage

LAYERS = 5
BOTH: dict[str, Any] = {"language": {"lr": 1e-3}, "vision": {"lr": 1e-3}, "vision_connector": {"lr": 1e-3}}


def small(**language: Any) -> AvlmForConditionalGeneration:
    config = {
        "language": {"random": {**LLAMA, "num_hidden_layers": LAYERS, **language}, "chat_template": TEMPLATE},
        "vision": {"encoder": {"random": {**SIGLIP, "num_hidden_layers": 3}}},
    }
    return compose(build(ModelConfig, config), seed=1, texts=["one red two blue"] * 3).model


def row(model: AvlmForConditionalGeneration) -> Any:
    places = [int(model.config.image_token_id)] * 4
    ids = [200, *places, *range(10, 40)]
    seen = Encoded("seen", ids, [-100] * 10 + ids[10:], images=[torch.randn(3, 28, 28)], tiles=[1])
    seen.places = [Place("seen", 0, (Segment("image", 4),))]
    return pack([seen, Encoded("read", list(range(9, 30)), list(range(9, 30)))])


def gradients(model: AvlmForConditionalGeneration, given: Any, train: dict[str, Any], speed: Speed) -> dict[str, Any]:
    trained = prepare(model, stage(train))
    set_modes(model, trained)
    quicken(model, speed, trained)
    torch.manual_seed(3)
    row_loss(model, given).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("train", [BOTH, {"vision_connector": {"lr": 1e-3}}], ids=["everything", "connector"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("every", [1, 2])
def test_what_is_computed_again_is_the_same_to_the_bit(train: dict[str, Any], dropout: float, every: int) -> None:
    if dropout and train is not BOTH:
        pytest.skip("refused; see below")
    torch.manual_seed(0)
    given = row(small(attention_dropout=dropout))
    how = Speed(recompute=Recompute(parts=("language", "vision"), every=every))
    plain = gradients(small(attention_dropout=dropout), given, train, Speed())
    again = gradients(small(attention_dropout=dropout), given, train, how)
    assert plain.keys() == again.keys() and plain
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=0, atol=0)


@pytest.mark.parametrize(("every", "count"), [(1, 5), (2, 3), (3, 2), (9, 1)])
def test_every_so_manieth_layer_runs_twice(every: int, count: int) -> None:
    model = small()
    given, calls = row(model), []
    assert model.plain_head() is not None  # which it finds out by running the model once
    trained = prepare(model, stage(BOTH))
    set_modes(model, trained)
    assert recompute_layers(model, Recompute(every=every), trained) == {"language": count}
    for layer in model.language_model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    row_loss(model, given).backward()
    assert len(calls) == LAYERS + count


def kept(model: nn.Module, given: Any, train: dict[str, Any], speed: Speed) -> int:
    """Bytes that a forward pass keeps for the backward pass."""
    held: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    trained = prepare(model, stage(train))  # type: ignore[arg-type]
    set_modes(model, trained)
    quicken(model, speed, trained)  # type: ignore[arg-type]
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        row_loss(model, given)  # type: ignore[arg-type]
    return sum(size for at, size in held.items() if at not in weights)


@pytest.mark.parametrize("train", [BOTH, {"vision_connector": {"lr": 1e-3}}], ids=["everything", "connector"])
def test_less_is_kept(train: dict[str, Any]) -> None:
    given = row(small())
    plain = kept(small(), given, train, Speed())
    half = kept(small(), given, train, Speed(recompute=Recompute(every=2)))
    none = kept(small(), given, train, Speed(recompute=Recompute()))
    assert none < 0.6 * half and half < 0.8 * plain


def test_a_frozen_encoder_is_passed_over() -> None:
    model = small()
    trained = prepare(model, stage({"vision_connector": {"lr": 1e-3}}))
    set_modes(model, trained)
    assert recompute_layers(model, Recompute(parts=("vision", "language")), trained) == {"language": LAYERS}
    frozen = [m for m in model.model.vision_tower.modules() if m.training]
    assert frozen == []


def test_a_frozen_part_that_would_drop_is_refused() -> None:
    model = small(attention_dropout=0.3)
    trained = prepare(model, stage({"vision_connector": {"lr": 1e-3}}))
    with pytest.raises(ConfigError) as error:
        recompute_layers(model, Recompute(), trained)
    assert str(error.value) == (
        "speed.recompute.parts=language: the part is frozen in this stage, and its configuration has "
        "attention_dropout=0.3, which a layer that is computed again would apply. "
        "Leave language out of speed.recompute.parts"
    )


def test_kernels_that_are_not_there_are_refused() -> None:
    model = small()
    assert use_liger(model, needed=False) is False
    with pytest.raises(ConfigError, match=r"^speed.liger=on: .*Set speed.liger=auto"):
        use_liger(model, needed=True)
