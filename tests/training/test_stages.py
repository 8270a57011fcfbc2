"""What a stage trains, and that nothing else moves."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from steps import adapters, changed, snapshot, stage, train_step
from torch import nn

from avlm.config.run import RunConfig
from avlm.config.stage import PARTS, RARE, Optimizer, Part, Schedule, Stage, TrainPart
from avlm.convert.compose import Composed
from avlm.data.encode import pack
from avlm.data.sources import JsonLines
from avlm.errors import ConfigError
from avlm.samples import Row
from avlm.training.loss import row_loss
from avlm.training.stages import make_optimizer, part_modules, prepare, rate, set_modes

COMMON = [part for part in PARTS if part not in RARE]
SUBSETS = [c for n in range(1, len(COMMON) + 1) for c in itertools.combinations(COMMON, n)]


@pytest.fixture
def row(small_model: Composed, tmp_path: Path) -> Row:
    """A packed row of four samples that goes through every part."""
    source = JsonLines(tmp_path / "rows.jsonl")
    return pack([small_model.processor.encode(source[i]) for i in range(4)])


PREFIX = {
    "vision": "model.vision_tower.",
    "vision_connector": "model.vision_connector.",
    "audio": "model.audio_tower.",
    "audio_connector": "model.audio_connector.",
    "language": "model.language_model.",
}


UNREAD = (".head.", "embed_positions")
"""What no embedding comes through (SigLIP's pooling head), and Whisper's table of sinusoids."""


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "adapters"])
def test_exactly_the_named_parts_change(small_model: Composed, row: Row, lora: bool) -> None:
    settings = {"lr": 1e-3, **({"lora": {"rank": 2}} if lora else {})}
    for parts in SUBSETS:
        model = copy.deepcopy(small_model.model)
        before = snapshot(model)
        how = stage(dict.fromkeys(parts, settings), optimizer={"weight_decay": 0.1})
        train_step(model, prepare(model, how), how, row)
        if lora:
            assert not changed(model, before)
            moved = {name for name, p in adapters(model, ["lora_B"]).items() if p.abs().max() > 0}
            owned = moved == set(adapters(model, ["lora_B"]))
        else:
            moved = changed(model, before)
            wanted = {name for name, p in model.named_parameters() if name.startswith(tuple(PREFIX[p] for p in parts))}
            owned = moved == {name for name in wanted if not any(word in name for word in UNREAD)}
        assert owned, parts
        assert {part for part, prefix in PREFIX.items() if any(n.startswith(prefix) for n in moved)} == set(parts)


class Normed(nn.Module):
    """A layer with a batch norm behind it, as conformers and convolutional networks have."""

    def __init__(self, inner: nn.Module, width: int) -> None:
        super().__init__()
        self.inner, self.norm = inner, nn.BatchNorm1d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.norm(self.inner(x).flatten(0, -2)).view_as(x)
        return found


@pytest.mark.parametrize("part", ["vision", "audio", "language"])
def test_statistics_move_only_where_the_weights_around_them_do(small_model: Composed, row: Row, part: Part) -> None:
    inner = small_model.model.model
    inner.vision_tower.post_layernorm = Normed(inner.vision_tower.post_layernorm, 32)
    inner.audio_tower.layer_norm = Normed(inner.audio_tower.layer_norm, 32)
    inner.language_model.model.norm = Normed(inner.language_model.model.norm, 32)
    others = {other: {"lr": 1e-3} for other in ("vision", "audio", "language") if other != part}
    for train, moves in (
        ({part: {"lr": 1e-3}}, {part}),
        ({part: {"lr": 1e-3, "lora": {"rank": 2}}}, set()),
        (others, set(others)),
    ):
        model = copy.deepcopy(small_model.model)
        before = snapshot(model)
        how = stage(train)
        train_step(model, prepare(model, how), how, row)
        statistics = {name for name in changed(model, before) if "running_" in name}
        assert statistics == {f"{n}_{s}" for m in moves & set(RUNNING) for n in [RUNNING[m]] for s in ("mean", "var")}


RUNNING = {  # those of an audio encoder never move: a batch's own would let clips hear each other
    "vision": "model.vision_tower.post_layernorm.norm.running",
    "language": "model.language_model.model.norm.norm.running",
}


def test_every_parameter_belongs_to_one_part(small_model: Composed) -> None:
    names = [name for name, _ in small_model.model.named_parameters()]
    owned = [[p for p in part_modules(small_model.model) if name.startswith(PREFIX[p])] for name in names]
    assert all(len(owners) == 1 for owners in owned)


def test_whispers_position_table_is_never_trained(small_model: Composed, row: Row) -> None:
    model = small_model.model
    table = model.model.audio_tower.embed_positions.weight
    before = table.detach().clone()
    how = stage({"audio": {"lr": 1e-2}}, optimizer={"weight_decay": 0.5})
    trained = prepare(model, how)
    assert not table.requires_grad
    assert model.model.audio_tower.conv1.weight.requires_grad
    train_step(model, trained, how, row)
    assert torch.equal(table, before)


def test_frozen_parts_have_no_dropout_and_trained_ones_have(small_model: Composed, row: Row) -> None:
    model = small_model.model
    trained = prepare(model, stage({"vision_connector": {"lr": 1e-3}}))
    set_modes(model, trained)
    assert {m for m in model.modules() if m.training} == set(model.model.vision_connector.modules())
    with torch.no_grad():
        assert torch.equal(row_loss(model, row), row_loss(model, row))
        set_modes(model, prepare(model, stage({"audio": {"lr": 1e-3}})))
        assert not torch.equal(row_loss(model, row), row_loss(model, row))  # the ears have dropout, and it acts
        set_modes(model, prepare(model, stage({"language": {"lr": 1e-3}})))
        assert not torch.equal(row_loss(model, row), row_loss(model, row))


def test_no_gradient_is_kept_for_what_is_frozen(small_model: Composed, row: Row) -> None:
    model = small_model.model
    set_modes(model, prepare(model, stage({"audio_connector": {"lr": 1e-3}})))
    row_loss(model, row).backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {n for n, _ in model.named_parameters() if n.startswith("model.audio_connector.")}


@pytest.mark.parametrize(
    ("train", "reads", "message"),
    [
        pytest.param({"audio": {"lr": 1.0}}, "any", "trains audio, and the model has only", id="absent part"),
        pytest.param({}, "any", "trains nothing", id="nothing"),
        pytest.param({"language": {"lr": 1.0}}, "audio", "no audio part", id="rows it cannot hear"),
        pytest.param({"audio": {"lr": 1.0, "optional": True}}, "any", "trains nothing", id="only absent parts"),
    ],
)
def test_what_a_model_cannot_do_is_refused(
    small_run: Callable[..., RunConfig], train: dict[str, Any], reads: Any, message: str
) -> None:
    from avlm.convert.compose import compose

    blind = small_run().model.model_copy(update={"audio": None})
    model = compose(blind, texts=["a"] * 3).model
    how = Stage.model_construct(
        name="s", train={p: TrainPart.model_validate(h) for p, h in train.items()}, rows=reads, steps=1
    )
    with pytest.raises(ConfigError, match=message):
        prepare(model, how)


def test_an_optional_part_is_trained_where_it_is_and_left_out_where_it_is_not(
    small_run: Callable[..., RunConfig], small_model: Composed
) -> None:
    from avlm.convert.compose import compose

    train = {"audio_connector": {"lr": 1e-3, "optional": True}, "language": {"lr": 1e-3}}
    deaf = compose(small_run().model.model_copy(update={"audio": None}), texts=["a"] * 3).model
    assert list(prepare(deaf, stage(train))) == ["language"]
    assert list(prepare(small_model.model, stage(train))) == ["audio_connector", "language"]


# ---------------------------------------------------------------- optimizer and rates


def test_each_part_has_its_rate_and_decay_is_for_matrices_only(small_model: Composed) -> None:
    model = small_model.model
    how = stage(
        {"vision": {"lr": 1e-4}, "audio": {"lr": 2e-4}, "language": {"lr": 3e-4}},
        optimizer={"weight_decay": 0.1, "betas": [0.8, 0.9], "eps": 1e-6},
    )
    optimizer = make_optimizer(prepare(model, how), how)
    assert optimizer.defaults["betas"] == (0.8, 0.9) and optimizer.defaults["eps"] == 1e-6
    names = {id(p): name for name, p in model.named_parameters()}
    found = {
        names[id(p)]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
    }
    assert len(found) == sum(p.requires_grad for p in model.parameters())
    by_hand = {
        "model.language_model.model.embed_tokens.weight": (3e-4, 0.0),
        "model.language_model.model.layers.0.self_attn.q_proj.weight": (3e-4, 0.1),
        "model.language_model.model.layers.0.input_layernorm.weight": (3e-4, 0.0),
        "model.vision_tower.embeddings.patch_embedding.weight": (1e-4, 0.1),
        "model.vision_tower.embeddings.patch_embedding.bias": (1e-4, 0.0),
        "model.vision_tower.embeddings.position_embedding.weight": (1e-4, 0.0),
        "model.audio_tower.conv1.weight": (2e-4, 0.1),
        "model.audio_tower.layers.1.fc2.bias": (2e-4, 0.0),
        "model.audio_tower.layer_norm.weight": (2e-4, 0.0),
    }
    assert {name: found[name] for name in by_hand} == by_hand


def test_bare_embeddings_of_a_vision_transformer_are_not_decayed() -> None:
    class Embeddings(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
            self.position_embeddings = nn.Parameter(torch.zeros(1, 9, 4))
            self.projection = nn.Linear(4, 4)

    how = stage({"vision": {"lr": 1e-3}}, optimizer={"weight_decay": 0.1})
    groups = make_optimizer({"vision": Embeddings()}, how).param_groups
    assert [(len(g["params"]), g["weight_decay"]) for g in groups] == [(1, 0.1), (3, 0.0)]


TENTH = Schedule(kind="constant", warmup=0.1)


@pytest.mark.parametrize(
    ("schedule", "at"),
    [
        pytest.param(TENTH, {0: 1 / 11, 9: 10 / 11, 10: 1, 50: 1, 99: 1}, id="constant"),
        pytest.param(Schedule(kind="linear", warmup=0.1), {9: 10 / 11, 10: 1, 55: 0.5, 99: 1 / 90}, id="linear"),
        pytest.param(
            Schedule(kind="cosine", warmup=0.1, floor=0.2),
            {0: 1 / 11, 10: 1, 55: 0.6, 99: 0.2 + 0.4 * (1 + math.cos(math.pi * 89 / 90))},
            id="cosine with a floor",
        ),
        pytest.param(Schedule(kind="cosine", warmup=0.0), {0: 1, 25: 0.5 + 0.5**1.5, 50: 0.5}, id="cosine at once"),
        pytest.param(
            Schedule(kind="wsd", warmup=0.1, decay=0.2), {9: 10 / 11, 10: 1, 80: 1, 90: 0.5, 99: 0.05}, id="wsd"
        ),
        pytest.param(Schedule(kind="wsd", decay=0.5, floor=0.1), {50: 1, 75: 0.55, 99: 0.1 + 0.9 / 50}, id="wsd floor"),
        pytest.param(Schedule(kind="constant", warmup=0.07), {6: 7 / 8, 7: 1}, id="7 % of 100 steps are 7"),
    ],
)
def test_rates_by_hand(schedule: Schedule, at: dict[int, float]) -> None:
    assert {step: rate(schedule, step, 100) for step in at} == pytest.approx(at, rel=1e-12)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_rates_after_the_warm_up_are_those_of_transformers(kind: Any) -> None:
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(kind, optimizer, num_warmup_steps=5, num_training_steps=50)
    for step in range(50):
        if step >= 5:
            assert rate(Schedule(kind=kind, warmup=0.1), step, 50) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_one_step_stages_have_a_rate() -> None:
    for kind in ("constant", "linear", "cosine", "wsd"):
        assert 0 < rate(Schedule(kind=kind), 0, 1) <= 1


def test_a_step_moves_each_part_by_its_own_rate(small_model: Composed, row: Row) -> None:
    """AdamW's first step is the rate itself, in every coordinate that has a gradient (arXiv:1412.6980, section 2.1)."""
    model = small_model.model
    before = snapshot(model)
    how = stage({"vision_connector": {"lr": 1e-3}, "language": {"lr": 1e-4}}, optimizer=Optimizer().model_dump())
    train_step(model, prepare(model, how), how, row)
    after = snapshot(model)
    for prefix, lr in (("model.vision_connector.", 1e-3), ("model.language_model.model.layers.1.mlp.", 1e-4)):
        moves = torch.cat([(after[n] - before[n]).abs().flatten() for n in before if n.startswith(prefix)])
        assert moves.max().item() == pytest.approx(lr, rel=1e-2)
        assert moves.median().item() == pytest.approx(lr, rel=1e-2)
