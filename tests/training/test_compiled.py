"""Compiled layers learn what the layers as they are would learn."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from avlm.config.run import RunConfig
from avlm.data.encode import pack
from avlm.errors import ConfigError
from avlm.models.modeling import AvlmForConditionalGeneration
from avlm.samples import Encoded, Row
from avlm.training.chain import train
from avlm.training.compiled import CompiledLayers
from avlm.training.loss import row_loss
from avlm.training.observe import read_lines
from avlm.training.stages import prepare, set_modes
from tests.training.steps import stage

WHOLE: dict[str, Any] = {"language": {"lr": 1e-3}}
LORA: dict[str, Any] = {"language": {"lr": 1e-3, "lora": {"rank": 2, "targets": ["q_proj", "down_proj"]}}}
COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler of C++")


def row(lengths: tuple[int, ...]) -> Row:
    generator = torch.Generator().manual_seed(sum(lengths))
    ids = [torch.randint(10, 200, (length,), generator=generator).tolist() for length in lengths]
    return pack([Encoded(str(i), of, of) for i, of in enumerate(ids)])


def gradients(
    model: AvlmForConditionalGeneration, lengths: tuple[int, ...], layers: CompiledLayers | None
) -> list[Any]:
    model.zero_grad()
    with nullcontext() if layers is None else layers.running():
        loss = row_loss(model, row(lengths))
        loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def agree(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) > 1
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


ROWS = ((7, 5, 30), (11,), (3, 9, 2, 40, 6, 6), (64, 2), (8, 8, 8, 8), (25, 13), (2, 3), (17, 1, 1, 5, 90))


@pytest.mark.parametrize("parts", [WHOLE, LORA], ids=["whole", "lora"])
def test_rows_of_any_samples_go_through_the_same_code(make_model: Callable[..., Any], parts: dict[str, Any]) -> None:
    """A backend that runs what it is given as it is shows how often there was anything to compile."""
    model = make_model("vision", language={"num_hidden_layers": 12}).model
    set_modes(model, prepare(model, stage(parts)))
    expected = [gradients(model, lengths, None) for lengths in ROWS]
    compiled = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    layers = CompiledLayers(model, wanted=True, backend=backend)
    counts = []
    for lengths, wanted in zip(ROWS, expected, strict=True):
        agree(gradients(model, lengths, layers), wanted)
        counts.append(len(compiled))
    assert 0 < counts[1] == counts[-1], counts  # all of it was made by the first two, for every layer
    agree(gradients(model, ROWS[0], None), expected[0])
    assert len(compiled) == counts[-1]  # outside layers are as they were


@pytest.mark.slow
@COMPILER
def test_a_run_of_compiled_layers_has_the_losses_of_one_without(
    small_run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """Without dropout, which inductor draws for itself."""
    no = ["model.language.random.attention_dropout=0.0", "stages.joint.train.language.lora.dropout=0.0"]
    train(small_run("plain", no))
    train(small_run("compiled", [*no, "speed.compile=true"]))
    found, expected = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("compiled", "plain"))
    for a, b in zip(found, expected, strict=True):
        assert a["stage"] == b["stage"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)  # after steps of Adam, which magnifies what is small


@pytest.mark.slow
@COMPILER
def test_inductor_computes_the_same_gradients(make_model: Callable[..., Any]) -> None:
    model = make_model("vision").model
    set_modes(model, prepare(model, stage(WHOLE)))
    layers = CompiledLayers(model, wanted=True)
    for lengths in ROWS:
        agree(gradients(model, lengths, layers), gradients(model, lengths, None))


def test_without_a_compiler_it_is_refused_before_the_first_step(
    make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    model = make_model("vision").model
    with pytest.raises(ConfigError, match=r"no no-such-compiler on this machine, .* or set speed.compile=false"):
        CompiledLayers(model, wanted=True)
    CompiledLayers(model, wanted=False)
