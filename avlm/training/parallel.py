"""Several processes, each with the whole model: gradients are added up once a step, in a few flat pieces.

A process without pictures, without sounds or without any row has no gradient for some parameters, or for none. What
is added up is agreed first, so each of them takes part in the same collectives, whatever its rows hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from avlm.models.modeling import AvlmForConditionalGeneration
from avlm.samples import Row
from avlm.training.device import move_row
from avlm.training.loss import RowLosses
from avlm.training.spreading import Spread, reading
from avlm.training.world import World

PIECE = 2**26
"""Values that are added up at once: 256 MB in float32."""


class DataParallel:
    """What the loop of a stage asks of the processes. A world of one is the plain loop.

    Args:
        losses: What a stage makes of a row.
        parameters: What the optimizer holds.
        spread: Who encodes what, unless every process encodes what it reads.
    """

    collective = False
    """Whether all processes have to take part when weights are looked at."""

    def __init__(
        self,
        world: World,
        losses: Callable[[Row], RowLosses],
        parameters: Callable[[], Sequence[nn.Parameter]],
        spread: Spread | None = None,
    ) -> None:
        self.world, self.losses, self.parameters, self.spread = world, losses, parameters, spread

    def turns(self, rows: Iterable[Row], most: int, ahead: Sequence[Row] | None = None) -> Iterator[tuple[Row, float]]:
        """The rows that go through the model here, with their weights in the loss.

        Args:
            most: Rows of the process that has most of them.
            ahead: The same rows, all at once, where their media may be encoded elsewhere.
        """
        with reading(self.spread, ahead) as of_row:
            for number, row in enumerate(rows):
                with of_row(number):
                    yield move_row(row, self.world.device), 1.0

    def finish(self, sums: list[float]) -> list[float]:
        """Add up over all processes the gradients, and what each row's loss was added to; the sums are returned."""
        if self.world.alone:
            return sums
        parameters = self.parameters()
        there = [float(parameter.grad is not None) for parameter in parameters]
        found = self.world.sums([*there, *sums])
        learned = [parameter for parameter, count in zip(parameters, found, strict=False) if count]
        for piece in _pieces(learned):
            _add_up(piece)
        return found[len(there) :]

    def clip(self, limit: float | None) -> float:
        """Scale gradients down to a global norm; the norm before is returned."""
        return float(torch.nn.utils.clip_grad_norm_(self.parameters(), math.inf if limit is None else limit))

    def whole(self, model: AvlmForConditionalGeneration) -> AvlmForConditionalGeneration:
        """The model with all its weights, in the first process."""
        return model


def _pieces(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one kind, in their order, in pieces that are added up at once."""
    kinds: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for parameter in parameters:
        kinds.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for members in kinds.values():
        piece: list[nn.Parameter] = []
        for parameter in members:
            if piece and sum(p.numel() for p in piece) + parameter.numel() > PIECE:
                yield piece
                piece = []
            piece.append(parameter)
        yield piece


def _add_up(parameters: Sequence[nn.Parameter]) -> None:
    """Make each parameter's gradient the sum over all processes; who has none gives zeros."""
    flat = torch.cat([_gradient(parameter).reshape(-1) for parameter in parameters])
    dist.all_reduce(flat)
    for parameter, part in zip(parameters, torch.split(flat, [p.numel() for p in parameters]), strict=True):
        if parameter.grad is None:
            parameter.grad = torch.empty_like(parameter)  # lies in memory as its parameter does
        parameter.grad.copy_(part.view(parameter.shape))


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
