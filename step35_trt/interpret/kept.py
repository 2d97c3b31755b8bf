"""A bounded memory of what is expensive to make again."""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

V = TypeVar("V")


class Kept(Generic[V]):
    """Values by key, up to so many bytes together: the least recently used goes first. Threads may share it.

    Args:
        budget: Bytes; a larger value is handed on and not kept.
        size: Bytes of a value.
    """

    def __init__(self, budget: int, size: Callable[[V], int]) -> None:
        self.budget, self.held = budget, 0
        self._size, self._lock = size, Lock()
        self._values: OrderedDict[Hashable, V] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], V]) -> V:
        """The value of a key, made where it is not kept."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        # Not under the lock: two threads may make the same, and neither waits.
        value = make()
        with self._lock:
            if key not in self._values and self._size(value) <= self.budget:
                self._values[key] = value
                self.held += self._size(value)
            while self.held > self.budget:
                self.held -= self._size(self._values.popitem(last=False)[1])
        return value
