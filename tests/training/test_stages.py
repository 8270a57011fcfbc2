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
from torch import Tensor, nn

from avlm.config.run import PARTS, RARE, Optimizer, Part, RunConfig, Schedule, Stage, TrainPart
from avlm.convert.compose import Composed
from avlm.convert.weights import load_model, save_model
from avlm.data.encode import pack
from avlm.data.sources import JsonLines
from avlm.errors import ConfigError
from avlm.samples import Row
from avlm.training.loss import row_loss
from avlm.training.stages import (
    make_optimizer,
    merge_adapters,
    part_modules,
    prepare,
    rate,
    save_adapters,
    set_modes,
)

COMMON = [part for part in PARTS if part not in RARE]
SUBSETS = [c for n in range(1, len(COMMON) + 1) for c in itertools.combinations(COMMON, n)]
LORA = {"rank": 4, "dropout": 0.0, "targets": ["q_proj", "v_proj", "down_proj"]}


@pytest.fixture
def row(small_model: Composed, tmp_path: Path) -> Row:
    """A packed row of four samples that goes through every part."""
    source = JsonLines(tmp_path / "rows.jsonl")
    return pack([small_model.processor.encode(source[i]) for i in range(4)])


def stage(train: dict[str, Any], **settings: Any) -> Stage:
    return Stage.model_validate({"name": "s", "train": train, "steps": 4, **settings})


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items()}


def step(model: Any, trained: dict[Part, nn.Module], how: Stage, row: Row) -> None:
    set_modes(model, trained)
    optimizer = make_optimizer(trained, how)
    row_loss(model, row).backward()
    optimizer.step()


PREFIX = {
    "vision": "model.vision_tower.",
    "vision_connector": "model.vision_connector.",
    "audio": "model.audio_tower.",
    "audio_connector": "model.audio_connector.",
    "language": "model.language_model.",
}


def test_exactly_the_named_parts_change(small_model: Composed, row: Row) -> None:
    for parts in SUBSETS:
        model = copy.deepcopy(small_model.model)
        before = snapshot(model)
        how = stage({part: {"lr": 1e-3} for part in parts}, optimizer={"weight_decay": 0.1})
        step(model, prepare(model, how), how, row)
        changed = [name for name, t in snapshot(model).items() if not torch.equal(t, before[name])]
        owners = {part for part, prefix in PREFIX.items() if any(name.startswith(prefix) for name in changed)}
        assert owners == set(parts)
        assert all(name.startswith(tuple(PREFIX[p] for p in parts)) for name in changed)


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
    step(model, trained, how, row)
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
        pytest.param({"vision": {"lr": 1.0, "lora": {}}}, "any", "LoRA on vision", id="LoRA on an encoder"),
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


# ---------------------------------------------------------------- LoRA


CONNECTORS_FIRST = {
    "vision_connector": {"lr": 1e-2},
    "audio_connector": {"lr": 1e-2},
    "language": {"lr": 1e-2, "lora": LORA},
}
CONNECTORS_LAST = dict(reversed(CONNECTORS_FIRST.items()))


@pytest.mark.parametrize("train", [CONNECTORS_FIRST, CONNECTORS_LAST], ids=["connectors first", "connectors last"])
def test_lora_trains_adapters_and_connectors_beside_it_and_no_base_weight(
    small_model: Composed, row: Row, train: dict[str, Any]
) -> None:
    model = small_model.model
    before = snapshot(model)
    how = stage(train)
    step(model, prepare(model, how), how, row)
    after = snapshot(model)
    adapters = {name: t for name, t in after.items() if ".lora_" in name}
    assert len(adapters) == 2 * 3 * 2  # A and B, three targets, two layers
    assert all(t.abs().max() > 0 for t in adapters.values())
    for name, value in before.items():
        new = after[name if name in after else name.replace(".weight", ".base_layer.weight")]
        assert torch.equal(new, value) != name.startswith(("model.vision_connector.", "model.audio_connector."))


