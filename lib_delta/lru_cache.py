"""A cache with a size limit that drops its least recently used entries first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class LRUCache(Generic[Key, Value]):
    """A cache whose entries have sizes; :meth:`evict` shrinks it."""

    def __init__(self, size: Callable[[Value], int] = lambda _value: 1) -> None:
        """Take the function that returns an entry's size; without it each entry's size is 1."""
        self._size = size
        self._entries: OrderedDict[Key, Value] = OrderedDict()

    def get(self, key: Key) -> Value | None:
        """Return an entry and mark it as used, or return None."""
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def put(self, key: Key, value: Value) -> None:
        """Add or replace an entry, as the last one used."""
        self._entries[key] = value
        self._entries.move_to_end(key)

    def evict(self, room: float, count: float = float("inf"), least: int = 1) -> list[Value]:
        """Drop the least recently used entries until the rest fits ``room`` and ``count``; return those dropped.

        The last ``least`` entries stay, however large they are.
        """
        dropped = []
        while len(self._entries) > least and (len(self._entries) > count or self._total_size() > room):
            dropped.append(self._entries.popitem(last=False)[1])
        return dropped

    def _total_size(self) -> int:
        return sum(map(self._size, self._entries.values()))

    def clear(self) -> None:
        """Drop all entries."""
        self._entries.clear()

    def __iter__(self) -> Iterator[Value]:
        return iter(tuple(self._entries.values()))

    def __len__(self) -> int:
        return len(self._entries)
