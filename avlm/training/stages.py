"""What a stage trains: parameters by part, modes, adapters, optimizer groups and rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from avlm.config.stage import PARTS, Part, Schedule, Stage
from avlm.config.stage_fits import stage_problem
from avlm.errors import ConfigError
from avlm.models.modeling import AvlmForConditionalGeneration
from avlm.training.lora import add_adapters, find_layers, has_adapters
from avlm.training.loss import check_balance
from avlm.training.masters import Masters, make_adamw


def part_modules(model: AvlmForConditionalGeneration) -> dict[Part, nn.Module]:
    """The module of every part that the model has."""
    inner = model.model
    modules = {
        "vision": inner.vision_tower,
        "vision_connector": inner.vision_connector,
        "audio": inner.audio_tower,
        "audio_beside": inner.audio_beside_tower,
        "audio_connector": inner.audio_connector,
        "language": inner.language_model,
    }
    return {part: modules[part] for part in PARTS if modules[part] is not None}


def prepare(model: AvlmForConditionalGeneration, stage: Stage, seed: int = 0) -> dict[Part, nn.Module]:
    """Freeze everything the stage does not name, and put adapters where it wants them.

    Args:
        seed: Of fresh adapters. They are the same whenever the stage is begun, so a run that is killed before its first
            checkpoint begins it again with the same ones.

    Returns:
        The modules that are trained. Everything else has no gradient and is to stay in eval mode.

    Raises:
        ConfigError: The stage trains nothing, or a part or layer that the model does not have, or balances experts
            that it does not have.
    """
    modules = part_modules(model)
    check_parts(stage, tuple(modules))
    check_balance(model, stage)
    train = {part: how for part, how in stage.train.items() if part in modules}
    fixed = _fixed_parameters(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if any(how.lora is not None for how in train.values()):
        add_adapters(model, modules, stage, seed)  # first, because PEFT freezes all that is no adapter
    for part, how in train.items():
        if how.lora is None:
            for parameter in modules[part].parameters():
                parameter.requires_grad_(id(parameter) not in fixed)
    return {part: modules[part] for part in train}


def check_ahead(model: AvlmForConditionalGeneration, stages: Sequence[Stage]) -> None:
    """Refuse now what a later stage could not do with the parts that are here, before hours are spent on this one.

    Raises:
        ConfigError: A stage names layers that its part does not have, or balances experts where there are none.
    """
    modules = part_modules(model)
    for stage in stages:
        check_balance(model, stage)
        for part, how in stage.train.items():
            if how.lora is not None and part in modules:
                find_layers(model, part, modules[part], how.lora, f"stages.{stage.name}.train.{part}")


def check_parts(stage: Stage, parts: Sequence[str]) -> None:
    """Make sure that a model of these parts has what a stage trains and reads.

    Raises:
        ConfigError: It has not.
    """
    problem = stage_problem(stage, parts)
    if problem is not None:
        raise ConfigError(problem)


def _fixed_parameters(model: nn.Module) -> set[int]:
    """Parameters that their own library never trains: Whisper's sinusoids are a table, not weights."""
    tables = ("audio_tower.embed_positions.weight", "audio_beside_tower.embed_positions.weight")
    return {id(p) for name, p in model.named_parameters() if name.endswith(tables)}


STATISTICS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def set_modes(model: nn.Module, trained: dict[Part, nn.Module]) -> None:
    """Training mode for what is trained, eval mode for the rest: no dropout, no statistics that move.

    Under adapters a part's own weights are constants, and so are its batch norms' statistics: they are in no adapter.
    """
    model.eval()
    for module in trained.values():
        module.train()
        if has_adapters(module):
            for inner in module.modules():
                if isinstance(inner, STATISTICS):
                    inner.eval()


def make_optimizer(trained: dict[Part, nn.Module], stage: Stage, more: Sequence[dict[str, Any]] = ()) -> Masters:
    """AdamW with one rate for each part, in float32 whatever the parts are; decay on matrices only.

    Args:
        more: Groups of what is trained beside the parts.

    Raises:
        MissingExtraError: The stage asks for one whose library is not installed.
    """
    groups = list(more)
    settings = stage.optimizer
    for part, module in trained.items():
        lr = stage.train[part].lr
        decayed, plain = _by_decay(module)
        for members, decay in ((decayed, settings.weight_decay), (plain, 0.0)):
            if members:
                groups.append({"params": members, "lr": lr, "peak": lr, "weight_decay": decay, "part": part})
    return make_adamw(groups, settings)


def _by_decay(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trained matrices and kernels; and what is never decayed: biases, norms, embeddings of tokens and positions."""
    tables = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        last = name.rpartition(".")[2]  # ViTs keep position embeddings and class tokens as bare parameters
        embedding = id(parameter) in tables or "embed" in last or last.endswith("token")
        if parameter.requires_grad:
            (plain if embedding or parameter.ndim < 2 else decayed).append(parameter)
    return decayed, plain


def rate(schedule: Schedule, step: int, steps: int) -> float:
    """The learning rate at a step, as a share of its peak.

    Args:
        step: From 0.
        steps: Steps of the whole stage.
    """
    warmup = _share(schedule.warmup, steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule.kind == "constant":
        return 1.0
    if schedule.kind == "wsd":
        length = max(1, _share(schedule.decay, steps))
        left = min(1.0, (steps - step) / length)
        return schedule.floor + (1 - schedule.floor) * left
    done = (step - warmup) / max(1, steps - warmup)
    left = 1 - done if schedule.kind == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return schedule.floor + (1 - schedule.floor) * left


def _share(share: float, steps: int) -> int:
    """So many steps, rounded up; 0.07 of 100 is 7, though not in binary."""
    return math.ceil(share * steps - 1e-9)
