"""What a forward pass changes in a model besides its output: the statistics of batch norms, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from avlm.training.stages import STATISTICS


class MovingStatistics:
    """Buffers of the batch norms that learn; a model without any costs nothing.

    Args:
        roots: Where they are looked for.
    """

    def __init__(self, roots: Iterable[nn.Module]) -> None:
        self.norms = [module for root in roots for module in root.modules() if isinstance(module, STATISTICS)]
        self._kept: list[tuple[Tensor, Tensor]] = []

    def remember(self) -> None:
        """Keep them as they are."""
        learning = [norm for norm in self.norms if norm.training]
        self._kept = [(buffer, buffer.clone()) for norm in learning for buffer in norm.buffers()]

    def restore(self) -> None:
        """Make them what they were."""
        with torch.no_grad():
            for buffer, kept in self._kept:
                buffer.copy_(kept)


@contextmanager
def evaluating(roots: Iterable[nn.Module]) -> Iterator[None]:
    """Eval mode without gradients and with draws of its own while the block runs; modes and draws come back."""
    modes = [(module, module.training) for root in roots for module in root.modules()]
    for module, _ in modes:
        module.training = False
    try:
        with torch.random.fork_rng(), torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
