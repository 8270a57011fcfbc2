"""The chunked loss is torch's own cross-entropy, and so are its gradients."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from avlm.training import cross_entropy
from avlm.training.cross_entropy import linear_cross_entropy


def torch_says(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, smoothing: float) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="sum", label_smoothing=smoothing)


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(0, 40),
    width=st.integers(1, 9),
    words=st.integers(2, 50),
    chunk=st.integers(1, 600),
    smoothing=st.sampled_from([0.0, 0.1, 0.9]),
    biased=st.booleans(),
    seed=st.integers(0, 99),
)
def test_loss_and_gradients_are_torchs(
    count: int, width: int, words: int, chunk: int, smoothing: float, biased: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    given = [torch.randn(count, width), torch.randn(words, width)] + ([torch.randn(words)] if biased else [])
    targets = torch.randint(words, (count,))
    found: list[list[Tensor]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "CHUNK_VALUES", chunk)
        for ours in (True, False):
            hidden, weight, *rest = (
                x.double().requires_grad_() if not ours else x.clone().requires_grad_() for x in given
            )
            bias = rest[0] if rest else None
            if ours:
                loss = linear_cross_entropy(hidden, weight, targets, bias_V=bias, smoothing=smoothing)
            else:
                loss = torch_says(hidden, weight, bias, targets, smoothing)
            torch.autograd.backward(loss / max(1, count))
            assert hidden.grad is not None and weight.grad is not None
            found.append([loss.detach(), hidden.grad, weight.grad] + ([bias.grad] if bias is not None else []))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-6 * max(1, count))


def test_what_is_frozen_gets_no_gradient() -> None:
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(7, 4)
    targets = torch.randint(7, (5,))
    torch.autograd.backward(linear_cross_entropy(hidden, weight, targets))
    assert hidden.grad is not None and weight.grad is None
    frozen = linear_cross_entropy(hidden.detach(), weight, targets)
    assert not frozen.requires_grad
    torch.testing.assert_close(frozen, torch_says(hidden.detach(), weight, None, targets, 0.0))


def test_a_second_backward_is_refused_rather_than_wrong() -> None:
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.randint(7, (5,)))
    torch.autograd.backward(loss, retain_graph=True)
    with pytest.raises(ValueError, match="unpack"):
        torch.autograd.backward(loss)


def test_half_precision_is_as_near_as_torchs_own() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 32), torch.randn(500, 32)
    targets = torch.randint(500, (64,))
    exact = torch_says(hidden, weight, None, targets, 0.0)
    half = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets)
    theirs = torch_says(hidden.bfloat16(), weight.bfloat16(), None, targets, 0.0)
    assert abs(half - exact) <= abs(theirs.float() - exact) + 1e-2


def test_where_nothing_is_learned_no_gradient_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((5, 4), (7, 4), (7,)))
    targets = torch.tensor([0, 6, 3, 3, 1])
    learned = []
    plain = cross_entropy._chunk

    def watched(*given: Any) -> Any:
        learned.append(given[-1])
        return plain(*given)

    monkeypatch.setattr(cross_entropy, "_chunk", watched)
    with torch.no_grad():
        silent = linear_cross_entropy(hidden, weight, targets, bias_V=bias)
    loud = linear_cross_entropy(hidden, weight, targets, bias_V=bias)
    assert learned == [False, True]
    assert torch.equal(silent, loud.detach())
