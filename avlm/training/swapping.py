"""Tensors of any shapes from every process to every other, in one exchange that all of them take part in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from avlm.training.world import World

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MOST_DIMENSIONS = 4
HEADER = 2 + MOST_DIMENSIONS
"""Numbers that tell a tensor's kind, how many dimensions it has, and how long each is."""


def swap(world: World, parcels: Sequence[Sequence[Tensor]], counts: Sequence[int]) -> list[list[Tensor]]:
    """Send tensors to each process, and get those that each sends here. All processes call this together.

    Args:
        parcels: For each process what it gets, on this one's device; what this one has for itself stays where it is.
        counts: How many tensors each of them sends here.

    Returns:
        For each process what it sent, in its order; the bits are those of the sender.
    """
    headers = [[_header(tensor) for tensor in parcel] for parcel in parcels]
    flat = torch.tensor([number for parcel in headers for header in parcel for number in header], dtype=torch.int64)
    sizes = [len(parcel) * HEADER for parcel in parcels]
    told = _exchange(flat, sizes, [count * HEADER for count in counts]).view(-1, HEADER).tolist()
    starts = [sum(counts[:rank]) for rank in range(world.size + 1)]
    coming = [told[a:b] for a, b in pairwise(starts)]
    payload = [_bytes(tensor) for parcel in parcels for tensor in parcel]
    data = torch.cat(payload) if payload else torch.zeros(0, dtype=torch.uint8, device=world.device)
    sent = [sum(tensor.numel() * tensor.element_size() for tensor in parcel) for parcel in parcels]
    got = _exchange(data, sent, [sum(map(_size, heads)) for heads in coming])
    pieces = iter(torch.split(got, [_size(header) for heads in coming for header in heads]))
    return [[_tensor(next(pieces), header) for header in heads] for heads in coming]


def _exchange(flat: Tensor, sent: list[int], got: list[int]) -> Tensor:
    found = flat.new_empty(sum(got))
    dist.all_to_all_single(found, flat, got, sent)
    return found


def _header(tensor: Tensor) -> list[int]:
    shape = list(tensor.shape)
    return [DTYPES.index(tensor.dtype), len(shape), *shape, *[0] * (MOST_DIMENSIONS - len(shape))]


def _size(header: list[int]) -> int:
    """Bytes of the tensor that a header tells of."""
    return int(math.prod(header[2 : 2 + header[1]]) * DTYPES[header[0]].itemsize)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _tensor(data: Tensor, header: list[int]) -> Tensor:
    """A tensor in memory of its own, which a number of its kind may begin at."""
    return data.clone().view(DTYPES[header[0]]).view(header[2 : 2 + header[1]])
