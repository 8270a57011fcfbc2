"""A stage's model made ready to compute as `RunConfig.speed` asks."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from importlib.util import find_spec

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from avlm.config.speed import Recompute, Speed
from avlm.config.stage import Part
from avlm.errors import ConfigError
from avlm.models.modeling import AvlmForConditionalGeneration
from avlm.training.stages import part_modules


def quicken(model: AvlmForConditionalGeneration, speed: Speed, trained: Mapping[Part, nn.Module]) -> None:
    """Set a model up for a stage, behind its adapters and modes.

    Args:
        model: Changed in place; its parameters keep their names.
        trained: What the stage trains.

    Raises:
        ConfigError: A part's layers cannot be computed again, or kernels are asked for that are not there.
    """
    if speed.recompute is not None:
        recompute_layers(model, speed.recompute, trained)
    if speed.liger != "off":
        use_liger(model, needed=speed.liger == "on")


# ---------------------------------------------------------------- recomputing


def recompute_layers(
    model: AvlmForConditionalGeneration, how: Recompute, trained: Mapping[Part, nn.Module]
) -> dict[str, int]:
    """Have layers computed again in the backward pass, through transformers' own door.

    Returns:
        How many layers of each part are.

    Raises:
        ConfigError: A part has no layers that can be.
    """
    parts = part_modules(model)
    counts: dict[str, int] = {}
    for part in how.parts:
        module = parts.get(part)
        if module is None or not (part in trained or part == "language"):
            continue  # gradients go through a frozen encoder never, through a frozen language model always
        layers = [inner for inner in module.modules() if isinstance(inner, GradientCheckpointingLayer)]
        if not layers or not isinstance(module, PreTrainedModel):
            raise ConfigError(
                f"speed.recompute.parts={part}: {type(module).__name__} cannot compute its layers again, because "
                f"the family does not offer it. Leave {part} out of speed.recompute.parts"
            )
        if part not in trained:
            _check_frozen(part, module)
        _enable(module)
        for number, layer in enumerate(layers):
            layer.gradient_checkpointing = number % how.every == 0
            # transformers does it in training mode only. This is the layer's own mode, not that of what is in it, so a
            # frozen part still drops nothing.
            layer.training = layer.training or layer.gradient_checkpointing
        counts[part] = sum(layer.gradient_checkpointing for layer in layers)
    return counts


def _enable(module: PreTrainedModel) -> None:
    """By either of its names; the old one is on its way out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        if hasattr(module, "activation_checkpointing_enable"):
            module.activation_checkpointing_enable({"use_reentrant": False})
        else:
            module.gradient_checkpointing_enable({"use_reentrant": False})


def _check_frozen(part: str, module: PreTrainedModel) -> None:
    """A layer of a frozen part in training mode must not drop anything itself."""
    drops = {
        name: value
        for name, value in module.config.get_text_config().to_dict().items()
        if "drop" in name and isinstance(value, float) and value > 0
    }
    if drops:
        name, value = next(iter(drops.items()))
        raise ConfigError(
            f"speed.recompute.parts={part}: the part is frozen in this stage, and its configuration has {name}="
            f"{value:g}, which a layer that is computed again would apply. Leave {part} out of speed.recompute.parts"
        )


# ---------------------------------------------------------------- Liger


def use_liger(model: AvlmForConditionalGeneration, *, needed: bool) -> bool:
    """Give the language model Liger Kernel's norms, rotations and feed-forward layers, on a GPU.

    Args:
        needed: Refuse to go on without, rather than do without.

    Returns:
        Whether they are used.

    Raises:
        ConfigError: They are needed, and Liger is not installed or there is no GPU.

    Source:
        Liger Kernel (arXiv:2410.10989), through transformers' integration.
    """
    there, on_gpu = find_spec("liger_kernel") is not None, model.language_model.device.type == "cuda"
    if needed and not (there and on_gpu):
        why = "liger-kernel is not installed" if not there else "its kernels run on a GPU, and the model is on none"
        raise ConfigError(f"speed.liger=on: {why}. Set speed.liger=auto, or install liger-kernel on a machine with one")
    if not (there and on_gpu):
        return False
    from transformers.integrations.liger import apply_liger_kernel

    # Its losses are left out: ours computes logits at targets only, in chunks, and needs no patched forward pass.
    kernels = {"rope": True, "rms_norm": True, "swiglu": True, "cross_entropy": False}
    apply_liger_kernel(model.language_model, {**kernels, "fused_linear_cross_entropy": False})
    return True
