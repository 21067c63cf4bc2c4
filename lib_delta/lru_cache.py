"""A cache that evicts its least recently used entries."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class LRUCache(Generic[Key, Value]):
    """A cache that evicts its least recently used entries.

    ``put`` evicts entries beyond ``max_count``.  Limits that change from call to call are arguments of :meth:`evict`.
    ``size_of`` returns an entry's size, in any unit.
    """

    def __init__(self, *, max_count: float = math.inf, size_of: Callable[[Value], int] = lambda _value: 0) -> None:
        self._max_count = max_count
        self._size_of = size_of
        self._entries: OrderedDict[Key, Value] = OrderedDict()

    def get(self, key: Key) -> Value | None:
        """Return an entry and mark it as the most recently used; None if it is not cached."""
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def put(self, key: Key, value: Value) -> None:
        """Store an entry as the most recently used, and evict entries beyond ``max_count``."""
        self._entries[key] = value
        self._entries.move_to_end(key)
        self.evict(max_count=self._max_count)

    def evict(self, *, max_size: float = math.inf, max_count: float = math.inf, min_count: int = 1) -> list[Value]:
        """Evict the least recently used entries until the others fit, and return the evicted ones.

        ``max_size`` limits the sum of sizes.  The last ``min_count`` entries stay, whatever their size.
        """
        evicted = []
        while len(self._entries) > min_count and (len(self._entries) > max_count or self._total_size() > max_size):
            evicted.append(self._entries.popitem(last=False)[1])
        return evicted

    def _total_size(self) -> int:
        return sum(map(self._size_of, self._entries.values()))

    def clear(self) -> None:
        """Remove all entries."""
        self._entries.clear()

    def __iter__(self) -> Iterator[Value]:
        return iter(tuple(self._entries.values()))

    def __len__(self) -> int:
        return len(self._entries)
