"""Several processes, each with a share of every weight, gradient and moment: torch's `fully_shard` (FSDP2).

Collectives must not depend on what a process has to read, or one waits for another for ever. So

    the language model's layers   are gathered one by one, forward and backward, and their gradients go back to their
                                  owners in each turn. A turn is one row in every process; who has none left reads a
                                  row of two tokens that teaches nothing, and backward always runs through all layers;
    everything else               (encoders, connectors, embeddings, head) is gathered once a step, before the first
                                  row, and its gradients go back once, behind the last. In between every process may
                                  use it as often as its rows want, or not at all.

Source:
    ZeRO, stage 3 (arXiv:1910.02054), as in torch.distributed.fsdp.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from avlm.config.parallel import ParallelConfig
from avlm.config.run import RunConfig
from avlm.config.stage import Stage
from avlm.errors import ConfigError
from avlm.models.modeling import AvlmForConditionalGeneration
from avlm.samples import IGNORE, Row
from avlm.training.device import move_row
from avlm.training.loss import RowLosses
from avlm.training.spreading import Spread, reading
from avlm.training.world import World


def shards(run: RunConfig, stage: Stage, world: World) -> bool:
    """Whether a stage spreads its weights; not with one process, nor where an encoder learns words by itself, which has
    no language model behind it."""
    return run.parallel.mode == "fsdp" and not world.alone and stage.supervise != "words"


def check_sharded(run: RunConfig, world: World) -> None:
    """Refuse now what a later stage could not do with its weights spread, before hours are spent on this one.

    Raises:
        ConfigError: A stage compares the model with what it was, or keeps moments in 8 bits.
    """
    for stage in run.stages:
        if stage.optimizer.kind == "adamw8bit" and shards(run, stage, world):
            raise ConfigError(
                f"stage {stage.name} has optimizer.kind=adamw8bit, whose moments stand in blocks of 256 values, and "
                "with parallel.mode=fsdp another number of processes parts them elsewhere. Set parallel.mode=data, or "
                f"stages.{stage.name}.optimizer.kind=adamw"
            )
        if stage.loss == "dpo" and shards(run, stage, world):
            raise ConfigError(
                f"stage {stage.name} has loss=dpo, which compares the model with a copy of what it was, and with "
                "parallel.mode=fsdp no process has all of it. Set parallel.mode=data"
            )


class Sharded:
    """As `DataParallel`, for a model that is spread over the processes.

    Args:
        model: Prepared for the stage, on the processor. Its parameters are other objects afterwards.
        losses: What the stage makes of a row.
        parameters: What the optimizer holds, once it is there.
        spread: As in `DataParallel`.

    Raises:
        ConfigError: Memory of the processor is asked for where there is no other.
    """

    collective = True
    """Whether all processes have to take part when weights are looked at."""

    def __init__(
        self,
        world: World,
        model: AvlmForConditionalGeneration,
        stage: Stage,
        losses: Callable[[Row], RowLosses],
        parameters: Callable[[], Sequence[nn.Parameter]],
        settings: ParallelConfig,
        spread: Spread | None = None,
    ) -> None:
        self.world, self.model, self.parameters, self.spread = world, model, parameters, spread
        self.nothing = _nothing(model, stage)
        model.plain_head()  # looked for now: it reads the whole language model
        self.plain = copy.deepcopy(model) if world.first else None
        self.root = _Root(model, losses)
        layers, towers = _layers(model), _towers(model)
        made = _Maker(world, settings)
        self.towers = [made.unit(part, keep=True, exact=True) for tower in towers for part in _exact_parts(tower)]
        self.towers += [made.unit(tower, keep=True) for tower in towers]
        for layer in layers:
            made.unit(layer, keep=False)
        self.held = [*self.towers, made.unit(self.root, keep=True)]
        model.get_input_embeddings().register_forward_hook(_through)
        self.watched, self.learned = self._watch(layers)

    def losses(self, row: Row) -> RowLosses:
        found: RowLosses = self.root(row)
        return found

    def turns(self, rows: Iterable[Row], most: int, ahead: Sequence[Row] | None = None) -> Iterator[tuple[Row, float]]:
        """The rows that go through the model here, and rows of nothing up to as many as any process has."""
        self._gather()
        own = iter(rows)
        with reading(self.spread, ahead) as of_row:
            for number in range(most):
                row = next(own, None)
                with of_row(number) if row is not None else nullcontext():
                    yield move_row(row or self.nothing, self.world.device), float(row is not None)

    def finish(self, sums: list[float]) -> list[float]:
        """Add up over all processes the gradients, and what each row's loss was added to; the sums are returned."""
        found = self.world.sums([*(float(name in self.learned) for name in self.watched), *sums])
        wanted = {name for name, count in zip(self.watched, found, strict=False) if count}
        self.learned.clear()
        for name, parameter in self.model.named_parameters():
            if name in wanted and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._close()  # whatever is there is in the precision in which it is added up
        for unit in self.held:
            unit.set_requires_gradient_sync(True, recurse=False)
        self._close()
        for unit in self.held:
            unit.set_requires_gradient_sync(False, recurse=False)
            unit.reshard()
        return found[len(self.watched) :]

    def clip(self, limit: float | None) -> float:
        """Scale gradients down to a global norm; the norm before is returned."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), math.inf if limit is None else limit)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def whole(self, model: AvlmForConditionalGeneration) -> AvlmForConditionalGeneration:
        """The model with all its weights, in the first process; all of them take part."""
        assert model is self.model
        targets = None if self.plain is None else dict(self.plain.named_parameters())
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                value = whole_tensor(parameter.detach())
                if targets is not None:
                    targets[name].data.copy_(value)
        if self.plain is None:
            return model
        buffers = dict(model.named_buffers())
        for name, buffer in self.plain.named_buffers():
            buffer.copy_(buffers[name])
        return self.plain

    def _gather(self) -> None:
        with torch.no_grad():
            self.root(None)
        for tower in self.towers:
            tower.unshard()

    def _close(self) -> None:
        """A backward pass through nothing, at the end of which torch looks after the gradients of all units."""
        self.root(None).backward()

    def _watch(self, layers: Sequence[nn.Module]) -> tuple[list[str], set[str]]:
        """Names of all trained parameters that are held, and of those that got a gradient in a step, as they get it."""
        self._gather()
        inside = {id(p) for layer in layers for p in layer.parameters()}
        learned: set[str] = set()
        names: list[str] = []
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and id(parameter) not in inside:
                names.append(name)
                parameter.register_post_accumulate_grad_hook(_noting(learned, name))  # type: ignore[no-untyped-call]
        for unit in self.held:
            unit.reshard()
        return names, learned


class _Root(nn.Module):
    """The outermost unit: from a row to what it costs; from no row to a number that backward can begin at."""

    def __init__(self, model: nn.Module, losses: Callable[[Row], RowLosses]) -> None:
        super().__init__()
        self.model, self.losses = model, losses

    def forward(self, row: Row | None) -> Any:
        return self.losses(row) if row is not None else torch.zeros((), requires_grad=True) * 1.0


class _Maker:
    """Makes units of a model: modules whose parameters are gathered together."""

    def __init__(self, world: World, settings: ParallelConfig) -> None:
        self.settings = settings
        if settings.offload and world.device.type == "cpu":
            raise ConfigError(
                "parallel.offload=true puts weights into the processor's memory, and this run has no other. "
                "Set parallel.offload=false, or device=cuda"
            )
        self.mesh = init_device_mesh(world.device.type, (world.size,))
        self.offload = CPUOffloadPolicy() if settings.offload else OffloadPolicy()

    def unit(self, module: nn.Module, *, keep: bool, exact: bool = False) -> FSDPModule:
        """Make a module one, but for what is in units already.

        Args:
            keep: It is gathered and given back once a step, by `Sharded`, rather than wherever it is used.
            exact: It computes in float32 in any case.
        """
        reduce = getattr(torch, self.settings.reduce)
        policy = MixedPrecisionPolicy(None if exact else self._precision(module), reduce, cast_forward_inputs=not keep)
        unit: FSDPModule = fully_shard(  # type: ignore[assignment]
            module, mesh=self.mesh, reshard_after_forward=not keep, mp_policy=policy, offload_policy=self.offload
        )
        unit.set_gradient_divide_factor(1.0)  # losses are shares of the mean over all processes already
        unit.set_force_sum_reduction_for_comms(True)
        if keep:
            unit.set_reshard_after_backward(False, recurse=False)
            unit.set_requires_gradient_sync(False, recurse=False)
        return unit

    def _precision(self, module: nn.Module) -> torch.dtype | None:
        """In which weights are gathered. What learns in half precision is kept in float32 from here on."""
        half = [
            p
            for p in module.parameters()
            if p.requires_grad and not isinstance(p, DTensor) and p.dtype in (torch.bfloat16, torch.float16)
        ]
        dtypes = {p.dtype for p in half}
        for parameter in half:
            parameter.data = parameter.data.float()
        if self.settings.params is not None:
            return torch.bfloat16
        return dtypes.pop() if dtypes else None


def whole_tensor(value: Tensor) -> Tensor:
    """A tensor as one piece in the processor's memory, in the first process; in the others nothing of it.

    All processes take part where it is spread over them. One that is not is returned as it is.
    """
    if not isinstance(value, DTensor):
        return value
    full = value.full_tensor()
    return full.cpu() if dist.get_rank() == 0 else full.new_empty(0)


def _layers(model: AvlmForConditionalGeneration) -> list[nn.Module]:
    """The language model's layers; none where they do not stand in one list."""
    language = model.language_model
    depth = getattr(language.config.get_text_config(), "num_hidden_layers", None)
    for module in language.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return list(module)
    return []


