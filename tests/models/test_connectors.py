"""Connectors: the counts that `layout` promises, and the arithmetic, one number at a time or beside transformers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, Blip2QFormerConfig, IdeficsConfig, InternVLConfig
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler
from transformers.models.internvl.modeling_internvl import InternVLModel, InternVLMultiModalProjector

from avlm.config.connectors import Connector
from avlm.config.model import ModelConfig
from avlm.convert.compose import Composed, compose
from avlm.data.encode import pack
from avlm.errors import LayoutError
from avlm.layout import Size, reduced_count
from avlm.models.connectors import build_connector
from avlm.models.connectors.base import Vectors
from avlm.models.connectors.sequences import stack_frames
from avlm.models.connectors.squares import join_squares
from avlm.models.modeling import AvlmForConditionalGeneration
from avlm.samples import Encoded, Sample

CONNECTORS_MD = Path(__file__).parents[2] / "docs" / "connectors.md"
SMALL_QFORMER = {"queries": 3, "layers": 3, "width": 8, "heads": 2, "feedforward": 12}
SMALL_PERCEIVER = {"kind": "perceiver", "queries": 3, "layers": 2, "heads": 2, "head_size": 4}
KINDS: list[dict[str, Any]] = [
    {"kind": "linear"},
    {"kind": "linear", "stack": 3, "bias": False, "prompts": 2},
    {"kind": "mlp"},
    {"kind": "mlp", "stack": 4, "hidden_size": 5, "layers": 3},
    {"kind": "swiglu", "stack": 3, "hidden_size": 5},
    {"kind": "prefix", "stack": 16, "tokens": 8},
    {"kind": "prefix", "stack": 3, "tokens": 2, "bias": False},
    {"kind": "pool", "tokens": 7},
    {"kind": "pool", "tokens": 7, "norm": "before", "bias": True, "prompts": 3},
    {"kind": "conv", "hidden_size": 7},
    {"kind": "conv", "kernel": 3, "stride": 3},
    {"kind": "conv", "kernel": 7, "stride": 2, "prompts": 1},
    {"kind": "conv", "kernel": 1, "stride": 1},
    {"kind": "qformer", **SMALL_QFORMER},
    {"kind": "qformer", **SMALL_QFORMER, "cross_every": 1, "norm": "none", "prompts": 2},
    {"kind": "window_qformer", **SMALL_QFORMER, "window": 5, "stride": 5},
    {"kind": "window_qformer", **SMALL_QFORMER, "window": 5, "stride": 3, "rest": "dropped"},
    {"kind": "window_qformer", **SMALL_QFORMER, "window": 4, "stride": 3, "queries": 1, "prompts": 1},
    SMALL_PERCEIVER,
    {**SMALL_PERCEIVER, "width": 8, "activation": "gelu", "prompts": 2},
]
SQUARES: list[dict[str, Any]] = [
    {"kind": "pixel_shuffle"},
    {"kind": "pixel_shuffle", "side": 3, "norm": "none", "layers": 1, "bias": False},
    {"kind": "pixel_shuffle", "side": 1, "hidden_size": 5, "prompts": 2},
]


def name(kind: dict[str, Any]) -> str:
    return "-".join(str(value) for value in kind.values())


def expected(settings: dict[str, Any], length: int, grid: Size | None = None) -> int:
    return reduced_count(length, TypeAdapter(Connector).validate_python(settings).reduction(), grid)


def made(settings: dict[str, Any], width: int = 6, out_width: int = 8) -> nn.Module:
    """A connector whose every weight has a say."""
    torch.manual_seed(5)
    connector = build_connector(settings, width, out_width)
    for parameter in connector.parameters():
        nn.init.normal_(parameter, std=0.4)
    return connector.eval()


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- how many tokens


def check_lengths(kind: dict[str, Any], lengths: Iterable[int]) -> None:
    connector = made(kind)
    for length in lengths:
        assert connector([torch.randn(length, 6)]).shape == (expected(kind, length), 8)


@pytest.mark.parametrize("kind", KINDS, ids=name)
@torch.no_grad()
def test_the_layout_counts_the_tokens_of_short_and_of_long_items(kind: dict[str, Any]) -> None:
    check_lengths(kind, [*range(1, 41), 88, 748, 1499, 1500, 1501, 2999, 3000, 3100])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=name)
@torch.no_grad()
def test_the_layout_counts_the_tokens_of_every_length_to_twice_a_window(kind: dict[str, Any]) -> None:
    check_lengths(kind, range(1, 3101))


@pytest.mark.parametrize("kind", SQUARES, ids=name)
@torch.no_grad()
def test_the_layout_counts_the_tokens_of_every_grid(kind: dict[str, Any]) -> None:
    connector = made(kind)
    for rows in range(1, 31):
        for columns in range(1, 31):
            length, grid = rows * columns, (rows, columns)
            assert connector([torch.randn(length, 6)], [grid]).shape == (expected(kind, length, grid), 8)


@pytest.mark.parametrize("kind", [*KINDS, *SQUARES], ids=name)
def test_an_item_without_embeddings_has_no_tokens(kind: dict[str, Any]) -> None:
    connector = made(kind)
    empty, item = torch.empty(0, 6), torch.randn(6, 6)
    assert connector([], []).shape == (0, 8)
    assert connector([empty, empty], [(0, 0), (0, 0)]).shape == (0, 8)
    assert expected(kind, 0, (0, 0)) == 0
    close(connector([empty, item, empty], [(0, 0), (2, 3), (0, 0)]), connector([item], [(2, 3)]))


def test_the_documentation_has_every_kind_with_its_counts() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\| *(\d*) \| *(\d*) \|$", CONNECTORS_MD.read_text(), re.M)
    kinds = [settings.model_fields["kind"].default for settings in get_args(get_args(Connector)[0])]
    assert [kind for kind, _, _ in rows] == kinds
    for kind, sound, picture in rows:
        for count, length, grid in ((sound, 1500, None), (picture, 1024, (32, 32))):
            if count:
                assert expected({"kind": kind}, length, grid) == int(count), kind


# ---------------------------------------------------------------- each item as if it were alone

LENGTHS = [(5, 1, 12), (7, 7, 7), (10, 10), (1, 1, 1), (3, 17, 5, 4, 5)]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("kind", KINDS, ids=name)
@torch.no_grad()
def test_items_together_are_each_alone(kind: dict[str, Any], lengths: tuple[int, ...]) -> None:
    connector = made(kind).double()
    items = [torch.randn(length, 6, dtype=torch.float64) for length in lengths]
    close(connector(items), torch.cat([connector([item]) for item in items]))
    connector, items = connector.float(), [item.float() for item in items]
    torch.testing.assert_close(connector(items), torch.cat([connector([item]) for item in items]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", SQUARES, ids=name)
@torch.no_grad()
def test_pictures_together_are_each_alone(kind: dict[str, Any]) -> None:
    connector = made(kind)
    grids = [(2, 3), (3, 2), (1, 1), (2, 3), (5, 4)]
    items = [torch.randn(rows * columns, 6) for rows, columns in grids]
    alone = [connector([item], [grid]) for item, grid in zip(items, grids, strict=True)]
    close(connector(items, grids), torch.cat(alone))


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(KINDS),
    st.lists(st.integers(0, 40), min_size=1, max_size=5),
    st.integers(0, 10_000),
)
@torch.no_grad()
def test_any_batch_is_its_items_one_after_the_other(kind: dict[str, Any], lengths: list[int], seed: int) -> None:
    connector = made(kind).double()
    torch.manual_seed(seed)
    items = [torch.randn(length, 6, dtype=torch.float64) for length in lengths]
    found = connector(items)
    counts = [expected(kind, length) for length in lengths]
    assert len(found) == sum(counts)
    for item, tokens in zip(items, found.split(counts), strict=True):
        close(tokens, connector([item]))


@pytest.mark.parametrize("kind", [*KINDS, *SQUARES], ids=name)
def test_every_weight_and_every_item_gets_a_finite_gradient(kind: dict[str, Any]) -> None:
    connector = made(kind)
    grids = [(5, 3), (1, 1), (2, 6)]
    items = [torch.randn(rows * columns, 6, requires_grad=True) for rows, columns in grids]
    connector(items, grids).square().sum().backward()
    for parameter in connector.parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all()
    for item in items:
        assert item.grad is not None and item.grad.isfinite().all() and item.grad.any()


def test_each_token_depends_on_its_own_item_alone() -> None:
    """The gradient of one item's tokens is exactly zero at its neighbours."""
    for kind in KINDS:
        connector = made(kind)
        items = [torch.randn(length, 6, requires_grad=True) for length in (5, 9, 6)]
        counts = [expected(kind, len(item)) for item in items]
        connector(items).split(counts)[1].square().sum().backward()
        assert not items[0].grad.any() and not items[2].grad.any(), kind
        assert items[1].grad.any(), kind


