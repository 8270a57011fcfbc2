"""Tensors that are spread over processes, on the disk: each process writes what it holds, and reads what it will hold.

Which piece of which tensor lies where, and which of them a process needs, is worked out by the planners of
torch.distributed.checkpoint, so a checkpoint of any number of processes is read by any other. The files are safetensors
that tell where their pieces begin in the way of torch's own writer of such files, so its reader takes them too.
"""

from __future__ import annotations

import errno
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem, WriteItemType

from avlm.training.world import World

LOOK_S = 0.02
"""How often the first process looks for word of the others."""
GIVE_UP_S = 5.0
"""How much longer than itself it waits for them when the run has ended with an error."""
PLACES, BEGINS = "DCP_SHARDING_INFO", "saved_offsets"
"""What torch's `HuggingFaceStorageWriter` calls where pieces begin, in the header of a file."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Names of the safetensors format."""

Places = Mapping[str, tuple[int, ...]]
"""Where pieces begin in the tensors they are of, by name."""


# ---------------------------------------------------------------- writing


def own_pieces(tensors: Mapping[str, Tensor], *, first: bool) -> tuple[dict[str, Tensor], Places]:
    """What this process writes of tensors of which some are spread over all of them.

    Args:
        first: Whether it is the process that writes those which are the same everywhere.

    Returns:
        The pieces, which share memory with the tensors, and where they begin. Empty shares are left out.
    """
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(tensors), is_coordinator=first)
    pieces: dict[str, Tensor] = {}
    places: dict[str, tuple[int, ...]] = {}
    for item in planner.create_local_plan().items:
        if item.type != WriteItemType.SHARD and not first:
            continue
        piece, chunk = planner.resolve_data(item), item.tensor_data
        assert isinstance(piece, Tensor) and chunk is not None, "only tensors are given"
        if piece.numel() or item.type != WriteItemType.SHARD:
            pieces[item.index.fqn], places[item.index.fqn] = piece.detach(), tuple(chunk.chunk.offsets)
    return pieces, places


def header(names: Iterable[str], places: Places) -> dict[str, str]:
    """What the header of a file tells of its pieces."""
    return {PLACES: json.dumps({name: {BEGINS: places[name]} for name in names}), "DCP_VERSION": "1.0", "format": "pt"}


class Shares:
    """The shares of one checkpoint: what the processes that write them tell the first, who publishes them together.

    They leave word in the run's store rather than meet in a collective, so threads may do it while the loops go on, and
    nobody waits for a process that is gone.

    Args:
        mark: What this attempt is known by in all processes, and no other attempt ever was: of a run that was killed,
            a process may still be writing.
        failed: Whether an error has ended the run meanwhile, so that others may be gone.
    """

    def __init__(self, world: World, mark: str, failed: Callable[[], bool] = lambda: False) -> None:
        self.world, self.mark, self.failed = world, mark, failed
        self._began = time.monotonic()

    @property
    def suffix(self) -> str:
        """Of the names of this process's files."""
        return f"-{self.world.rank + 1:05d}-of-{self.world.size:05d}"

    def tell(self, hashes: Mapping[str, str]) -> None:
        """Tell the first process that this one's files are on the disk, and their hashes."""
        self.world.leave_word(self._topic, {"files": dict(hashes)})

    def tell_failure(self, error: BaseException) -> None:
        """Tell the first process that this one's files will not come."""
        known = isinstance(error, OSError) and error.errno is not None
        number, reason = (error.errno, error.strerror) if known else (errno.EIO, str(error))  # type: ignore[attr-defined]
        self.world.leave_word(self._topic, {"errno": number, "reason": reason})

    def collect(self, wanted: Callable[[], bool]) -> dict[str, str]:
        """Wait in the first process, which has written its own, until all others have told.

        Returns:
            Hashes of the others' files, by name.

        Raises:
            OSError: One of them could not write; or a run has ended with an error, and one of them says nothing. Their
                shares are alike and they began together, so each is given as long again as the first one took.
        """
        told: dict[int, Any] = {}
        missing = set(range(1, self.world.size))
        since = time.monotonic()
        patience = GIVE_UP_S + since - self._began
        while missing:
            told |= self.world.words(self._topic, sorted(missing))
            missing -= told.keys()
            since = since if self.failed() else time.monotonic()
            if missing and (not wanted() or time.monotonic() - since > patience):
                raise TimeoutError(errno.ETIMEDOUT, f"process {min(missing)} of {self.world.size} wrote no share of it")
            if missing:
                time.sleep(LOOK_S)
        for _, said in sorted(told.items()):
            if "files" not in said:
                raise OSError(said["errno"], said["reason"])
        return {name: digest for said in told.values() for name, digest in said["files"].items()}

    @property
    def _topic(self) -> str:
        return f"checkpoint/{self.mark}"


