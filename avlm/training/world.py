"""The processes of a run: which one this is, what they tell each other, and that none waits for one that is gone.

Started by torchrun (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in the environment), each process is one
rank. What they tell each other here is JSON, on the processor; gradients take their own way, in `parallel`.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from avlm.config.parallel import ParallelConfig
from avlm.errors import AvlmError, ConfigError, WorldError

PATIENCE = timedelta(days=7)
"""How long others wait where the first process works alone (indexes, answers, files). One that ends is seen at once."""
LAST_WORDS_S = 5.0
"""How long the reason is looked for when another process is gone."""
FAILED = "failed"
LOST = ("connection closed", "connection reset", "connection refused", "broken pipe", "timed out", "gloo", "nccl")
"""Words in errors about processes that are gone or late."""

_joined = itertools.count()
"""Worlds that this process was a member of: one after the other they use the same store, each its own keys."""

Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class World:
    """All processes of a run, seen from one of them. Without others every method does nothing, or its own part.

    Args:
        rank, size: Which process this is, of how many.
        device: Where this one computes.
        store: What the processes know each other by.
        patient: The group that waits for the first process.
    """

    rank: int
    size: int
    device: torch.device
    store: Any = None
    patient: Any = None

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks for all."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.size == 1

    def wait(self) -> None:
        """Go on when all are here."""
        if not self.alone:
            dist.barrier(group=self.patient)

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """The first process does what is in the block, then the others do, who find it done."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    def gather(self, value: Any) -> list[Any]:
        """What each process says, by rank; anything that JSON can say."""
        if self.alone:
            return [value]
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(own)]))
        room = max(int(size) for size in sizes)
        said = [torch.zeros(room, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(said, torch.nn.functional.pad(own, (0, room - len(own))))
        return [
            json.loads(words[: int(size)].numpy().tobytes().decode()) for words, size in zip(said, sizes, strict=True)
        ]

    def most(self, *numbers: int) -> list[int]:
        """The largest of what the processes say, number by number."""
        if self.alone:
            return list(numbers)
        found = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return [int(number) for number in found]

    def sums(self, numbers: list[float]) -> list[float]:
        """The sums of what the processes say, number by number, in float64."""
        if self.alone:
            return numbers
        found = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(found)
        return [float(number) for number in found]

    def agree(self, what: str, value: Any) -> None:
        """Make sure that all processes see the same.

        Raises:
            ConfigError: They do not.
        """
        seen = self.gather(value)
        other = next((rank for rank, theirs in enumerate(seen) if theirs != seen[0]), None)
        if other is not None:
            raise ConfigError(
                f"the processes of this run see different {what}: process 0 {_short(seen[0])}, process {other} "
                f"{_short(seen[other])}. Start all of them with the same command, on a disk that they share"
            )

    def leave_word(self, topic: str, value: Any) -> None:
        """Leave word for the first process, who hears it when it looks. No collective, so a thread may.

        Args:
            topic: Used once by each process.
            value: Anything that JSON can say.
        """
        with suppress(RuntimeError):  # the process that keeps the store is gone, and nobody listens
            self.store.set(f"{topic}/{self.rank}", json.dumps(value))

    def words(self, topic: str, ranks: Iterable[int]) -> dict[int, Any]:
        """What these processes have left under a topic so far, by rank; it is there once."""
        found: dict[int, Any] = {}
        for rank in ranks:
            key = f"{topic}/{rank}"
            if self.store.check([key]):
                found[rank] = json.loads(self.store.get(key))
                self.store.delete_key(key)
        return found

    @contextmanager
    def member(self) -> Iterator[None]:
        """Take part in the world while the block runs. Whatever ends one process ends all of them, with the reason.

        Raises:
            WorldError: Another process ended, or was waited for too long.
        """
        if self.alone:
            yield
            return
        try:
            yield
        except (RuntimeError, OSError, AvlmError) as error:
            if _is_loss(error):
                raise WorldError(self._last_words(error)) from None
            self._tell(error)
            raise
        except Exception as error:
            self._tell(error)
            raise
        dist.destroy_process_group()

    def _tell(self, error: Exception) -> None:
        """Leave the reason for the others, who see that this process is gone when it is."""
        words = {"rank": self.rank, "kind": type(error).__name__, "message": str(error)[:2000]}
        try:
            if not self.store.check([FAILED]):
                self.store.set(FAILED, json.dumps(words))
        except RuntimeError:  # the process that keeps the store is gone itself
            return

    def _last_words(self, error: Exception) -> str:
        """Why another process is gone, as far as that can be known."""
        until = time.monotonic() + LAST_WORDS_S
        try:
            while time.monotonic() < until:
                if self.store.check([FAILED]):
                    words = json.loads(self.store.get(FAILED))
                    return (
                        f"process {words['rank']} of {self.size} failed, and process {self.rank} cannot go on without "
                        f"it: {words['kind']}: {words['message']}"
                    )
                time.sleep(0.1)
        except RuntimeError:
            pass
        return (
            f"process {self.rank} of {self.size} waited for another one that has ended or hangs ("
            f"{str(error).splitlines()[0][:200]}). Look at what the others wrote; the same command goes on from the "
            "last checkpoint. If a step really takes so long, raise parallel.timeout_s"
        )


def place(device: Device) -> torch.device:
    """Where this process computes: with `auto` on a GPU where there is one.

    Raises:
        ConfigError: There is no such GPU.
    """
    local = int(os.environ.get("LOCAL_RANK", 0))
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("device=cuda, and torch finds no GPU here. Set device=auto or device=cpu")
    if local >= torch.cuda.device_count():
        raise ConfigError(
            f"this is process {local} of this machine, and torch finds {torch.cuda.device_count()} GPUs. "
            "Start as many processes as there are GPUs (torchrun --nproc-per-node)"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def one_process(device: Device = "auto") -> World:
    """A world of this process alone."""
    return World(0, 1, place(device))


def join(device: Device, settings: ParallelConfig) -> World:
    """Become a member of the world that torchrun started; without it, of one of this process alone.

    Raises:
        ConfigError: There is no such GPU.
        WorldError: The others do not come.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1 or "RANK" not in os.environ:
        return one_process(device)
    try:
        store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=settings.timeout_s)))
    except (dist.DistError, RuntimeError) as error:
        raise _not_found(size, error) from None
    return enter(PrefixStore(f"avlm/{next(_joined)}", store), rank, size, device, settings)


def enter(store: Store, rank: int, size: int, device: Device, settings: ParallelConfig) -> World:
    """Become a member of the world whose processes know each other by this store.

    Raises:
        ConfigError: There is no such GPU.
        WorldError: The others do not come.
    """
    here = place(device)
    try:
        dist.init_process_group(
            "gloo" if here.type == "cpu" else "cpu:gloo,cuda:nccl",
            store=store,
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=settings.timeout_s),
        )
        patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    except (dist.DistError, RuntimeError) as error:
        raise _not_found(size, error) from None
    return World(rank, size, here, store, patient)


def _not_found(size: int, error: Exception) -> WorldError:
    return WorldError(
        f"the {size} processes of this run did not find each other ({str(error).splitlines()[0][:200]}). "
        "Start all of them, with the same MASTER_ADDR and MASTER_PORT"
    )


def _is_loss(error: Exception) -> bool:
    """Whether an error is about another process, rather than this one."""
    if isinstance(error, AvlmError):
        return False
    words = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in words for word in LOST)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 100 else text[:100] + "..."
