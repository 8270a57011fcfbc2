"""Connectors: the counts that `layout` promises, and the arithmetic, one number at a time."""

import math
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from avlm.config.model import Connector
from avlm.layout import reduced_count
from avlm.models.connectors import build_connector, stack_frames

KINDS: list[dict[str, Any]] = [
    {"kind": "linear"},
    {"kind": "linear", "stack": 3, "bias": False},
    {"kind": "mlp"},
    {"kind": "mlp", "stack": 4, "hidden_size": 5, "layers": 3},
    {"kind": "mlp", "layers": 1},
    {"kind": "prefix", "stack": 16, "tokens": 8},
    {"kind": "prefix", "stack": 3, "tokens": 2, "bias": False},
    {"kind": "pool", "tokens": 7},
    {"kind": "pool", "tokens": 7, "norm": "before", "bias": True},
]


@pytest.mark.parametrize("settings", KINDS)
@torch.no_grad()
def test_the_layout_counts_the_tokens_of_every_length(settings: dict[str, Any]) -> None:
    connector = build_connector(settings, 6, 8)
    reduction = TypeAdapter(Connector).validate_python(settings).reduction()
    for length in range(1, 51):
        assert connector([torch.randn(length, 6)]).shape == (reduced_count(length, reduction), 8)


@pytest.mark.parametrize("settings", KINDS)
@torch.no_grad()
def test_items_together_are_each_alone(settings: dict[str, Any]) -> None:
    connector = build_connector(settings, 6, 8)
    items = [torch.randn(length, 6) for length in (5, 1, 12)]
    torch.testing.assert_close(connector(items), torch.cat([connector([item]) for item in items]), rtol=1e-5, atol=1e-6)


def test_whisper_large_to_mistral_has_as_many_weights_as_its_card_says() -> None:
    """LayerNorm (2 x 1280) and one matrix without bias (1280 x 4096): 5,245,440."""
    with torch.device("meta"):
        connector = build_connector({"kind": "pool", "tokens": 250}, 1280, 4096)
    assert sum(p.numel() for p in connector.parameters()) == 5_245_440


def test_llavas_connector_has_its_published_shape() -> None:
    """LLaVA-1.5 7B: 1024 -> 4096 -> 4096, both with bias: 20,979,712 weights."""
    with torch.device("meta"):
        connector = build_connector({"kind": "mlp"}, 1024, 4096)
    assert sum(p.numel() for p in connector.parameters()) == 20_979_712


def test_a_short_last_group_is_padded_with_zeros() -> None:
    frames = torch.arange(1.0, 11.0).reshape(5, 2)
    assert stack_frames(frames, 3).tolist() == [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 0, 0]]
    assert stack_frames(frames, 1) is frames
    assert stack_frames(frames, 8).tolist() == [[*range(1, 11), 0, 0, 0, 0, 0, 0]]


def slow_gelu(value: float) -> float:
    return value * 0.5 * (1 + math.erf(value / math.sqrt(2)))


def slow_matrix(rows: list[list[float]], layer: torch.nn.Linear) -> list[list[float]]:
    weights, bias = layer.weight.tolist(), [0.0] * layer.out_features if layer.bias is None else layer.bias.tolist()
    return [
        [sum(x * w for x, w in zip(row, line, strict=True)) + b for line, b in zip(weights, bias, strict=True)]
        for row in rows
    ]


def slow_norm(row: list[float], norm: torch.nn.LayerNorm) -> list[float]:
    mean = sum(row) / len(row)
    spread = math.sqrt(sum((x - mean) ** 2 for x in row) / len(row) + norm.eps)
    return [(x - mean) / spread * w + b for x, w, b in zip(row, norm.weight.tolist(), norm.bias.tolist(), strict=True)]


def randomised(connector: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(5)
    for parameter in connector.parameters():
        torch.nn.init.normal_(parameter)
    return connector.double()


def test_stack_and_mlp_match_the_slow_loop() -> None:
    connector = randomised(build_connector({"kind": "mlp", "stack": 2, "layers": 3}, 3, 4))
    item = torch.randn(5, 3, dtype=torch.float64)
    rows = [[*item[i].tolist(), *(item[i + 1].tolist() if i < 4 else [0.0] * 3)] for i in (0, 2, 4)]
    linear = [layer for layer in connector.layers if isinstance(layer, torch.nn.Linear)]
    for i, layer in enumerate(linear):
        rows = slow_matrix([[slow_gelu(x) for x in row] for row in rows] if i else rows, layer)
    torch.testing.assert_close(connector([item]), torch.tensor(rows, dtype=torch.float64))


def test_prefix_matches_the_slow_loop() -> None:
    """Each group of three embeddings goes through one matrix, whose output is two tokens one after the other."""
    connector = randomised(build_connector({"kind": "prefix", "stack": 3, "tokens": 2}, 2, 4))
    item = torch.randn(5, 2, dtype=torch.float64)
    rows = [item[:3].flatten().tolist(), [*item[3:].flatten().tolist(), 0.0, 0.0]]
    tokens = [row[at : at + 4] for row in slow_matrix(rows, connector.linear) for at in (0, 4)]
    torch.testing.assert_close(connector([item]), torch.tensor(tokens, dtype=torch.float64))


def test_a_prefix_has_the_shape_that_its_paper_says() -> None:
    """Frozen (arXiv:2106.13884, section 3.1): a vector to D * k channels, reshaped to k embeddings; k = 2."""
    with torch.device("meta"):
        connector = build_connector({"kind": "prefix", "stack": 1, "tokens": 2, "bias": False}, 2048, 4096)
        assert connector([torch.empty(1, 2048)]).shape == (2, 4096)
    assert sum(p.numel() for p in connector.parameters()) == 2048 * 4096 * 2


@pytest.mark.parametrize("norm", ["before", "after"])
@pytest.mark.parametrize("length", [3, 5, 11])
def test_pool_matches_the_slow_loop(norm: str, length: int) -> None:
    connector = randomised(build_connector({"kind": "pool", "tokens": 4, "norm": norm, "bias": True}, 3, 2))
    item = torch.randn(length, 3, dtype=torch.float64)
    rows = item.tolist()
    if norm == "before":
        rows = [slow_norm(row, connector.norm) for row in rows]
    pooled = []
    for token in range(4):
        share = rows[token * length // 4 : -(-(token + 1) * length // 4)]
        pooled.append([sum(column) / len(share) for column in zip(*share, strict=True)])
    if norm == "after":
        pooled = [slow_norm(row, connector.norm) for row in pooled]
    expected = torch.tensor(slow_matrix(pooled, connector.linear), dtype=torch.float64)
    torch.testing.assert_close(connector([item]), expected)
