"""Processes of this machine that train a stage together with this one: started for it, and gone with it.

This process is the first of them. What each does is what a process that torchrun started would do.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
import yaml
from rich.console import Console
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import Store
from transformers.utils import logging

from avlm.config.io import build, to_yaml
from avlm.config.run import RunConfig
from avlm.config.stage import Stage
from avlm.errors import AvlmError, WorldError
from avlm.training.nursery import Child, start
from avlm.training.stopping import Stopped, stop_wishes
from avlm.training.world import World, enter

LOOK_S = 0.05
FAREWELL_S = 30.0
"""How long a process has for ending by itself when the stage is done."""
HERE, SETTINGS = "here", "settings"
"""What the store knows beside what torch keeps there: who has come, and what for."""
INTERFACE = "GLOO_SOCKET_IFNAME"
"""What gloo goes by: https://docs.pytorch.org/docs/stable/distributed.html#common-environment-variables"""


@contextmanager
def mates(world: World, run: RunConfig, stage: Stage) -> Iterator[World]:
    """The processes that train a stage: this one, and beside it as many others as the settings ask for.

    Args:
        world: Those of the whole run. If they are several already, nobody is added.

    Raises:
        WorldError: One of the others ended, or was waited for too long.
    """
    size = run.parallel.processes
    if world.device.type == "cuda":
        size = min(size, torch.cuda.device_count())
    if size == 1 or not world.alone:
        yield world
        return
    threads = torch.get_num_threads()
    store = _store(size)
    store.set(SETTINGS, to_yaml(run))
    others = [
        start(__name__, stage.name, str(rank), str(size), str(store.port), env={"LOCAL_RANK": str(rank)})
        for rank in range(1, size)
    ]
    try:
        _await(store, others, run.parallel.timeout_s)
        torch.set_num_threads(_share(run, size))
        with _by_loopback():
            together = enter(store, 0, size, run.device, run.parallel)
        with together.member():
            yield together
        for other in others:
            other.wait(FAREWELL_S)
    finally:
        for other in others:
            other.terminate()
            other.wait()
        if dist.is_initialized():
            dist.destroy_process_group()
        torch.set_num_threads(threads)


def _store(size: int) -> TCPStore:
    """What the processes know each other by, for this machine alone: a store's own socket would hear every network."""
    listens = socket.create_server(("127.0.0.1", 0))
    port = listens.getsockname()[1]
    return TCPStore("127.0.0.1", port, size, is_master=True, wait_for_workers=False, master_listen_fd=listens.detach())


def _await(store: Store, others: Sequence[Child], limit_s: float) -> None:
    """Go on when all have come. Whoever ends before that is not waited for."""
    until = time.monotonic() + limit_s
    while not store.check([f"{HERE}/{rank}" for rank in range(1, len(others) + 1)]):
        ended = next((rank for rank, other in enumerate(others, 1) if other.poll() is not None), None)
        if ended is not None:
            raise WorldError(
                f"process {ended} of {len(others) + 1}, which this run started for its stage, ended with status "
                f"{others[ended - 1].returncode} before it began. Look at what it wrote, or set parallel.processes=1"
            )
        if time.monotonic() > until:
            raise WorldError(
                f"the processes that this run started for its stage did not begin within {limit_s:g} s. Raise "
                "parallel.timeout_s, or set parallel.processes=1"
            )
        time.sleep(LOOK_S)


@contextmanager
def _by_loopback() -> Iterator[None]:
    """Let gloo talk over the loopback interface, so that no network has to be there, and none can go away."""
    names = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    before = os.environ.get(INTERFACE)
    if before is None and names:
        os.environ[INTERFACE] = names[0]
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(INTERFACE, None)


def _share(run: RunConfig, size: int) -> int:
    """Processor threads of each."""
    return max(1, (run.threads or torch.get_num_threads()) // size)


def main(stage: str, *numbers: str) -> int:
    """Train one stage as one of several processes (rank, size, port); the first of them tells why that failed."""
    from avlm.training.chain import Run

    logging.disable_progress_bar()
    rank, size, port = map(int, numbers)
    store = TCPStore("127.0.0.1", port, size, is_master=False)
    run = build(RunConfig, yaml.safe_load(store.get(SETTINGS)))
    torch.set_num_threads(_share(run, size))
    store.set(f"{HERE}/{rank}", "")
    try:
        with stop_wishes(second="nothing") as stop, _by_loopback():
            world = enter(store, rank, size, run.device, run.parallel)
            with world.member():
                Run(run, console=Console(quiet=True), world=world).train_beside(stage, stop)
    except Stopped as stopped:
        return 128 + stopped.number
    except AvlmError:
        return 2
    return 0