@pytest.mark.parametrize("kind", ["linear", "pool", "conv", "pixel_shuffle", "window_qformer", "perceiver"])
def test_prompts_stand_before_the_tokens_of_each_item(kind: str) -> None:
    """VITA-1.5 puts 25 learned vectors before a sound."""
    connector = made({"kind": kind, "prompts": 25}).double()
    grids = [(2, 3), (4, 2)]
    items = [draw(rows * columns, 6) for rows, columns in grids]
    prompts = connector.prompts.weight
    connector.prompts = None
    tokens = [connector([item], [grid]) for item, grid in zip(items, grids, strict=True)]
    connector.prompts = Vectors(25, 8)
    connector.prompts.weight = prompts
    close(connector(items, grids), torch.cat([prompts, tokens[0], prompts, tokens[1]]))


# ---------------------------------------------------------------- how many weights


@pytest.mark.parametrize(
    ("kind", "width", "out_width", "weights"),
    [
        pytest.param({"kind": "pool"}, 1280, 4096, 5_245_440, id="Whisper to Mistral: LayerNorm and one matrix"),
        pytest.param({"kind": "mlp"}, 1024, 4096, 20_979_712, id="LLaVA-1.5 7B: 1024 -> 4096 -> 4096 with bias"),
        pytest.param(
            {"kind": "prefix", "stack": 1, "tokens": 2, "bias": False}, 2048, 4096, 2048 * 4096 * 2, id="Frozen"
        ),
        pytest.param(
            {"kind": "swiglu"},
            1280,
            4096,
            8 * 1280 + 8 * 1280 * 4096 + 2048 + 2048 * 4096,
            id="Ultravox: norm of 8 stacked, to 4096, half of it gates, norm, to the language model",
        ),
        pytest.param(
            {"kind": "conv"},
            1024,
            4096,
            5 * 1024 * 2048 + 2048 + 2 * 2048 + 2048 * 4096 + 4096,
            id="VITA: convolution 1024 -> 2048 of kernel 5, norm, 2048 -> 4096",
        ),
        pytest.param(
            {"kind": "pixel_shuffle"},
            1024,
            4096,
            2 * 4096 + 4096 * 4096 + 4096 + 4096 * 4096 + 4096,
            id="InternVL: LayerNorm of 4 * 1024, two layers",
        ),
    ],
)
def test_connectors_have_as_many_weights_as_their_sources_say(
    kind: dict[str, Any], width: int, out_width: int, weights: int
) -> None:
    with torch.device("meta"):
        connector = build_connector(kind, width, out_width)
    assert sum(p.numel() for p in connector.parameters()) == weights


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ({"kind": "qformer"}, {}),
        ({"kind": "window_qformer"}, {"num_hidden_layers": 2, "cross_attention_frequency": 1}),
    ],
)
def test_q_formers_are_as_large_as_blip_2s(kind: dict[str, Any], changed: dict[str, Any]) -> None:
    """transformers' own, and beside it the queries, the LayerNorm on the embeddings and the last matrix."""
    with torch.device("meta"):
        connector = build_connector(kind, 1408, 2560)
        theirs = AutoModel.from_config(Blip2QFormerConfig(encoder_hidden_size=1408, **changed))
    beside = connector.queries.weight.numel() + 2 * 1408 + 768 * 2560 + 2560
    assert connector.queries.weight.shape == ({"qformer": 32, "window_qformer": 1}[kind["kind"]], 768)
    assert sum(p.numel() for p in connector.parameters()) == sum(p.numel() for p in theirs.parameters()) + beside


