"""One step of training by hand, and what it changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from avlm.config.stage import Part, Stage
from avlm.samples import Row
from avlm.training.loss import row_loss
from avlm.training.stages import make_optimizer, set_modes


def stage(train: dict[str, Any], **settings: Any) -> Stage:
    return Stage.model_validate({"name": "s", "train": train, "steps": 4, **settings})


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Names, as they were before, of the tensors that are not what they were."""
    after = {name.replace(".base_layer", ""): t for name, t in snapshot(model).items()}
    return {name for name, t in before.items() if not torch.equal(t, after[name])}


def train_step(model: Any, trained: dict[Part, nn.Module], how: Stage, row: Row) -> None:
    set_modes(model, trained)
    optimizer = make_optimizer(trained, how)
    row_loss(model, row).backward()
    optimizer.step()


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


def adapters(
    model: nn.Module, which: Sequence[str] = ("lora_A", "lora_B", "lora_magnitude")
) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if any(f".{kind}" in name for kind in which)}
