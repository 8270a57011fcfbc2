"""The language model's layers through torch.compile, while a stage's steps are taken and at no other time.

Everything else goes through the layers as they are: answers, whose cache would have them compiled again and again, and
scores. Attention over packed rows is left out of what is compiled: it cuts rows at places that are other ones in every
step, while everything around it is compiled once for rows of any length.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from avlm.errors import ConfigError
from avlm.models import attention
from avlm.models.modeling import AvlmForConditionalGeneration


class CompiledLayers:
    """The layers of a model's language model, compiled or not.

    Args:
        wanted: Whether they are to be compiled at all; the first steps that they run in take a minute longer then.
        backend: Of torch.compile.

    Raises:
        ConfigError: They are to be, and cannot.
    """

    def __init__(
        self, model: AvlmForConditionalGeneration, *, wanted: bool, backend: str | Callable[..., Any] = "inductor"
    ) -> None:
        self._layers: list[tuple[nn.Module, Callable[..., Any]]] = []
        if not wanted:
            return
        _check(model)
        layers = [m for m in model.language_model.modules() if isinstance(m, GradientCheckpointingLayer)]
        if not layers:
            raise ConfigError(
                f"speed.compile=true: {type(model.language_model).__name__} has no layers that are compiled one by "
                "one, because its family does not name them. Set speed.compile=false"
            )
        torch.compiler.reset()  # what earlier stages had compiled counts against how often one thing may be
        self._layers = [(layer, torch.compile(layer.forward, dynamic=True, backend=backend)) for layer in layers]
        self._attention = torch.compiler.disable(attention.packed_attention)  # type: ignore[no-untyped-call]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within, layers run compiled."""
        if not self._layers:
            yield
            return
        attention.register(self._attention)
        for layer, compiled in self._layers:
            layer.forward = compiled
        try:
            yield
        finally:
            for layer, _ in self._layers:
                del layer.forward  # its class's own is behind it
            attention.register()


def _check(model: AvlmForConditionalGeneration) -> None:
    """torch writes C++ for a processor, and needs something that compiles it."""
    compiler = os.environ.get("CXX", "g++")
    if model.device.type == "cpu" and shutil.which(compiler) is None:
        raise ConfigError(
            f"speed.compile=true: there is no {compiler} on this machine, and torch.compile writes C++ for a "
            "processor. Install a compiler, name it in CXX, or set speed.compile=false"
        )