def test_fresh_adapters_follow_from_the_seed_alone(small_model: Composed) -> None:
    def adapters(seed: int, global_seed: int) -> list[Tensor]:
        model = copy.deepcopy(small_model.model)
        torch.manual_seed(global_seed)
        prepare(model, stage({"language": {"lr": 1e-3, "lora": LORA}}), seed=seed)
        return [p for name, p in model.named_parameters() if "lora_A" in name]

    assert all(torch.equal(a, b) for a, b in zip(adapters(1, 1), adapters(1, 2), strict=True))
    assert not torch.equal(adapters(1, 1)[0], adapters(2, 1)[0])


def test_adapters_on_a_half_precision_model_are_single_precision(small_model: Composed, row: Row) -> None:
    model = small_model.model.to(torch.bfloat16)
    how = stage({"language": {"lr": 1e-2, "lora": LORA}})
    step(model, prepare(model, how), how, row)
    model.eval()
    adapters = [p for name, p in model.named_parameters() if ".lora_" in name]
    assert {p.dtype for p in adapters} == {torch.float32} and all(p.abs().max() > 0 for p in adapters)
    unmerged = logits(model, row)
    merge_adapters(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(logits(model, row), unmerged, rtol=0.05, atol=0.05)


def test_merged_adapters_give_the_logits_of_unmerged_ones(small_model: Composed, row: Row) -> None:
    model = small_model.model
    names = [name for name, _ in model.named_modules()]
    how = stage(CONNECTORS_FIRST)
    step(model, prepare(model, how), how, row)
    model.eval()
    unmerged = logits(model, row)
    merge_adapters(model)
    torch.testing.assert_close(logits(model, row), unmerged, rtol=1e-5, atol=1e-5)
    assert [name for name, _ in model.named_modules()] == names  # plain layers are left behind
    assert not hasattr(model, "peft_config")


def test_the_adapter_folder_works_in_peft_alone(small_model: Composed, row: Row, tmp_path: Path) -> None:
    from peft import PeftModel

    save_model(small_model.model, small_model.processor, tmp_path / "base")
    model = load_model(tmp_path / "base").model
    how = stage(CONNECTORS_FIRST)
    step(model, prepare(model, how), how, row)
    save_adapters(model, how, tmp_path / "adapters")
    merge_adapters(model)
    model.eval()

    base = load_model(tmp_path / "base").model
    untouched = logits(base, row)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapters").eval()
    torch.testing.assert_close(logits(loaded, row), logits(model, row), rtol=1e-5, atol=1e-5)
    assert (logits(model, row) - untouched).abs().max() > 0.01  # or the comparison would say nothing
    assert loaded.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")
    assert sorted(path.name for path in (tmp_path / "adapters").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def logits(model: Any, row: Row) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(
            input_ids=row.input_ids,
            position_ids=row.position_ids,
            row_lengths=row.lengths,
            pixel_values=row.pixel_values,
            input_features=row.input_features,
            input_features_mask=row.input_features_mask,
        ).logits
        return found


def test_lora_targets_that_name_nothing_are_refused_with_what_there_is(small_model: Composed) -> None:
    how = stage({"language": {"lr": 1e-3, "lora": {"targets": ["q_proj", "query", "proj"]}}})
    with pytest.raises(ConfigError) as error:
        prepare(small_model.model, how)
    assert str(error.value) == (
        "LoRA targets query, proj name no linear layer of the language model that could take an adapter. "
        "Use some of down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    )


def test_an_adapter_on_a_head_that_is_the_embeddings_is_refused(small_model: Composed) -> None:
    how = stage({"language": {"lr": 1e-3, "lora": {"targets": ["lm_head"]}}})
    with pytest.raises(ConfigError, match="LoRA targets lm_head name no linear layer"):
        prepare(small_model.model, how)


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
    step(model, prepare(model, how), how, row)
    after = snapshot(model)
    for prefix, lr in (("model.vision_connector.", 1e-3), ("model.language_model.model.layers.1.mlp.", 1e-4)):
        moves = torch.cat([(after[n] - before[n]).abs().flatten() for n in before if n.startswith(prefix)])
        assert moves.max().item() == pytest.approx(lr, rel=1e-2)
        assert moves.median().item() == pytest.approx(lr, rel=1e-2)
