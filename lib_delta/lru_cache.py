"""Things that are kept for as long as there is room, the most lately used ones."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Kept(Generic[Key, Value]):
    """A store of things with sizes; what was used last stays, however large it is."""

    def __init__(self, size: Callable[[Value], int]) -> None:
        self._size = size
        self._things: OrderedDict[Key, Value] = OrderedDict()

    def get(self, key: Key) -> Value | None:
        """Return a thing, which is then the last one used, or None."""
        if key in self._things:
            self._things.move_to_end(key)
        return self._things.get(key)

    def put(self, key: Key, value: Value) -> None:
        """Keep a thing, as the last one used."""
        self._things[key] = value
        self._things.move_to_end(key)

    def shrink(self, room: float, count: float = float("inf"), least: int = 1) -> list[Value]:
        """Let go of what was not used for longest, until the rest fits ``room`` and ``count``; ``least`` stay.

        Returns what was let go of.
        """
        gone = []
        while len(self._things) > least and (len(self._things) > count or self._total() > room):
            gone.append(self._things.popitem(last=False)[1])
        return gone

    def _total(self) -> int:
        return sum(map(self._size, self._things.values()))

    def clear(self) -> None:
        """Let go of all."""
        self._things.clear()

    def __iter__(self) -> Iterator[Value]:
        return iter(tuple(self._things.values()))

    def __len__(self) -> int:
        return len(self._things)
