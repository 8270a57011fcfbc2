"""What a process does with memory that is free: kept for the next step, and given back when there is much of it.

The C library returns every large tensor to the system as soon as it is freed, and the system hands out zeroed pages for
the next one, page by page. For tensors of many megabytes that takes several times as long as what is computed in them.
"""

from __future__ import annotations

import ctypes
import platform
from contextlib import suppress

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
"""Names in glibc's malloc.h."""
GROW = 64 * 2**20
"""Bytes by which the heap grows at once."""


def keep_freed_memory() -> None:
    """Ask the C library to keep what is freed for what is allocated next; where it cannot, nothing changes.

    Source:
        mallopt(3) of the GNU C library: no allocation by mmap, no trimming of the heap.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, GROW)


def give_memory_back() -> None:
    """Ask the C library to return what is free, in the middle of memory too, as it would not by itself; some
    milliseconds for a gigabyte. Where it cannot, nothing changes.

    Source:
        malloc_trim(3) of the GNU C library.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