def _towers(model: AvlmForConditionalGeneration) -> list[nn.Module]:
    inner = model.model
    return [t for t in (inner.vision_tower, inner.audio_tower, inner.audio_beside_tower) if t is not None]


def _exact_parts(tower: nn.Module) -> list[nn.Module]:
    """Modules that their family keeps in float32 whatever the model is in; `models.precision` leaves them so too."""
    names = {f".{n}" for m in tower.modules() for n in getattr(m, "_keep_in_fp32_modules_strict", None) or ()}
    return [module for name, module in tower.named_modules() if f".{name}".endswith(tuple(names))]


def _nothing(model: AvlmForConditionalGeneration, stage: Stage) -> Row:
    """A row that teaches nothing: two tokens, none of which is learned."""
    token = next(i for i in range(len(model.placeholder_ids()) + 1) if i not in model.placeholder_ids())

    def row(teacher: Row | None = None) -> Row:
        ids = torch.full((1, 2), token)
        return Row(ids, torch.full_like(ids, IGNORE), torch.arange(2)[None], [2], [""], [], teacher=teacher)

    return row(row() if stage.loss == "distill" else None)


def _through(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """Backward runs through the language model whatever a row holds, so that its layers are gathered everywhere."""
    return output.requires_grad_() if torch.is_grad_enabled() else output


def _noting(names: set[str], name: str) -> Callable[[Tensor], None]:
    def note(parameter: Tensor) -> None:
        names.add(name)

    return note
