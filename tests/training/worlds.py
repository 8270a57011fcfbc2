"""Worlds of a few processes on this machine, forked from the test so that they start at once."""

from __future__ import annotations

import io
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file

from avlm.config.io import build
from avlm.config.parallel import ParallelConfig
from avlm.config.run import RunConfig
from avlm.training.chain import Run
from avlm.training.observe import read_lines
from avlm.training.world import World, join

FORK = multiprocessing.get_context("fork")


def in_world(
    size: int, work: Callable[[World], Any], *, limit_s: float = 120, settings: ParallelConfig | None = None
) -> list[tuple[str, Any]]:
    """Do something in every process of a world.

    Returns:
        For each rank ``("done", what it returned)``, or the name of what ended it and its message.
    """
    port = free_port()
    started = []
    for rank in range(size):
        ours, theirs = FORK.Pipe(duplex=False)
        process = FORK.Process(target=_member, args=(rank, size, port, work, settings or ParallelConfig(), theirs))
        process.start()
        theirs.close()
        started.append((process, ours))
    found: list[tuple[str, Any]] = []
    for _, ours in started:
        try:
            found.append(ours.recv() if ours.poll(limit_s) else ("hangs", ""))
        except EOFError:
            found.append(("ended", ""))
    for process, _ in started:
        process.join(0 if found[-1][0] == "hangs" else 20)
        if process.is_alive():
            process.kill()
            process.join()
    return found


def _member(
    rank: int, size: int, port: int, work: Callable[[World], Any], settings: ParallelConfig, out: Connection
) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    try:
        world = join("cpu", settings)
        with world.member():
            found = work(world)
        out.send(("done", found))
    except BaseException as error:
        traceback.print_exc()
        out.send((type(error).__name__, str(error)))
    out.close()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def train_in(size: int, config: RunConfig, *, limit_s: float = 120, **settings: Any) -> list[tuple[str, Any]]:
    """Train a run in a world of so many processes; in this process for one."""

    def work(world: World) -> str:
        console = Console(record=True, file=io.StringIO(), width=1000)
        Run(config, console=console, world=world, **settings).train()
        return console.export_text()

    if size == 1:
        try:
            return [("done", work(World(0, 1, torch.device("cpu"))))]
        except Exception as error:
            return [(type(error).__name__, str(error))]
    return in_world(size, work, limit_s=limit_s, settings=config.parallel)


def changed(config: RunConfig, out: Path, **update: Any) -> RunConfig:
    """The same run elsewhere, with other settings."""
    return build(RunConfig, {**config.model_dump(mode="json"), "out": str(out), **update})


def weights(out: Path) -> dict[str, torch.Tensor]:
    """Of the model that a run published."""
    return {
        name: t.float() for path in sorted((out / "model").glob("*.safetensors")) for name, t in load_file(path).items()
    }


def lines(out: Path, names: Sequence[str] = ("loss", "grad_norm", "tokens", "target_tokens", "samples")) -> list[Any]:
    return [[row[name] for name in names] for row in read_lines(out / "metrics.jsonl")]
