"""Reading a layer of an encoder without computing the layers behind it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


def read_layer(encoder: PreTrainedModel, layer: int, *inputs: Tensor, **kwargs: Any) -> Tensor:
    """The hidden state of a layer, as ``hidden_states[layer]`` of the encoder's own output has it.

    Where the encoder goes through one list of layers, those behind the one that is read are left out, and what they and
    the final norm would have made of it is never computed: of CLIP-L, whose last layer but one is read, a 24th.

    Args:
        layer: Counted as in ``hidden_states``: 0 is what goes into the first layer, -1 what leaves the last one.
    """
    count = int(getattr(encoder.config, "num_hidden_layers", 0))
    holder = _holder(encoder, count)
    depth = layer if layer >= 0 else count + 1 + layer
    if holder is None or not 0 < depth < count:
        states: Tensor = encoder(*inputs, output_hidden_states=True, **kwargs).hidden_states[layer]
        return states
    parent, name = holder
    seen: list[Tensor] = []
    with _shortened(parent, name, depth, seen):
        encoder(*inputs, **kwargs)
    return seen[0]


def _holder(encoder: nn.Module, count: int) -> tuple[nn.Module, str] | None:
    """Where an encoder keeps its layers: the one list of as many modules as its configuration has layers."""
    found = [
        (parent, name)
        for parent in encoder.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == count
    ]
    return found[0] if len(found) == 1 and count > 1 else None


@contextmanager
def _shortened(parent: nn.Module, name: str, depth: int, seen: list[Tensor]) -> Iterator[None]:
    """Leave the layers from ``depth`` on out of a list for a while, and keep what leaves the last one that stays."""
    layers = getattr(parent, name)

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(output if isinstance(output, Tensor) else output[0])

    hook = layers[depth - 1].register_forward_hook(keep)
    setattr(parent, name, layers[:depth])
    try:
        yield
    finally:
        setattr(parent, name, layers)
        hook.remove()