def test_a_prefix_makes_as_many_tokens_as_its_paper_says() -> None:
    """Frozen (arXiv:2106.13884, section 3.1): a vector to D * k channels, reshaped to k embeddings; k = 2."""
    with torch.device("meta"):
        connector = build_connector({"kind": "prefix", "stack": 1, "tokens": 2, "bias": False}, 2048, 4096)
        assert connector([torch.empty(1, 2048)]).shape == (2, 4096)


def test_fresh_weights_begin_as_their_sources_do() -> None:
    """Ultravox's norms at 0.4; learned vectors small, as BLIP-2's queries (normal, 0.02)."""
    swiglu = build_connector({"kind": "swiglu"}, 64, 64)
    assert swiglu.norm_in.weight.unique().tolist() == swiglu.norm_hidden.weight.unique().tolist()
    torch.testing.assert_close(swiglu.norm_in.weight, torch.full((512,), 0.4))
    vectors = build_connector({"kind": "perceiver", "prompts": 200, "layers": 1}, 128, 128)
    for weight in (vectors.prompts.weight.detach(), vectors.queries.weight.detach()):
        assert abs(float(weight.std()) - 0.02) < 0.001
        assert abs(float(weight.mean())) < 0.001


# ---------------------------------------------------------------- one number at a time


