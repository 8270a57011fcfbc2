"""Models and rows on the device where they compute."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from avlm.samples import Row

Module = TypeVar("Module", bound=nn.Module)


def seed(device: torch.device, number: int) -> None:
    """Seed what is drawn on the processor and on the device.

    As `torch.manual_seed`, which also tells the libraries of every other device, and notes each time who called it.
    """
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.manual_seed(number)


def move_model(model: Module, device: torch.device) -> Module:
    """Move a model in place, but for parts without memory (a stage that builds an encoder has no language model)."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if not parameter.is_meta and parameter.device != device:
                parameter.data = parameter.data.to(device)
        for name, buffer in module.named_buffers(recurse=False):
            if not buffer.is_meta and buffer.device != device:
                setattr(module, name, buffer.to(device))
    return model


def move_row(row: Row, device: torch.device) -> Row:
    """The row with its tensors on a device; the same row where they are there already."""
    if row.input_ids.device == device:
        return row
    moved: dict[str, Any] = {
        field.name: value.to(device, non_blocking=True)
        for field in fields(row)
        if isinstance(value := getattr(row, field.name), Tensor)
    }
    return replace(row, **moved, teacher=None if row.teacher is None else move_row(row.teacher, device))
