"""What is remembered for as long as there is room: the last used stays."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Kept(Generic[K, V]):
    """Values by key, up to so many bytes of them. Safe for several threads.

    Args:
        capacity: Bytes; 0 remembers nothing.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        self._values: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: K) -> V | None:
        """A value, which counts as used now; None where it is not known."""
        with self._lock:
            found = self._values.get(key)
            if found is None:
                return None
            self._values.move_to_end(key)
            return found[0]

    def put(self, key: K, value: V, size: int) -> None:
        """Remember a value of so many bytes; what was not used for longest goes, where it is too much."""
        if size > self.capacity:
            return
        with self._lock:
            self._drop(key)
            self._values[key] = value, size
            self.used += size
            while self.used > self.capacity:
                self._drop(next(iter(self._values)))

    def _drop(self, key: K) -> None:
        if key in self._values:
            self.used -= self._values.pop(key)[1]
