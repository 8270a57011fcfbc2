"""What a stage trains: parameters by part, modes, adapters, optimizer groups and rates."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from avlm.config.run import PARTS, Part, Schedule, Stage, TrainPart, stage_problem
from avlm.convert.weights import aside
from avlm.errors import ConfigError
from avlm.models.modeling import AvlmForConditionalGeneration
from avlm.training.checkpoint import save_tensors

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


def prepare(model: AvlmForConditionalGeneration, stage: Stage, seed: int = 0) -> dict[Part, nn.Module]:
    """Freeze everything the stage does not name, and put adapters where it wants them.

    Args:
        seed: Of fresh adapters. They are the same whenever the stage is begun, so a run that is killed before its first
            checkpoint begins it again with the same ones.

    Returns:
        The modules that are trained. Everything else has no gradient and is to stay in eval mode.

    Raises:
        ConfigError: The stage trains nothing, or a part that the model does not have, or wants adapters on an encoder.
    """
    modules = part_modules(model)
    check_parts(stage, tuple(modules))
    train = {part: how for part, how in stage.train.items() if part in modules}
    fixed = _fixed_parameters(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for how in train.values():
        if how.lora is not None:
            _add_lora(model, how, seed)  # first, because PEFT freezes all that is no adapter
    for part, how in train.items():
        if how.lora is None:
            for parameter in modules[part].parameters():
                parameter.requires_grad_(id(parameter) not in fixed)
    return {part: modules[part] for part in train}


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
    return {id(p) for name, p in model.named_parameters() if name.endswith("audio_tower.embed_positions.weight")}


def _add_lora(model: AvlmForConditionalGeneration, how: TrainPart, seed: int) -> None:
    """Put adapters on the language model's layers of the wanted names (whole path components, never parts of one)."""
    from peft import inject_adapter_in_model

    config = lora_config(model, how)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:  # as PEFT does it: steps of a small rate are lost in half precision
            parameter.data = parameter.data.float()


def lora_config(model: AvlmForConditionalGeneration, how: TrainPart) -> PeftConfig:
    """The adapters' configuration in PEFT's terms.

    Raises:
        ConfigError: A target names no layer, or one that shares its weights with the embeddings.
    """
    from peft import LoraConfig
    from peft.tuners.tuners_utils import BaseTunerLayer

    assert how.lora is not None
    language = model.model.language_model
    linear = (nn.Linear, BaseTunerLayer)
    ends = {name.rpartition(".")[2] for name, m in language.named_modules() if isinstance(m, linear)}
    head, embeddings = language.get_output_embeddings(), language.get_input_embeddings()
    if head is not None and head.weight is embeddings.weight:
        ends -= {name.rpartition(".")[2] for name, m in language.named_modules() if m is head}
    missing = [target for target in how.lora.targets if target not in ends]
    if missing:
        raise ConfigError(
            f"LoRA targets {', '.join(missing)} name no linear layer of the language model that could take an adapter. "
            f"Use some of {', '.join(sorted(ends))}"
        )
    names = "|".join(re.escape(target) for target in how.lora.targets)
    return LoraConfig(
        r=how.lora.rank,
        lora_alpha=how.lora.alpha,
        lora_dropout=how.lora.dropout,
        target_modules=rf"model\.language_model\.(.+\.)?({names})",
    )


def save_adapters(model: AvlmForConditionalGeneration, stage: Stage, out: Path) -> None:
    """Write a stage's adapters, before they are merged, as a folder that PEFT loads onto what the stage began with.

    Parts that were trained whole beside the adapters are in it too, as PEFT's ``modules_to_save``.
    """
    from peft import get_peft_model_state_dict

    modules = part_modules(model)
    (how,) = (how for how in stage.train.values() if how.lora is not None)
    names = {id(module): name for name, module in model.named_modules()}
    whole = [names[id(modules[p])] for p, h in stage.train.items() if h.lora is None and p in modules]
    state = dict(get_peft_model_state_dict(model))
    for name in whole:
        state |= {f"{name}.{k}": v for k, v in model.get_submodule(name).state_dict().items()}
    config = lora_config(model, how)
    config.base_model_name_or_path = model.name_or_path or None
    config.modules_to_save = [name.rpartition(".")[2] for name in whole] or None
    config.inference_mode = True
    with aside(out) as folder:
        tensors = {f"base_model.model.{k}": v.detach().contiguous() for k, v in state.items()}
        save_tensors(tensors, folder / "adapter_model.safetensors")
        config.save_pretrained(folder)


def merge_adapters(model: nn.Module) -> None:
    """Add adapters into the weights they sit on, leaving plain layers behind."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BaseTunerLayer):
                child.merge()
                setattr(parent, name, child.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


def set_modes(model: nn.Module, trained: dict[Part, nn.Module]) -> None:
    """Training mode for what is trained, eval mode for the rest: no dropout, no statistics that move."""
    model.eval()
    for module in trained.values():
        module.train()


def make_optimizer(
    trained: dict[Part, nn.Module], stage: Stage, more: Sequence[dict[str, Any]] = ()
) -> torch.optim.Optimizer:
    """AdamW with one rate for each part; decay on matrices only.

    Args:
        more: Groups of what is trained beside the parts.
    """
    groups = list(more)
    settings = stage.optimizer
    for part, module in trained.items():
        lr = stage.train[part].lr
        decayed, plain = _by_decay(module)
        for members, decay in ((decayed, settings.weight_decay), (plain, 0.0)):
            if members:
                groups.append({"params": members, "lr": lr, "peak": lr, "weight_decay": decay, "part": part})
    return torch.optim.AdamW(groups, betas=settings.betas, eps=settings.eps, fused=True)


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
