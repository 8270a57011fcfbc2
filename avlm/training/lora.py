"""Adapters: which layers get one, how they are put on, saved and merged. All of it is PEFT's.

Layers are named inside their part, by patterns of whole path components. Which layers
a family has is read off its modules, by type, so no family has to be known by name.

Source:
    LoRA (arXiv:2106.09685), DoRA (arXiv:2402.09353), rsLoRA (arXiv:2312.03732), through Hugging Face PEFT.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from avlm.config.patterns import ALL_LINEAR, matches, nearest
from avlm.config.stage import Lora, Part, Stage
from avlm.convert.weights import aside
from avlm.errors import ConfigError
from avlm.models.modeling import AvlmForConditionalGeneration
from avlm.models.vision_encoders import vision_family
from avlm.training.checkpoint import save_tensors

if TYPE_CHECKING:
    from peft import LoraConfig

LINEAR = (nn.Linear, Conv1D)
"""`Conv1D` is GPT-2's linear layer, with its matrix the other way round."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

FUSED = (".x_proj", ".dt_proj", ".out_proj")

HEADS = {"head", "pooler"}
"""What families put behind an encoder's embeddings; it is never read here."""


@dataclass(frozen=True, slots=True)
class Layer:
    """Something in a part that can have an adapter."""

    path: str
    """Inside the part."""
    default: bool
    """Whether `all-linear` takes it."""
    parameter: bool = False
    """All experts of a mixture in one tensor, rather than a module."""


def add_adapters(model: AvlmForConditionalGeneration, parts: Mapping[Part, nn.Module], stage: Stage, seed: int) -> None:
    """Put a stage's adapters on. PEFT freezes everything else in the model with that.

    Args:
        parts: The modules of the model's parts.
        seed: Of the adapters.

    Raises:
        ConfigError: A pattern is about no layer, or a layer cannot have such an adapter.
    """
    from peft import inject_adapter_in_model

    wanted = {part: how.lora for part, how in stage.train.items() if how.lora is not None and part in parts}
    names = {id(module): name for name, module in model.named_modules()}
    found = {
        names[id(parts[part])]: (lora, find_layers(model, part, parts[part], lora, f"stages.{stage.name}.train.{part}"))
        for part, lora in wanted.items()
    }
    config = _peft_config(found)
    modules = sorted(config.target_modules)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")  # PEFT sets it for each kind of layer
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    model.peft_config["default"].target_modules = modules  # PEFT shortens them as far as this model allows
    for name, parameter in model.named_parameters():
        if ".lora_" in name:  # as PEFT does it: steps of a small rate are lost in half precision
            parameter.data = parameter.data.float()


def _peft_config(found: Mapping[str, tuple[Lora, Sequence[Layer]]]) -> LoraConfig:
    """The adapters of all parts as one configuration of PEFT's; parts go by their names in the model."""
    from peft import LoraConfig

    (first, _), *_others = found.values()
    differ = {rf"{re.escape(name)}\..+": lora for name, (lora, _) in found.items()}
    layers = [(layer.parameter, f"{name}.{layer.path}") for name, (_, chosen) in found.items() for layer in chosen]
    return LoraConfig(
        r=first.rank,
        lora_alpha=first.alpha,
        rank_pattern={key: lora.rank for key, lora in differ.items() if lora.rank != first.rank},
        alpha_pattern={key: lora.alpha for key, lora in differ.items() if lora.alpha != first.alpha},
        lora_dropout=first.dropout,
        use_dora=first.dora,
        use_rslora=first.rslora,
        target_modules=[name for parameter, name in layers if not parameter],
        target_parameters=[name for parameter, name in layers if parameter] or None,
    )


# ---------------------------------------------------------------- which layers


def find_layers(
    model: AvlmForConditionalGeneration, part: Part, module: nn.Module, lora: Lora, where: str
) -> list[Layer]:
    """The layers of a part that a stage puts adapters on.

    Args:
        module: The part.
        where: Dotted name of the part's settings, for messages.

    Raises:
        ConfigError: A pattern is about no layer, nothing is left, or a layer cannot have such an adapter.
    """
    layers = list(adaptable(model, part, module))
    chosen: dict[str, Layer] = {}
    for pattern in lora.targets:
        chosen |= {layer.path: layer for layer in _hit(pattern, layers, part, f"{where}.lora.targets")}
    for pattern in lora.exclude:
        for layer in _hit(pattern, layers, part, f"{where}.lora.exclude"):
            chosen.pop(layer.path, None)
    if not chosen:
        raise ConfigError(
            f"{where}.lora: exclude takes away every layer that targets names, so nothing of the {part} part would be "
            f"trained. Set {where}.lora.exclude=[]"
        )
    experts = [layer.path for layer in chosen.values() if layer.parameter]
    for name, value, off in (("dora", lora.dora, "false"), ("dropout", lora.dropout, "0")):
        if experts and value:
            raise ConfigError(
                f"{where}.lora.{name}={value}: {experts[0]} holds all experts in one tensor, and PEFT has no {name} "
                f"for those. Set {where}.lora.{name}={off}, or leave them out with {where}.lora.exclude=[experts.*]"
            )
    return list(chosen.values())


