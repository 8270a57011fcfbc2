"""What a stage trains: parameters by part, modes, adapters, optimizer groups and rates."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import nn

from avlm.config.run import PARTS, Optimizer, Part, Schedule, Stage, TrainPart
from avlm.errors import ConfigError
from avlm.models.modeling import AvlmForConditionalGeneration

if TYPE_CHECKING:
    from peft import PeftConfig


def part_modules(model: AvlmForConditionalGeneration) -> dict[Part, nn.Module]:
    """The module of every part that the model has."""
    inner = model.model
    modules = {
        "vision": inner.vision_tower,
        "vision_connector": inner.vision_connector,
        "audio": inner.audio_tower,
        "audio_connector": inner.audio_connector,
        "language": inner.language_model,
    }
    return {part: modules[part] for part in PARTS if modules[part] is not None}


def prepare(model: AvlmForConditionalGeneration, stage: Stage) -> dict[Part, nn.Module]:
    """Freeze everything the stage does not name, and put adapters where it wants them.

    Returns:
        The modules that are trained. Everything else has no gradient and is to stay in eval mode.

    Raises:
        ConfigError: The stage trains a part that the model does not have.
    """
    modules = part_modules(model)
    for part in stage.train:
        if part not in modules:
            raise ConfigError(
                f"stage {stage.name} trains {part}, and the model has only {', '.join(modules)}. "
                f"Remove stages.{stage.name}.train.{part}"
            )
    fixed = _fixed_parameters(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    trained: dict[Part, nn.Module] = {}
    for part, how in stage.train.items():
        if how.lora is not None:
            trained[part] = _add_lora(model, how)
            continue
        for parameter in modules[part].parameters():
            parameter.requires_grad_(id(parameter) not in fixed)
        trained[part] = modules[part]
    return trained


def _fixed_parameters(model: nn.Module) -> set[int]:
    """Parameters that their own library never trains: Whisper's sinusoids are a table, not weights."""
    return {id(p) for name, p in model.named_parameters() if name.endswith("audio_tower.embed_positions.weight")}


def _add_lora(model: AvlmForConditionalGeneration, how: TrainPart) -> nn.Module:
    """Put adapters on the language model's layers of the wanted names (whole path components, never parts of one)."""
    from peft import inject_adapter_in_model

    language: nn.Module = model.model.language_model
    inject_adapter_in_model(lora_config(model, how), model)
    return language


def lora_config(model: AvlmForConditionalGeneration, how: TrainPart) -> PeftConfig:
    """The adapters' configuration in PEFT's terms.

    Raises:
        ConfigError: A target names no layer.
    """
    from peft import LoraConfig

    assert how.lora is not None
    language = model.model.language_model
    ends = {name.rpartition(".")[2] for name, m in language.named_modules() if isinstance(m, nn.Linear)}
    missing = [target for target in how.lora.targets if target not in ends]
    if missing:
        raise ConfigError(
            f"LoRA targets {', '.join(missing)} name no linear layer of the language model. "
            f"Use some of {', '.join(sorted(ends))}"
        )
    names = "|".join(re.escape(target) for target in how.lora.targets)
    return LoraConfig(
        r=how.lora.rank,
        lora_alpha=how.lora.alpha,
        lora_dropout=how.lora.dropout,
        target_modules=rf"model\.language_model\.(.+\.)?({names})",
    )


def save_adapters(model: nn.Module, config: PeftConfig, folder: Path) -> None:
    """Write the adapters in PEFT's own format, before they are merged."""
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model)
    save_file({f"base_model.model.{k}": v.contiguous() for k, v in state.items()}, folder / "adapter_model.safetensors")
    config.save_pretrained(folder)


def merge_adapters(model: nn.Module) -> None:
    """Add adapters into the weights they sit on, leaving plain layers behind."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BaseTunerLayer):
                child.merge()
                setattr(parent, name, child.get_base_layer())


def set_modes(model: nn.Module, trained: dict[Part, nn.Module]) -> None:
    """Training mode for what is trained, eval mode for the rest: no dropout, no statistics that move."""
    model.eval()
    for module in trained.values():
        module.train()


def make_optimizer(trained: dict[Part, nn.Module], stage: Stage) -> torch.optim.Optimizer:
    """AdamW with one rate for each part; decay on matrices only."""
    groups = []
    settings: Optimizer = stage.optimizer
    for part, module in trained.items():
        lr = stage.train[part].lr
        embeddings = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        parameters = [p for p in module.parameters() if p.requires_grad]
        decayed = [p for p in parameters if p.ndim >= 2 and id(p) not in embeddings]
        plain = [p for p in parameters if p.ndim < 2 or id(p) in embeddings]
        for members, decay in ((decayed, settings.weight_decay), (plain, 0.0)):
            if members:
                groups.append({"params": members, "lr": lr, "peak": lr, "weight_decay": decay, "part": part})
    return torch.optim.AdamW(groups, betas=settings.betas, eps=settings.eps, fused=True)


def rate(schedule: Schedule, step: int, steps: int) -> float:
    """The learning rate at a step, as a share of its peak.

    Args:
        step: From 0.
        steps: Steps of the whole stage.
    """
    warmup = math.ceil(schedule.warmup * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule.kind == "constant":
        return 1.0
    if schedule.kind == "wsd":
        length = max(1, math.ceil(schedule.decay * steps))
        left = min(1.0, (steps - step) / length)
        return schedule.floor + (1 - schedule.floor) * left
    done = (step - warmup) / max(1, steps - warmup)
    left = 1 - done if schedule.kind == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return schedule.floor + (1 - schedule.floor) * left
