"""A matrix times a few vectors is what arithmetic says, by whichever library, with the weights of that moment."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from torch import nn

from avlm.models import vectors
from avlm.models.vectors import FEW, Product, one_thread


@pytest.fixture
def by_numpy(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Ask NumPy also for small products; how many vectors it was given each time."""
    monkeypatch.setattr(vectors, "LARGE", 1)
    monkeypatch.setattr(vectors, "one_thread", lambda: True)
    monkeypatch.setattr(vectors, "half_used", lambda *_: True)
    asked: list[int] = []
    times = Product._times
    monkeypatch.setattr(Product, "_times", lambda own, x: asked.append(len(x)) or times(own, x))
    return asked


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 2, FEW, FEW + 1, 40])
def test_it_is_a_linear_layer(rows: int, biased: bool, by_numpy: list[int]) -> None:
    rng = np.random.default_rng(rows)
    weight, bias, x = rng.standard_normal((7, 5)), rng.standard_normal(7), rng.standard_normal((rows, 5))
    product = Product(
        nn.Parameter(torch.from_numpy(weight).float()), nn.Parameter(torch.from_numpy(bias).float()) if biased else None
    )
    with torch.inference_mode():
        found = product(torch.from_numpy(x).float())
    slow = [[sum(w * v for w, v in zip(line, row, strict=True)) for line in weight] for row in x]
    wanted = np.asarray(slow).reshape(rows, 7) + (bias if biased else 0.0)
    assert found.dtype == torch.float32 and by_numpy == ([rows] if rows <= FEW else [])
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-5, atol=1e-5)


def test_the_weights_are_those_of_that_moment(by_numpy: list[int]) -> None:
    weight = nn.Parameter(torch.ones(3, 4))
    product, x = Product(weight, None), torch.ones(1, 4)
    with torch.inference_mode():
        assert product(x).tolist() == [[4.0] * 3]
    with torch.no_grad():
        weight.mul_(2.0)
    weight.data.add_(1.0)
    with torch.inference_mode():
        assert product(x).tolist() == [[12.0] * 3]
    weight.data = torch.full((3, 4), 0.25)
    with torch.inference_mode():
        assert product(x).tolist() == [[1.0] * 3]
    assert by_numpy == [1, 1, 1]
    weight.untyped_storage().resize_(0)  # as sharded training does, whatever was answered in between


def test_it_is_torchs_where_torch_has_several_threads(by_numpy: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with torch.inference_mode():
        assert Product(nn.Parameter(torch.ones(3, 4)), None)(torch.ones(1, 4)).tolist() == [[4.0] * 3]
    assert by_numpy == []


def test_of_several_vectors_it_is_mkls_where_mkl_uses_all_of_the_processor(
    by_numpy: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vectors, "half_used", lambda *_: False)
    product = Product(nn.Parameter(torch.ones(3, 4)), None)
    with torch.inference_mode():
        for rows in (1, 2, FEW):
            assert product(torch.ones(rows, 4)).tolist() == [[4.0] * 3] * rows
    assert by_numpy == [1]


@pytest.mark.parametrize(
    ("told", "processors", "one"),
    [
        ({"OMP_NUM_THREADS": "1"}, 8, True),
        ({"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "4"}, 8, True),
        ({"OPENBLAS_NUM_THREADS": "4", "OMP_NUM_THREADS": "1"}, 8, False),
        ({}, 8, False),
        ({}, 1, True),
        ({"OMP_NUM_THREADS": ""}, 8, False),
    ],
)
def test_how_many_threads_numpy_has(
    told: dict[str, str], processors: int, one: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in vectors.ASKED:
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "cpu_count", lambda: processors)
    assert one_thread() is one
