"""How several processes share a run's work."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from avlm.config.base import Settings


class ParallelConfig(Settings):
    """What holds where several processes train: those that the run starts by itself for each stage (`processes`), or
    those that a run is started as (`torchrun ... -m avlm train RECIPE`).

    None of it changes what is learned, so a run may go on with other settings, or with another number of processes.
    """

    processes: int = Field(1, ge=1)
    """Processes of this machine that train a stage together; where they compute on GPUs, at most as many as there are.
    Under torchrun its own number goes."""

    mode: Literal["data", "fsdp"] = "data"
    """`data`: each process has the whole model. `fsdp`: weights, gradients and the optimizer's moments are spread over
    the processes, and the language model's layers are gathered one by one where they are needed (torch's
    `fully_shard`)."""

    encoders: Literal["own", "spread"] = "own"
    """Who encodes pictures and sounds. `own`: the process that reads them. `spread`: each step's are spread evenly over
    all processes, which is meant for steps in which some have much to see and others little; a step's embeddings are
    held at once, and where an encoder is trained, all that its gradients need of them too."""

    offload: bool = False
    """With `fsdp` on GPUs: what is spread lies in the processor's memory."""

    params: Literal["bfloat16"] | None = None
    """With `fsdp`: precision in which weights are gathered and compute; each process keeps its share of them as they
    are. Weights that are trained in bfloat16 are kept in float32, and compute in bfloat16, in any case."""

    reduce: Literal["float32", "bfloat16"] = "float32"
    """With `fsdp`: precision in which gradients are added up over the processes."""

    timeout_s: float = Field(600.0, gt=0)
    """A process that waits so long for the others in a step ends the run."""