def _hit(pattern: str, layers: Sequence[Layer], part: Part, where: str) -> list[Layer]:
    """The layers that a pattern is about."""
    found = [layer for layer in layers if (layer.default if pattern == ALL_LINEAR else matches(pattern, layer.path))]
    if found:
        return found
    if not layers or pattern == ALL_LINEAR:
        raise ConfigError(
            f"{where}: the {part} part has no linear layer that could take an adapter. Train it whole, without lora"
        )
    near = ", ".join(nearest(pattern, (layer.path for layer in layers)))
    raise ConfigError(
        f"{where}: {pattern} is the name of no linear layer in the {part} part, so it says nothing. "
        f"The nearest names are {near}; {ALL_LINEAR} takes every one, and NAME.** all inside a module"
    )


def adaptable(model: AvlmForConditionalGeneration, part: Part, module: nn.Module) -> Iterator[Layer]:
    """Everything in a part that can have an adapter, in the order of its modules.

    Not in it: an output head that is the embeddings under another name, and matrices that are read without calling
    their layer, so that an adapter would be passed by: those of torch's own `MultiheadAttention`, and a state-space
    mixer's, but for its first, which its fused kernels take as they are.
    """
    head = module.get_output_embeddings() if part == "language" else None  # type: ignore[operator]
    tied = head is not None and head.weight is module.get_input_embeddings().weight  # type: ignore[operator]
    closed = tuple(f"{name}." for name, m in module.named_modules() if isinstance(m, nn.MultiheadAttention))
    fused = FUSED if part == "language" and model.language_model._is_stateful else ()
    unread = _unread(model, part, module)
    for name, inner in module.named_modules():
        if not name or name.startswith(closed) or name.endswith(fused) or (inner is head and tied):
            continue
        if isinstance(inner, LINEAR):
            yield Layer(name, default=inner is not head and not unread.match(f"{name}."))
        elif part == "language" and not isinstance(inner, CONVOLUTIONS):
            for own, parameter in inner.named_parameters(recurse=False):
                if parameter.ndim == 3:
                    yield Layer(f"{name}.{own}", default=True, parameter=True)


def _unread(model: AvlmForConditionalGeneration, part: Part, module: nn.Module) -> re.Pattern[str]:
    """Paths in an encoder that its embeddings do not come through: layers above the one that is read, and heads."""
    inside = [rf"(?:.*\.)?{head}\." for head in sorted(HEADS)] if part in ("vision", "audio") else []
    depth = getattr(getattr(module, "config", None), "num_hidden_layers", None)
    layer = None
    if part == "vision":
        layer = model.config.vision_layer
        layer = vision_family(model.config.vision_config).layer if layer is None else layer
    elif part == "audio":
        layer = model.config.audio_layer
    if layer is not None and depth is not None:
        stacks = [name for name, m in module.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
        inside += [rf"{re.escape(stacks[0])}\.{i}\." for i in range(layer % (depth + 1), depth) if stacks]
    return re.compile("|".join(inside) or r"(?!)")


# ---------------------------------------------------------------- afterwards


def has_adapters(module: nn.Module) -> bool:
    """Whether a part is trained through adapters, its own weights being constants."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(inner, BaseTunerLayer) for inner in module.modules())


def save_adapters(model: AvlmForConditionalGeneration, whole: Sequence[nn.Module], out: Path) -> None:
    """Write a stage's adapters, before they are merged, as a folder that PEFT loads onto what the stage began with.

    Args:
        whole: Parts, and a state head, that were trained whole beside the adapters; they are in it too, as PEFT's
            ``modules_to_save``.
    """
    from peft import get_peft_model_state_dict

    names = {id(module): name for name, module in model.named_modules()}
    state = dict(get_peft_model_state_dict(model))
    for module in whole:
        state |= {f"{names[id(module)]}.{key}": value for key, value in module.state_dict().items()}
    config = copy.deepcopy(model.peft_config["default"])
    config.base_model_name_or_path = model.name_or_path or None
    config.modules_to_save = [names[id(module)].rpartition(".")[2] for module in whole] or None
    config.inference_mode = True
    with aside(out) as folder:
        tensors = {f"base_model.model.{key}": value.detach().contiguous() for key, value in state.items()}
        save_tensors(tensors, folder / "adapter_model.safetensors")
        config.save_pretrained(folder)


def merge_adapters(model: nn.Module) -> None:
    """Add adapters into the weights they sit on, leaving plain layers behind."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for parent in list(model.modules()):
        if isinstance(parent, BaseTunerLayer):
            continue
        for name, child in list(parent.named_children()):
            layer = child
            while isinstance(layer, BaseTunerLayer):  # several tensors of one module have an adapter around the other
                layer.merge()
                layer = layer.base_layer
            if layer is not child:
                setattr(parent, name, layer)
    if hasattr(model, "peft_config"):
        del model.peft_config
