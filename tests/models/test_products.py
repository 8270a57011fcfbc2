"""float32 products by another library are float32 products still."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from avlm.models import products
from avlm.models.products import by_onednn, exact, fast_products, half_used, wide

USED = pytest.mark.skipif(not half_used(*products.processor()), reason="MKL uses all of this processor")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    how = torch.backends.mkldnn.matmul
    before = how.fp32_precision
    yield
    assert how.fp32_precision == before


@pytest.mark.parametrize(
    ("machine", "maker", "capability", "half"),
    [
        ("x86_64", "AuthenticAMD", "AVX512", True),
        ("x86_64", "GenuineIntel", "AVX512", False),
        ("x86_64", "AuthenticAMD", "AVX2", False),
        ("x86_64", "", "AVX512", False),
        ("aarch64", "", "DEFAULT", False),
    ],
)
def test_whose_processors_mkl_leaves_half_unused(machine: str, maker: str, capability: str, half: bool) -> None:
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        half = False
    assert half_used(machine, maker, capability) == half


@pytest.mark.parametrize(("widths", "worth"), [([512, 512, 64], True), ([128, 128, 2048], False), ([], False)])
def test_a_model_is_wide_where_most_of_its_layers_are(widths: list[int], worth: bool) -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(width, 2 * width) for width in widths), torch.nn.LayerNorm(4096))
    assert wide(model) == worth


@USED
def test_products_go_to_onednn_inside_the_block_only() -> None:
    assert not by_onednn()
    with fast_products(True):
        assert by_onednn()
    assert not by_onednn()
    with pytest.raises(ZeroDivisionError), fast_products(True):
        raise ZeroDivisionError
    assert not by_onednn()


def test_nothing_changes_where_it_is_not_wanted_or_a_program_has_chosen() -> None:
    how = torch.backends.mkldnn.matmul
    before = how.fp32_precision
    with fast_products(False):
        assert how.fp32_precision == before
    how.fp32_precision = "ieee"
    try:
        with fast_products(True):
            assert how.fp32_precision == "ieee"
    finally:
        how.fp32_precision = before


def test_a_library_that_rounds_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "half_used", lambda *_: True)
    monkeypatch.setattr(products, "exact", lambda: False)
    with fast_products(True):
        assert not by_onednn()


def test_what_is_tried_would_show_a_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that rounds what it multiplies to bfloat16 fails the trial."""
    plain = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor,
        "__matmul__",
        lambda a, b: plain(a, b) if a.dtype == torch.float64 else plain(a.bfloat16().float(), b.bfloat16().float()),
    )
    exact.cache_clear()
    assert not exact()
    exact.cache_clear()


@USED
@given(
    rows=st.integers(1, 70), inner=st.integers(1, 300), columns=st.integers(1, 90), turned=st.booleans(),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_products_are_as_near_to_the_truth_as_float32_is(
    rows: int, inner: int, columns: int, turned: bool, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    a = torch.randn(rows, inner, generator=draw)
    b = torch.randn(inner, columns, generator=draw)
    if turned:
        a, b = a.T.contiguous().T, b.T.contiguous().T
    with fast_products(True):
        found = a @ b
    # The bound of any order of adding up: Higham, Accuracy and Stability of Numerical Algorithms, section 3.1.
    bound = inner * torch.finfo(torch.float32).eps * (a.abs().double() @ b.abs().double())
    assert ((found.double() - a.double() @ b.double()).abs() <= bound).all()


@USED
def test_gradients_through_layers_and_attention_are_as_near() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(2, 200, 64), torch.randn(192, 64) / 8

    def gradients(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        a, b = (t.clone().to(dtype).requires_grad_() for t in (x, w))
        q, k, v = F.linear(a, b).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        F.scaled_dot_product_attention(q, k, v, is_causal=True).square().sum().backward()
        assert a.grad is not None and b.grad is not None
        return a.grad, b.grad

    with fast_products(True):
        found = gradients(torch.float32)
    for ours, truth in zip(found, gradients(torch.float64), strict=True):
        assert (ours - truth).norm() <= 1e-5 * truth.norm()


@USED
@pytest.mark.parametrize(("tokens", "apart"), [(60, True), (2 * products.LONG, False)])
def test_attention_over_few_tokens_is_left_alone_both_ways(tokens: int, apart: bool) -> None:
    torch.manual_seed(0)
    given = [torch.randn(1, 2, tokens, 40, requires_grad=True) for _ in range(3)]

    def attention() -> tuple[torch.Tensor, ...]:
        output = F.scaled_dot_product_attention(*given, is_causal=True)
        return output, *torch.autograd.grad(output.square().sum(), given)

    plain = attention()
    with fast_products(True):
        found = attention()
        assert by_onednn()
    assert all(map(torch.equal, found, plain)) == apart


@USED
def test_a_gradient_that_is_taken_behind_the_block_does_not_open_it_again() -> None:
    given = torch.randn(1, 2, 60, 40, requires_grad=True)
    with fast_products(True):
        output = F.scaled_dot_product_attention(given, given, given)
    output.sum().backward()
    assert not by_onednn()


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="there is no oneDNN")
def test_programs_for_shapes_that_never_come_again_are_not_kept() -> None:
    """In a process of its own: 600 heights of a picture, each of which leaves nearly two megabytes otherwise."""
    script = """
import resource, torch
from avlm.models.products import keep_few_programs
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
keep_few_programs()
pixels, weight = torch.randn(1, 3, 900, 32), torch.randn(64, 3, 3, 3)
with torch.inference_mode():
    torch.conv2d(pixels, weight)
    before = peak()
    for height in range(200, 800):
        torch.conv2d(pixels[:, :, :height], weight)
print(peak() - before)
"""
    environment = {k: v for k, v in os.environ.items() if not k.endswith("CACHE_CAPACITY")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert int(done.stdout) < 200, "a thousand where a thousand are kept"


def test_a_model_asks_before_any_of_its_encoders_does(
    make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """oneDNN looks once, at the first convolution; what a user asks for stays."""
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    make_model()
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == str(products.PROGRAMS)
    assert os.environ["LRU_CACHE_CAPACITY"] == "7"
