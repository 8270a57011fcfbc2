"""One token of one answer in NumPy is what transformers' own decoder makes of the whole text."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from test_written import SHAPED
from torch import Tensor

from avlm.models import vectors
from avlm.models.single import Single
from avlm.models.slots import Run, Slots, Step
from avlm.models.written import layers_of, written_out

CPU = torch.device("cpu")
ACTS: dict[str, dict[str, Any]] = {
    "another activation": {"hidden_act": "gelu_pytorch_tanh"},
    "relu": {"hidden_act": "relu"},
}


def token_by_token(language: Any, embeds_TD: Tensor, first: int) -> Tensor:
    """Hidden states of a text from the last of its first tokens on, which are read at once."""
    layers = layers_of(language)
    assert layers is not None
    written = written_out(language, layers)
    assert written is not None
    slots = Slots(len(layers))
    steps = [Step([], [Run(0, 0, first)], CPU)] + [Step([past], [], CPU) for past in range(first, len(embeds_TD))]
    found, at = [], 0
    for step in steps:
        slots.reserve(1, step.needed)
        slots.step = step
        found.append(written.read(embeds_TD[at : at + step.tokens], step, slots))
        at += step.tokens
    return torch.cat(found)


@pytest.fixture(params=["NumPy multiplies", "torch multiplies"])
def calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Places of the tokens that were read in NumPy, with either library for matrices."""
    monkeypatch.setattr(vectors, "one_thread", lambda: request.param == "NumPy multiplies")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    places: list[int] = []
    read = Single.read
    monkeypatch.setattr(Single, "read", lambda own, x, t, place, s: places.append(place) or read(own, x, t, place, s))
    return places


@pytest.mark.parametrize("family", [*SHAPED, *ACTS])
def test_a_text_read_token_by_token_is_the_text_read_at_once(
    family: str, make_model: Callable[..., Any], calls: list[int]
) -> None:
    model, _ = make_model(language={**SHAPED, **ACTS}[family])
    language = model.language_model
    width = language.get_input_embeddings().weight.shape[1]
    embeds = torch.randn(9, width, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        found = token_by_token(language, embeds, 4)
        wanted = language.get_decoder()(inputs_embeds=embeds[None]).last_hidden_state[0]
    assert calls[-5:] == [4, 5, 6, 7, 8]
    torch.testing.assert_close(found, wanted[3:], rtol=1e-4, atol=1e-5)


def test_values_beyond_the_range_of_exponentials_warn_of_nothing(
    make_model: Callable[..., Any], calls: list[int]
) -> None:
    model, _ = make_model()
    language = model.language_model
    with torch.no_grad():
        for layer in language.get_decoder().layers:
            layer.mlp.gate_proj.weight.mul_(3000)
    embeds = torch.randn(5, language.get_input_embeddings().weight.shape[1], generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        found = token_by_token(language, embeds, 2)
        wanted = language.get_decoder()(inputs_embeds=embeds[None]).last_hidden_state[0]
    assert calls and bool(torch.isfinite(found).all())
    torch.testing.assert_close(found, wanted[1:], rtol=1e-3, atol=1e-4)


def test_a_hidden_state_is_nobody_elses_memory(make_model: Callable[..., Any], calls: list[int]) -> None:
    """What was handed out does not change with the next token."""
    model, _ = make_model()
    embeds = torch.randn(4, model.get_input_embeddings().weight.shape[1])
    with torch.inference_mode():
        before = embeds.clone()
        states = token_by_token(model.language_model, embeds, 1)
        again = token_by_token(model.language_model, embeds[:3], 1)
    assert torch.equal(embeds, before)
    np.testing.assert_array_equal(states[:3].numpy(), again.numpy())