def test_a_short_last_group_is_padded_with_zeros() -> None:
    frames = torch.arange(1.0, 11.0).reshape(5, 2)
    assert stack_frames(frames, 3).tolist() == [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 0, 0]]
    assert stack_frames(frames, 1) is frames
    assert stack_frames(frames, 8).tolist() == [[*range(1, 11), 0, 0, 0, 0, 0, 0]]


def slow_gelu(value: float) -> float:
    return value * 0.5 * (1 + math.erf(value / math.sqrt(2)))


Rows = list[list[float]]


def slow_matrix(rows: Rows, layer: nn.Linear) -> Rows:
    weights, bias = layer.weight.tolist(), [0.0] * layer.out_features if layer.bias is None else layer.bias.tolist()
    return [
        [sum(x * w for x, w in zip(row, line, strict=True)) + b for line, b in zip(weights, bias, strict=True)]
        for row in rows
    ]


def slow_norm(row: list[float], norm: nn.LayerNorm) -> list[float]:
    mean = sum(row) / len(row)
    spread = math.sqrt(sum((x - mean) ** 2 for x in row) / len(row) + norm.eps)
    return [(x - mean) / spread * w + b for x, w, b in zip(row, norm.weight.tolist(), norm.bias.tolist(), strict=True)]


def slow_rms(row: list[float], weight: Tensor) -> list[float]:
    size = math.sqrt(sum(x * x for x in row) / len(row) + 1e-6)
    return [x / size * w for x, w in zip(row, weight.tolist(), strict=True)]


def tensor(rows: Rows) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def draw(length: int, width: int) -> Tensor:
    return torch.randn(length, width, dtype=torch.float64)


def test_stack_and_mlp_match_the_slow_loop() -> None:
    connector = made({"kind": "mlp", "stack": 2, "layers": 3}, 3, 4).double()
    item = draw(5, 3)
    rows = [[*item[i].tolist(), *(item[i + 1].tolist() if i < 4 else [0.0] * 3)] for i in (0, 2, 4)]
    linear = [layer for layer in connector.layers if isinstance(layer, nn.Linear)]
    for i, layer in enumerate(linear):
        rows = slow_matrix([[slow_gelu(x) for x in row] for row in rows] if i else rows, layer)
    torch.testing.assert_close(connector([item]), tensor(rows))


def test_swiglu_matches_the_slow_loop() -> None:
    """The first half of the wide layer are values, the second half gates, as in Ultravox."""
    connector = made({"kind": "swiglu", "stack": 2, "hidden_size": 3}, 2, 4).double()
    item = draw(3, 2)
    rows = [[*item[0].tolist(), *item[1].tolist()], [*item[2].tolist(), 0.0, 0.0]]
    wide = slow_matrix([slow_rms(row, connector.norm_in.weight) for row in rows], connector.widen)
    gated = [[v * g / (1 + math.exp(-g)) for v, g in zip(row[:3], row[3:], strict=True)] for row in wide]
    rows = slow_matrix([slow_rms(row, connector.norm_hidden.weight) for row in gated], connector.linear)
    torch.testing.assert_close(connector([item]), tensor(rows))


