"""A layer that is read is what the encoder's own output has there, and nothing behind it is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    Aimv2VisionConfig,
    Aimv2VisionModel,
    BitConfig,
    BitModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from avlm.models.depth import read_layer

VIT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
TOWERS: dict[str, Callable[[], PreTrainedModel]] = {
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**VIT)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**VIT)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**VIT)),
    "registers": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**VIT)),
    "dinov3": lambda: DINOv3ViTModel(DINOv3ViTConfig(**VIT)),
    "aimv2": lambda: Aimv2VisionModel(Aimv2VisionConfig(**VIT)),
}


def tower(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return TOWERS[name]().eval()


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("layer", range(-5, 5))
def test_the_layer_is_the_encoders_own(name: str, layer: int) -> None:
    model, pixels = tower(name), torch.randn(2, 3, 28, 28)
    theirs = model(pixels, output_hidden_states=True).hidden_states[layer]
    ours = read_layer(model, layer, pixels)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    torch.testing.assert_close(model(pixels, output_hidden_states=True).hidden_states[layer], theirs, rtol=0, atol=0)


@pytest.mark.parametrize(("layer", "computed"), [(-2, 3), (1, 1), (-1, 4), (0, 4)])
def test_what_lies_behind_it_is_not_computed(layer: int, computed: int) -> None:
    model, calls = tower("clip"), []
    names = list(dict(model.named_parameters()))
    for inner in model.encoder.layers:
        inner.register_forward_hook(lambda *_: calls.append(1))
    read_layer(model, layer, torch.randn(1, 3, 28, 28))
    assert len(calls) == computed
    assert list(dict(model.named_parameters())) == names


def test_the_layers_are_put_back_when_a_picture_fails() -> None:
    model = tower("clip")
    with pytest.raises(ValueError, match="doesn't match"):
        read_layer(model, -2, torch.randn(1, 3, 14, 14))
    assert len(model.encoder.layers) == 4
    assert not any(layer._forward_hooks for layer in model.encoder.layers)


def test_gradients_are_those_of_the_whole() -> None:
    pixels = torch.randn(1, 3, 28, 28)
    whole, short = tower("clip"), tower("clip")
    whole(pixels, output_hidden_states=True).hidden_states[-2].square().sum().backward()
    read_layer(short, -2, pixels).square().sum().backward()
    for a, b in zip(whole.parameters(), short.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, rtol=0, atol=0)


def test_maps_are_read_whole() -> None:
    model = BitModel(BitConfig(hidden_sizes=[16, 32], depths=[1, 1], embedding_size=16, num_groups=4)).eval()
    pixels = torch.randn(1, 3, 32, 32)
    theirs = model(pixels, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(read_layer(model, -1, pixels), theirs, rtol=0, atol=0)
