"""Memory that is free, given back to the system."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import lru_cache


def give_memory_back() -> None:
    """Hand what is free in the middle of memory to the system; some milliseconds for a server of a gigabyte.

    The C library hands back only what is free at the end, so what a burst of requests took stays taken, and between
    what lives long there are holes. Nothing happens where the library has no such call: it is glibc's.

    Source:
        malloc_trim(3) of the Linux manual.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@lru_cache(maxsize=1)
def _trim() -> Callable[[int], int] | None:
    if sys.platform != "linux":
        return None
    found: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return found