# ---------------------------------------------------------------- reading


class Kind(NamedTuple):
    """What a stored tensor is like as a whole."""

    shape: torch.Size
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class _Piece:
    path: Path
    dtype: torch.dtype
    chunk: ChunkStorageMetadata


class Stored:
    """Tensors as they lie in files, each whole or in pieces; only headers are read until `read`.

    Args:
        folder: Where the files lie.
        names: Of the files.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self._pieces: dict[str, list[_Piece]] = {}
        for name in names:
            self._take(folder / name)
        self.kinds = {name: _kind(pieces) for name, pieces in self._pieces.items()}
        """Of every tensor, by name."""

    def read(self, targets: Mapping[str, Tensor]) -> int:
        """Read tensors into others, of which this process may hold all or a share. Nobody else need take part.

        Args:
            targets: By name; of the stored one's shape, and of whatever type and on whatever device they are.

        Returns:
            Values that were read.
        """
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(dict(targets), self._metadata(targets), is_coordinator=True)
        read = 0
        with ExitStack() as stack, torch.no_grad():
            files: dict[Path, Any] = {}
            for item in planner.create_local_plan().items:
                path = self._path(item)
                if path not in files:
                    files[path] = stack.enter_context(safe_open(path, "pt"))
                planner.resolve_tensor(item).copy_(_slice(files[path], item))
                read += math.prod(item.lengths)
        return read

    def _take(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            places = json.loads((file.metadata() or {}).get(PLACES, "{}"))
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                part = file.get_slice(name)
                shape = torch.Size(part.get_shape())
                begins = torch.Size(places[name][BEGINS] if places else [0] * len(shape))
                piece = _Piece(path, DTYPES[part.get_dtype()], ChunkStorageMetadata(begins, shape))
                self._pieces.setdefault(name, []).append(piece)

    def _metadata(self, names: Iterable[str]) -> Metadata:
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(self.kinds[name].dtype),
                    self.kinds[name].shape,
                    [piece.chunk for piece in self._pieces[name]],
                )
                for name in names
            }
        )

    def _path(self, item: ReadItem) -> Path:
        """The file that holds what is to be read."""
        begins = item.storage_index.offset
        pieces = self._pieces[item.storage_index.fqn]
        return next(piece.path for piece in pieces if piece.chunk.offsets == begins)


def _kind(pieces: Sequence[_Piece]) -> Kind:
    ends = [[a + b for a, b in zip(p.chunk.offsets, p.chunk.sizes, strict=True)] for p in pieces]
    return Kind(torch.Size(map(max, *ends) if len(ends) > 1 else ends[0]), pieces[0].dtype)


def _slice(file: Any, item: ReadItem) -> Tensor:
    name = item.storage_index.fqn
    if not item.lengths:
        found: Tensor = file.get_tensor(name)
        return found
    where = tuple(slice(a, a + n) for a, n in zip(item.storage_offsets, item.lengths, strict=True))
    part: Tensor = file.get_slice(name)[where]
    return part
