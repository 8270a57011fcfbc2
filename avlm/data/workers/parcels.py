"""Values on their way between processes of this machine: small ones in a message, large ones in shared memory.

A parcel is one message on a local socket that keeps messages whole, so a process that is
killed in the middle leaves either all of it or nothing. What is large lies in memory
without a name, whose descriptor travels with the message: nothing is left behind when
everybody is gone, and the 64 MB that many containers give to /dev/shm do not matter.
On arrival all of it is copied once, and tensors and arrays lie in the copy.

Only for processes that this one started: what arrives is unpickled.
"""

from __future__ import annotations

import io
import os
import pickle
import socket
import struct
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

INLINE = 8 * 1024
"""Largest body, in bytes, that travels in the message itself: a socket's buffer holds about 200 kB."""
APART = 1024
"""Smallest buffer, in bytes, that is laid beside the pickle and not in it."""
ALIGN = 64
"""Where a buffer begins is a multiple of this, as torch's own allocator has it."""


@dataclass(frozen=True, slots=True)
class Parcel:
    """A message that is ready to be sent, and the descriptor that goes with it."""

    message: bytes
    descriptor: int | None

    def post(self, way: socket.socket, flags: int = 0) -> None:
        """Send it, once.

        Raises:
            BlockingIOError: There is no room just now, and the flags say not to wait; it can be sent again.
        """
        beside = [] if self.descriptor is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, _INT.pack(self.descriptor))]
        way.sendmsg([self.message], beside, flags)
        self.drop()

    def drop(self) -> None:
        """Let go of what it holds."""
        if self.descriptor is not None:
            os.close(self.descriptor)


def wrap(number: int, value: Any) -> Parcel:
    """Make a parcel of a value.

    Args:
        number: Which one it is; arrives with the value.

    Raises:
        OSError: There is neither memory nor room on the disk for it.
    """
    buffers: list[pickle.PickleBuffer] = []
    stream = io.BytesIO()
    _Pickler(stream, buffers).dump(value)
    parts = [stream.getbuffer(), *(buffer.raw() for buffer in buffers)]
    sizes = [len(part) for part in parts]
    head = struct.pack(f"<qI{len(parts)}Q", number, len(parts), *sizes)
    starts, size = _places(sizes)
    if len(head) + size <= INLINE:
        body = bytearray(size)
        for part, start in zip(parts, starts, strict=True):
            body[start : start + len(part)] = part
        return Parcel(head + bytes(body), None)
    begin = _aligned(len(head))
    return Parcel(head[:HEAD], memory_of([head, *parts], [0, *(begin + start for start in starts)]))


def receive(way: socket.socket, flags: int = 0) -> tuple[int, Any] | None:
    """The next parcel's number and value; None when whoever sends is gone.

    Raises:
        BlockingIOError: There is none just now, and the flags say not to wait.
    """
    message, beside, _, _ = way.recvmsg(2 * INLINE, socket.CMSG_SPACE(_INT.size), flags)
    if not message:
        return None
    if not beside:
        number, sizes = _head(message)
        body = memoryview(bytearray(message[HEAD + 8 * len(sizes) :]))
    else:
        (descriptor,) = _INT.unpack(beside[0][2])
        try:
            data = _copied(descriptor)
        finally:
            os.close(descriptor)
        number, sizes = _head(data)
        body = data[_aligned(HEAD + 8 * len(sizes)) :]
    parts = [body[at : at + size] for at, size in zip(_places(sizes)[0], sizes, strict=True)]
    return number, pickle.loads(parts[0], buffers=parts[1:])


def _copied(descriptor: int) -> memoryview:
    """All that lies behind a descriptor, in memory of this process, which lives as long as what is made of it.

    Copying instead of mapping it: memory that was used before has its pages already.
    """
    data = torch.empty(os.fstat(descriptor).st_size, dtype=torch.uint8).numpy().data
    at = 0
    while at < len(data):
        count = os.preadv(descriptor, [data[at:]], at)
        if not count:
            raise EOFError("what a parcel says is larger than what was sent")
        at += count
    return data


HEAD = struct.calcsize("<qI")
_INT = struct.Struct("@i")


def _head(data: bytes | memoryview) -> tuple[int, tuple[int, ...]]:
    """A parcel's number, and the sizes of its parts."""
    number, count = struct.unpack_from("<qI", data)
    return number, struct.unpack_from(f"<{count}Q", data, HEAD)


def _places(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where each of the parts begins, and where all of them end."""
    starts, at = [], 0
    for size in sizes:
        starts.append(at)
        at = _aligned(at + size)
    return starts, at


def _aligned(at: int) -> int:
    return -(-at // ALIGN) * ALIGN


def memory_of(parts: Sequence[Any], starts: Sequence[int]) -> int:
    """The descriptor of memory that holds these buffers; of a file without a name where there is no such memory.

    Raises:
        OSError: There is neither memory nor room on the disk.
    """
    try:
        return _filled(_memory(), parts, starts)
    except OSError:
        return _filled(_file(), parts, starts)


def _memory() -> int:
    if not hasattr(os, "memfd_create"):
        raise OSError("this system has no memory without a name")
    return os.memfd_create("avlm")


def _file() -> int:
    descriptor, path = tempfile.mkstemp(prefix="avlm-")
    os.unlink(path)
    return descriptor


def _filled(descriptor: int, parts: Sequence[Any], starts: Sequence[int]) -> int:
    """Write the parts, which are not mapped for that: where there is no room, this is an error and that a crash."""
    try:
        for part, at in zip(parts, starts, strict=True):
            left = memoryview(part)
            while left:
                done = os.pwrite(descriptor, left, at)
                left, at = left[done:], at + done
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


# ---------------------------------------------------------------- tensors


class _Pickler(pickle.Pickler):
    """Leaves large buffers out of the pickle; tensors count as such, which by themselves they do not."""

    def __init__(self, stream: io.BytesIO, buffers: list[pickle.PickleBuffer]) -> None:
        super().__init__(stream, protocol=5, buffer_callback=_collect(buffers))

    def reducer_override(self, value: Any) -> Any:
        if type(value) is not Tensor or value.layout != torch.strided or value.device.type != "cpu":
            return NotImplemented
        if value.requires_grad or value.numel() == 0 or value.is_conj() or value.is_neg() or value.is_quantized:
            return NotImplemented
        flat = value.contiguous().reshape(-1)
        if value.numel() == 1:  # which counts as contiguous whatever its stride
            flat = flat.as_strided((1,), (1,))
        raw: Any = flat.view(torch.uint8).numpy()
        return _tensor, (pickle.PickleBuffer(raw), value.dtype, tuple(value.shape))


def _collect(buffers: list[pickle.PickleBuffer]) -> Callable[[pickle.PickleBuffer], bool]:
    def keep_in(buffer: pickle.PickleBuffer) -> bool:
        small = buffer.raw().nbytes < APART
        if not small:
            buffers.append(buffer)
        return small

    return keep_in


def _tensor(raw: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A tensor on the memory that it arrived in."""
    return torch.frombuffer(raw, dtype=dtype).view(shape)
