"""The numbers that a model computes with."""

from __future__ import annotations

import torch
from torch import nn


def cast_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """Give a module's weights another type, in place. Tables that are computed, not learned, keep their precision."""
    saved = module.state_dict().keys()
    precise = tuple(
        f"{name}.{part}".removeprefix(".")
        for name, inner in module.named_modules()
        for part in getattr(inner, "_keep_in_fp32_modules_strict", None) or ()  # loading keeps those as well
    )
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if name in saved and tensor.is_floating_point() and not name.startswith(precise):
            tensor.data = tensor.data.to(dtype)
