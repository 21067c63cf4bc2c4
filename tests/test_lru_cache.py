"""The cache that evicts its least recently used entries."""

from __future__ import annotations

from lib_delta.lru_cache import LRUCache


def test_recently_used_entries_stay_while_they_fit() -> None:
    cache: LRUCache[str, int] = LRUCache(size_of=int)
    for size in (3, 4, 5):
        cache.put(str(size), size)
    assert cache.get("3") == 3 and cache.get("7") is None
    assert cache.evict(max_size=8) == [4]
    assert list(cache) == [5, 3]
    assert cache.evict(max_size=100, max_count=1) == [5]
    assert cache.evict(max_size=0) == [] and list(cache) == [3], "the last one stays, whatever its size"
    assert cache.evict(max_size=0, min_count=0) == [3] and len(cache) == 0


def test_put_evicts_beyond_the_largest_count() -> None:
    cache: LRUCache[str, int] = LRUCache(max_count=2)
    for key in ("a", "b"):
        cache.put(key, len(key))
    cache.get("a")
    cache.put("c", 3)
    assert cache.get("b") is None and list(cache) == [1, 3]
    cache.put("a", 9)
    assert list(cache) == [3, 9]
    cache.clear()
    assert len(cache) == 0
