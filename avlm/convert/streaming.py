"""Weights on their way from files to files, tensor by tensor: no model is ever whole in memory.

A `Tensor on disk` is its name, type and shape, and a way to read its bytes. Renaming and
reordering tensors moves bytes and nothing else, so whatever type they have is kept, and a
copy is the original bit for bit.

The format is safetensors': eight bytes with the length of a JSON header, the header, the
tensors end to end (https://huggingface.co/docs/safetensors). Files of PyTorch's own format
are read only by `read_pickles`, which the user must have asked for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from avlm.errors import WeightsError

SHARD_BYTES = 5_000_000_000
"""Largest file written, where no single tensor is larger."""
_BLOCK = 16 * 2**20
_LONGEST_HEADER = 100_000_000

BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
"""Bytes of one element, by safetensors' names of types."""

TORCH = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2", torch.int16: "I16", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int32: "I32", torch.float32: "F32", torch.int64: "I64", torch.float64: "F64",
}  # fmt: skip

Blocks = Callable[[], Iterator[bytes]]
Progress = Callable[[str, int, int], None]
"""Called with what is done, and (done, all) of it."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor that can be read, a block of bytes at a time."""

    dtype: str
    """safetensors' name of the type."""
    shape: tuple[int, ...]
    blocks: Blocks

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * BYTES[self.dtype]

    def same(self, other: Stored) -> bool:
        """Whether both have the same type, shape and bytes."""
        if (self.dtype, self.shape) != (other.dtype, other.shape):
            return False
        return all(a == b for a, b in zip(self.blocks(), other.blocks(), strict=True))


def stored(tensor: Tensor) -> Stored:
    """A tensor in memory as one to be written."""

    def blocks() -> Iterator[bytes]:
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        for start in range(0, len(flat), _BLOCK):
            yield flat[start : start + _BLOCK].numpy().tobytes()

    return Stored(TORCH[tensor.dtype], tuple(tensor.shape), blocks)


def read_files(paths: Iterable[Path]) -> dict[str, Stored]:
    """Every tensor of some safetensors files, in the order in which they lie there.

    Raises:
        WeightsError: A file is none, is cut off, or repeats a name of another.
    """
    found: dict[str, Stored] = {}
    for path in paths:
        for name, tensor in _read_header(path).items():
            if name in found:
                raise WeightsError(
                    f"{path}: holds {name}, which another file of the folder holds too, so one of them is left over "
                    "from another model. Copy or download the folder again"
                )
            found[name] = tensor
    return found


def _read_header(path: Path) -> dict[str, Stored]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(_LONGEST_HEADER, max(0, size - 8)):
            raise _damaged(path, f"its header of {length} bytes does not fit into the {size} bytes of the file")
        try:
            header = dict(json.loads(file.read(length)))
            header.pop("__metadata__", None)
            entries = {str(name): _entry(value) for name, value in header.items()}
        except (ValueError, TypeError, KeyError) as error:
            raise _damaged(path, f"its header is not understood ({type(error).__name__}: {error})") from None
    data = 8 + length
    end = data + max((stop for _, _, _, stop in entries.values()), default=0)
    if end != size:
        raise _damaged(path, f"its header tells of {end} bytes, and it has {size}")
    ordered = sorted(entries.items(), key=lambda item: item[1][2])
    return {name: Stored(dtype, shape, _from_file(path, data + a, b - a)) for name, (dtype, shape, a, b) in ordered}


def _entry(value: dict[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
    """Type, shape and place of one tensor, as the header tells it.

    Raises:
        ValueError, KeyError, TypeError: It contradicts itself.
    """
    shape = tuple(int(side) for side in value["shape"])
    start, stop = (int(offset) for offset in value["data_offsets"])
    if not 0 <= start <= stop or min(shape, default=0) < 0 or stop - start != math.prod(shape) * BYTES[value["dtype"]]:
        raise ValueError(f"{value} does not add up")
    return value["dtype"], shape, start, stop


def _from_file(path: Path, start: int, length: int) -> Blocks:
    def blocks() -> Iterator[bytes]:
        left = length
        with path.open("rb") as file:
            file.seek(start)
            while left:
                block = file.read(min(left, _BLOCK))
                if not block:
                    raise _damaged(path, "it became shorter while it was read")
                left -= len(block)
                yield block

    return blocks


def _damaged(path: Path, why: str) -> WeightsError:
    return WeightsError(f"{path}: is not a whole safetensors file: {why}. Copy or download it again")


def read_pickles(paths: Iterable[Path]) -> dict[str, Stored]:
    """Every tensor of some files of PyTorch's own format, read without running what they hold (`weights_only`).

    Raises:
        WeightsError: A file holds something else than tensors, or is damaged.
    """
    found: dict[str, Stored] = {}
    for path in paths:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            found |= {str(name): stored(tensor) for name, tensor in state.items()}
        except Exception as error:  # pickle, zip and torch each have their own kinds
            detail = " ".join(str(error).split())[:200]
            raise WeightsError(
                f"{path}: is not a file of tensors alone ({type(error).__name__}: {detail}), and nothing else is read. "
                "Load it where it came from and save it as safetensors"
            ) from None
    return found


def write_files(
    tensors: Mapping[str, Stored], folder: Path, *, shard_bytes: int = SHARD_BYTES, progress: Progress | None = None
) -> None:
    """Write tensors as ``model.safetensors``, or as several files with an index where they are too many for one.

    Args:
        tensors: Written in their order, so that files are read from front to back.
        progress: Called with ("tensors", done, all).

    Raises:
        OSError: The disk is full or read-only.
    """
    shards: list[dict[str, Stored]] = [{}]
    used = 0
    for name, tensor in tensors.items():
        if shards[-1] and used + tensor.num_bytes > shard_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = tensor
        used += tensor.num_bytes
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        where = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": sum(t.num_bytes for t in tensors.values())}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    done = 0
    for file, shard in zip(names, shards, strict=True):
        for _ in _write_file(shard, folder / file):
            done += 1
            if progress is not None:
                progress("tensors", done, len(tensors))


def _write_file(tensors: Mapping[str, Stored], path: Path) -> Iterator[str]:
    """Write one file; each tensor's name comes back when it is written."""
    # Wide types first, so that every tensor begins at a whole number of its elements.
    ordered = sorted(tensors.items(), key=lambda item: -BYTES[item[1].dtype])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in ordered:
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape)}
        header[name]["data_offsets"] = [start, start + tensor.num_bytes]
        start += tensor.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in ordered:
            for block in tensor.blocks():
                file.write(block)
            yield name
