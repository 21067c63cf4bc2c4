"""Things that are kept for as long as there is room, the most lately used ones."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class LRUCache(Generic[Key, Value]):
    """A store of things with sizes; what was used last stays, however large it is."""

    def __init__(self, size: Callable[[Value], int]) -> None:
        self._size = size
        self._entries: OrderedDict[Key, Value] = OrderedDict()

    def get(self, key: Key) -> Value | None:
        """Return a thing, which is then the last one used, or None."""
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def put(self, key: Key, value: Value) -> None:
        """Keep a thing, as the last one used."""
        self._entries[key] = value
        self._entries.move_to_end(key)

    def evict(self, room: float, count: float = float("inf"), least: int = 1) -> list[Value]:
        """Let go of what was not used for longest, until the rest fits ``room`` and ``count``; ``least`` stay.

        Returns what was let go of.
        """
        gone = []
        while len(self._entries) > least and (len(self._entries) > count or self._total_size() > room):
            gone.append(self._entries.popitem(last=False)[1])
        return gone

    def _total_size(self) -> int:
        return sum(map(self._size, self._entries.values()))

    def clear(self) -> None:
        """Let go of all."""
        self._entries.clear()

    def __iter__(self) -> Iterator[Value]:
        return iter(tuple(self._entries.values()))

    def __len__(self) -> int:
        return len(self._entries)