def test_prefix_matches_the_slow_loop() -> None:
    """Each group of three embeddings goes through one matrix, whose output is two tokens one after the other."""
    connector = made({"kind": "prefix", "stack": 3, "tokens": 2}, 2, 4).double()
    item = draw(5, 2)
    rows = [item[:3].flatten().tolist(), [*item[3:].flatten().tolist(), 0.0, 0.0]]
    tokens = [row[at : at + 4] for row in slow_matrix(rows, connector.linear) for at in (0, 4)]
    torch.testing.assert_close(connector([item]), tensor(tokens))


@pytest.mark.parametrize("norm", ["before", "after"])
@pytest.mark.parametrize("length", [3, 5, 11])
def test_pool_matches_the_slow_loop(norm: str, length: int) -> None:
    connector = made({"kind": "pool", "tokens": 4, "norm": norm, "bias": True}, 3, 2).double()
    item = draw(length, 3)
    rows = item.tolist()
    if norm == "before":
        rows = [slow_norm(row, connector.norm) for row in rows]
    pooled = []
    for token in range(4):
        share = rows[token * length // 4 : -(-(token + 1) * length // 4)]
        pooled.append([sum(column) / len(share) for column in zip(*share, strict=True)])
    if norm == "after":
        pooled = [slow_norm(row, connector.norm) for row in pooled]
    torch.testing.assert_close(connector([item]), tensor(slow_matrix(pooled, connector.linear)))


@pytest.mark.parametrize(("kernel", "stride"), [(5, 2), (3, 3), (7, 2), (4, 3), (2, 1), (1, 1)])
@pytest.mark.parametrize("length", [1, 2, 3, 8, 9])
def test_conv_matches_the_slow_loop(kernel: int, stride: int, length: int) -> None:
    """VITA pads kernel - 1 zeros behind the last embedding, none before the first."""
    connector = made({"kind": "conv", "kernel": kernel, "stride": stride, "hidden_size": 3}, 2, 4).double()
    item = draw(length, 2)
    padded = [*item.tolist(), *[[0.0, 0.0]] * (kernel - 1)]
    weight, bias = connector.conv.weight.tolist(), connector.conv.bias.tolist()
    rows = []
    for start in range(0, len(padded) - kernel + 1, stride):
        row = [
            bias[out] + sum(padded[start + k][c] * weight[out][c][k] for k in range(kernel) for c in range(2))
            for out in range(3)
        ]
        rows.append([max(x, 0.0) for x in slow_norm(row, connector.norm)])
    assert len(rows) == (length - 1) // stride + 1
    torch.testing.assert_close(connector([item]), tensor(slow_matrix(rows, connector.linear)))


@pytest.mark.parametrize("side", [1, 2, 3])
@pytest.mark.parametrize(("rows", "columns"), [(4, 6), (3, 5), (1, 1), (5, 2), (6, 6)])
def test_squares_are_joined_as_in_the_slow_loop(side: int, rows: int, columns: int) -> None:
    maps = torch.randn(2, rows, columns, 3)
    for item, found in zip(maps, join_squares(maps, side), strict=True):
        squares = []
        for top in range(0, rows, side):
            for left in range(0, columns, side):
                square: list[float] = []
                for y in range(top, top + side):
                    for x in range(left, left + side):
                        square += item[y, x].tolist() if y < rows and x < columns else [0.0] * 3
                squares.append(square)
        torch.testing.assert_close(found, torch.tensor(squares))


def test_nevas_downsampling_projector_pads_odd_sides_with_zeros() -> None:
    """27 by 27 of SigLIP's become 14 by 14 = 196 tokens (a quarter of 729 would be 182)."""
    assert join_squares(torch.randn(1, 27, 27, 4), 2).shape == (1, 196, 16)
    assert expected({"kind": "pixel_shuffle"}, 729, (27, 27)) == 196


def test_pixel_shuffle_matches_internvl() -> None:
    text = {"model_type": "qwen2", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"intermediate_size": 8, "vocab_size": 32, "num_key_value_heads": 2}
    vision = {"hidden_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = InternVLConfig(vision_config=vision, text_config=text)
    theirs = InternVLMultiModalProjector(config)
    ours = made({"kind": "pixel_shuffle"})
    names = {"layer_norm": ours.norm, "linear_1": ours.layers[0], "linear_2": ours.layers[2]}
    for key, module in names.items():
        getattr(theirs, key).load_state_dict(module.state_dict())
    items = [torch.randn(16, 6), torch.randn(16, 6)]
    maps = torch.stack(items).unflatten(1, (4, 4))
    shuffled = InternVLModel.pixel_shuffle(None, maps).flatten(1, 2)  # it reads nothing of a model
    close(ours(items, [(4, 4), (4, 4)]), theirs(shuffled).flatten(0, 1))


def test_a_square_is_not_joined_without_rows_and_columns() -> None:
    connector = made({"kind": "pixel_shuffle"})
    for grids, message in (
        (None, "an item of 6 embeddings has no rows and columns, and its connector joins squares of them. "
        "Use a connector for sequences, such as kind: mlp"),
        ([(2, 2)], "a picture has 6 embeddings, and a grid of 2 by 2 has 4. "
        "Prepare the data with the model's own processor"),
    ):  # fmt: skip
        with pytest.raises(LayoutError) as error:
            connector([torch.randn(6, 6)], grids)
        assert str(error.value) == message


# ---------------------------------------------------------------- learned queries, beside transformers


def blip2(ours: nn.Module, *, layers: int, cross_every: int, width: int = 6) -> nn.Module:
    """transformers' Q-Former with the weights of ours."""
    config = Blip2QFormerConfig(
        hidden_size=8,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=12,
        cross_attention_frequency=cross_every,
        encoder_hidden_size=width,
    )
    theirs = AutoModel.from_config(config).eval()
    state: dict[str, Tensor] = {}

    def put(there: str, module: nn.Module) -> None:
        state.update({f"{there}.{key}": value for key, value in module.state_dict().items()})

    put("layernorm", ours.queries_norm)
    for i, layer in enumerate(ours.layers):
        at = f"encoder.layer.{i}"
        for there, attention, norm in (
            ("attention", layer.own, layer.own_norm),
            ("crossattention", layer.cross, layer.cross_norm),
        ):
            if attention is None:
                continue
            for key in ("query", "key", "value"):
                put(f"{at}.{there}.attention.{key}", getattr(attention, key))
            put(f"{at}.{there}.output.dense", attention.out)
            put(f"{at}.{there}.output.LayerNorm", norm)
        put(f"{at}.intermediate_query.dense", layer.widen)
        put(f"{at}.output_query.dense", layer.narrow)
        put(f"{at}.output_query.LayerNorm", layer.norm)
    theirs.load_state_dict(state)
    return theirs


@pytest.mark.parametrize(("layers", "cross_every"), [(3, 2), (2, 1)])
@torch.no_grad()
def test_qformer_matches_transformers(layers: int, cross_every: int) -> None:
    ours = made({"kind": "qformer", **SMALL_QFORMER, "layers": layers, "cross_every": cross_every})
    theirs = blip2(ours, layers=layers, cross_every=cross_every)
    items = [torch.randn(length, 6) for length in (4, 9, 1)]
    for item, tokens in zip(items, ours(items).split(3), strict=True):
        read = theirs(query_embeds=ours.queries.weight[None], encoder_hidden_states=ours.norm(item)[None])
        torch.testing.assert_close(tokens, ours.linear(read.last_hidden_state[0]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rest", ["joined", "dropped"])
@pytest.mark.parametrize(("window", "stride"), [(5, 5), (5, 3), (4, 1), (1, 1)])
@pytest.mark.parametrize("lengths", [(12,), (4, 11, 5, 23), (10, 10), (15,), (3,), (8, 8)])
@torch.no_grad()
def test_window_qformer_reads_each_window_by_itself(
    rest: str, window: int, stride: int, lengths: tuple[int, ...]
) -> None:
    """Each window through transformers' Q-Former, one after the other."""
    kind = {"kind": "window_qformer", **SMALL_QFORMER, "window": window, "stride": stride, "rest": rest}
    ours = made({**kind, "layers": 2, "cross_every": 1})
    theirs = blip2(ours, layers=2, cross_every=1)
    items = [torch.randn(length, 6) for length in lengths]
    slow = []
    for item in items:
        windows = [item[start : start + window] for start in range(0, len(item) - window + 1, stride)] or [item]
        if rest == "joined" and len(item) > window:
            windows[-1] = item[(len(windows) - 1) * stride :]
        for piece in windows:
            read = theirs(query_embeds=ours.queries.weight[None], encoder_hidden_states=ours.norm(piece)[None])
            slow.append(ours.linear(read.last_hidden_state[0]))
    torch.testing.assert_close(ours(items), torch.cat(slow), rtol=1e-5, atol=1e-5)


def test_salmonns_windows_are_those_of_torch_unfold() -> None:
    """30 s of Whisper: 1500 embeddings in windows of 17 (0.333 s) are 88, as SALMONN unfolds them."""
    kind = {"kind": "window_qformer", "rest": "dropped", "norm": "none"}
    unfolded = F.unfold(torch.empty(1, 1, 1, 1500), kernel_size=(1, 17), stride=(1, 17)).shape[-1]
    assert expected(kind, 1500) == unfolded == 88
    assert expected({**kind, "rest": "joined"}, 1500) == 88


def test_nothing_that_is_heard_is_lost_unless_it_is_asked_for() -> None:
    for rest, heard in (("joined", 12), ("dropped", 10)):
        connector = made({"kind": "window_qformer", **SMALL_QFORMER, "window": 5, "stride": 5, "rest": rest})
        item = torch.randn(12, 6, requires_grad=True)
        connector([item]).square().sum().backward()
        assert item.grad.any(1).tolist() == [True] * heard + [False] * (12 - heard)


@torch.no_grad()
def test_perceiver_matches_transformers() -> None:
    """IDEFICS' resampler is Flamingo's with ReLU."""
    ours = made({**SMALL_PERCEIVER, "activation": "relu"})
    config = IdeficsConfig(vision_config={"embed_dim": 6}, perceiver_config={"qk_layer_norms_perceiver": False})
    theirs = IdeficsPerceiverResampler(config, embed_dim=6, depth=2, n_heads=2, head_dim=4, n_latents=3).eval()
    state = {"latents": ours.queries.weight}
    for i, layer in enumerate(ours.layers):
        attention = layer.attention
        for there, module in {
            "0.context_layer_norm": layer.states_norm,
            "0.latents_layer_norm": layer.queries_norm,
            "0.q_proj": attention.query,
            "0.k_proj": attention.key,
            "0.v_proj": attention.value,
            "0.output_proj": attention.out,
            "1.ln": layer.norm,
            "1.fc": layer.widen,
            "1.c_proj": layer.narrow,
        }.items():
            state |= {f"blocks.{i}.{there}.{key}": value for key, value in module.state_dict().items()}
    state |= {f"layer_norm.{key}": value for key, value in ours.norm.state_dict().items()}
    theirs.load_state_dict(state)
    items = [torch.randn(length, 6) for length in (4, 9, 1)]
    for item, tokens in zip(items, ours(items).split(3), strict=True):
        torch.testing.assert_close(tokens, ours.linear(theirs(item[None])[0]), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_flamingos_activation_is_the_square_of_relu() -> None:
    layer = made({**SMALL_PERCEIVER, "layers": 1}).layers[0]
    x = torch.randn(7)
    assert torch.equal(layer.act(x), x.clamp(min=0) ** 2)


def test_dropout_is_for_training_only() -> None:
    kind = {"kind": "qformer", **SMALL_QFORMER, "dropout": 0.5}
    connector, item = made(kind), torch.randn(9, 6)
    assert torch.equal(connector([item]), connector([item]))
    connector.train()
    assert not torch.equal(connector([item]), connector([item]))
    still = made({**kind, "dropout": 0.0}).train()
    assert torch.equal(still([item]), still([item]))


# ---------------------------------------------------------------- in a model


@pytest.mark.parametrize("kind", [*KINDS, *SQUARES], ids=name)
@torch.no_grad()
def test_half_precision_goes_through(kind: dict[str, Any]) -> None:
    connector = made(kind).bfloat16()
    items = [torch.randn(length, 6, dtype=torch.bfloat16) for length in (6, 1)]
    found = connector(items, [(2, 3), (1, 1)])
    assert found.dtype == torch.bfloat16
    assert found.isfinite().all()


LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 12,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 42,
    "patch_size": 14,
}
AUDIO = {
    "model_type": "whisper",
    "d_model": 12,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "num_mel_bins": 80,
    "max_source_positions": 60,
}
PAIRS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"kind": "pixel_shuffle", "prompts": 1}, {"kind": "conv", "prompts": 25}),
    ({"kind": "qformer", **SMALL_QFORMER}, {"kind": "window_qformer", **SMALL_QFORMER}),
    (SMALL_PERCEIVER, {"kind": "swiglu", "hidden_size": 6}),
    ({"kind": "prefix", "stack": 9, "tokens": 4}, {"kind": "pool", "tokens": 5, "prompts": 2}),
    ({"kind": "swiglu", "stack": 2, "hidden_size": 6}, SMALL_PERCEIVER),
]


def composed(vision: dict[str, Any], audio: dict[str, Any]) -> Composed:
    template = "{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}"
    parts = {
        "language": {"random": LLAMA, "chat_template": template, "vocabulary": 300},
        "vision": {"encoder": {"random": VISION}, "connector": vision},
        "audio": {"encoder": {"random": AUDIO}, "connector": audio},
    }
    return compose(ModelConfig.model_validate(parts), texts=["What is it? red green blue"] * 3)


@pytest.mark.parametrize(("vision", "audio"), PAIRS, ids=lambda kind: kind["kind"])
def test_the_data_side_reserves_what_every_connector_makes(
    vision: dict[str, Any], audio: dict[str, Any], make_sample: Callable[..., Sample], tmp_path: Path
) -> None:
    """A model of 3 by 3 patches: packed equals alone, every connector learns, and a saved model is the same."""
    model, processor = composed(vision, audio)
    kinds = [("image",), ("audio",), ("video",), ("image", "audio", "image"), ()]
    samples = [processor.encode(make_sample(*kind, seed=i, seconds=0.2 + 0.1 * i)) for i, kind in enumerate(kinds)]

    def logits(*of: Encoded) -> Tensor:
        row = pack(list(of))
        media = ("pixel_values", "pixel_values_videos", "input_features", "input_features_mask")
        inputs = {name: getattr(row, name) for name in media if getattr(row, name) is not None}
        return model(row.input_ids, row_lengths=row.lengths, places=row.places, **inputs).logits[0]

    packed = logits(*samples)
    alone = torch.cat([logits(sample) for sample in samples])
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    packed.square().sum().backward()
    for name, parameter in model.named_parameters():
        if "connector" in name and "key.bias" not in name:  # the same for every key, so attention does not see it
            assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name
    model.save_pretrained(tmp_path)
    model = AvlmForConditionalGeneration.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(*samples), packed, rtol=1e-6, atol=1e-6)


def test_weights_that_a_checkpoint_lacks_begin_as_fresh_ones(tmp_path: Path) -> None:
    """transformers draws what is missing, and leaves what is there."""
    model, _ = composed({"kind": "linear", "prompts": 40}, {"kind": "swiglu", "hidden_size": 6})
    kept = {k: v.clone() for k, v in model.state_dict().items() if not k.endswith(("norm_in.weight", "prompts.weight"))}
    model.save_pretrained(tmp_path, state_dict=kept)
    again, info = AvlmForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    missing = {"model.vision_connector.prompts.weight", "model.audio_connector.norm_in.weight"}
    assert set(info["missing_keys"]) == missing
    for found in (again, AvlmForConditionalGeneration(again.config)):
        torch.testing.assert_close(found.model.audio_connector.norm_in.weight, torch.full((96,), 0.4))
        torch.testing.assert_close(found.model.audio_connector.norm_hidden.weight, torch.full((6,), 0.4))
        prompts = found.model.vision_connector.prompts.weight.detach()
        assert abs(float(prompts.std()) - 0.02) < 0.002
    for key, value in kept.items():
        assert torch.equal(again.state_dict()[key], value), key
