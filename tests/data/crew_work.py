"""Work for crews that any interpreter can import."""

from __future__ import annotations

import time


def square(item: int) -> int:
    return item * item


def countdown(item: int) -> int:
    """Takes a few milliseconds."""
    until = time.monotonic() + 0.003
    while time.monotonic() < until:
        pass
    return item
