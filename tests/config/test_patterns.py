"""Patterns over module names hit whole components, or nothing."""

from __future__ import annotations

import pytest

from avlm.config.io import build
from avlm.config.patterns import matches, nearest
from avlm.config.stage import Lora
from avlm.errors import ConfigError


@pytest.mark.parametrize(
    ("pattern", "hits", "misses"),
    [
        ("q_proj", ["q_proj", "a.q_proj"], ["a.xq_proj", "a.q_proj.b", "a.q_projs"]),
        ("layers.1", ["layers.1", "model.layers.1"], ["layers.11", "layers.1.mlp", "xlayers.1"]),
        ("layers.1.**", ["layers.1", "model.layers.1.mlp.up"], ["layers.11.mlp.up", "layers.0.mlp.up"]),
        ("layers.*.up", ["layers.1.up", "layers.11.up"], ["layers.1.mlp.up", "layers.up"]),
        ("layers.**.up", ["layers.up", "layers.1.mlp.up"], ["layers.1.mlp.upper", "up"]),
        ("*_proj", ["a.q_proj", "_proj"], ["a.proj", "q_proj.a"]),
        ("h.1*.mlp", ["h.1.mlp", "h.10.mlp"], ["h.21.mlp"]),
        ("**", ["a", "a.b.c"], []),
        ("language_model.**.q", ["language_model.q", "language_model.a.b.q"], ["language_models.q"]),
    ],
)
def test_a_pattern_is_about_whole_components(pattern: str, hits: list[str], misses: list[str]) -> None:
    assert [path for path in hits + misses if matches(pattern, path)] == hits


@pytest.mark.parametrize("pattern", ["", "a..b", ".a", "a.", "a[0]", "a b", "(q|v)_proj", r"a\.b"])
def test_what_is_no_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(ConfigError, match=r"is not a pattern of module names: .* Write it like q_proj, "):
        build(Lora, {"targets": [pattern]})


def test_no_target_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="targets"):
        build(Lora, {"targets": []})


def test_the_nearest_names_are_as_long_as_the_pattern() -> None:
    paths = ["h.0.attn.c_attn", "h.1.attn.c_attn", "h.0.mlp.c_fc"]
    assert nearest("c_atn", paths, 1) == ["c_attn"]
    assert nearest("h.1.att.c_attn", paths, 1) == ["h.1.attn.c_attn"]
