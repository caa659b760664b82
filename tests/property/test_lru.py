"""Laws of eviction, and the cache on disk against a model of it."""

from __future__ import annotations

import hashlib
import tempfile
from collections import OrderedDict
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from core.events import CacheEvicted, CacheSized, CacheUsed, Event
from core.store.memory import MemoryStore
from worker.cache.files import FileCache, Need
from worker.cache.lru import Entry, victims

ENTRIES = st.lists(
    st.builds(Entry, st.text("abcdef", min_size=1, max_size=4), st.integers(0, 100), st.integers(0, 20)),
    unique_by=lambda entry: entry.digest,
    max_size=12,
)


def plain_lru(entries: list[Entry], excess_bytes: int, pinned: set[str]) -> list[Entry] | None:
    """The same by removing the oldest, one at a time."""
    left = [entry for entry in entries if entry.digest not in pinned]
    gone: list[Entry] = []
    while sum(entry.size_bytes for entry in gone) < excess_bytes:
        if not left:
            return None
        oldest = min(left, key=lambda entry: (entry.used_ns, entry.digest))
        left.remove(oldest)
        gone.append(oldest)
    return gone


@given(ENTRIES, st.integers(-50, 700), st.data())
def test_victims_are_those_of_a_plain_lru(entries: list[Entry], excess_bytes: int, data: st.DataObject) -> None:
    pinned = data.draw(st.sets(st.sampled_from([entry.digest for entry in entries]))) if entries else set()

    chosen = victims(entries, excess_bytes, pinned)

    expected = plain_lru(entries, excess_bytes, pinned)
    assert (None if chosen is None else list(chosen)) == expected


@given(ENTRIES, st.integers(0, 700), st.data())
def test_victims_free_enough_no_more_files_than_needed_and_never_a_pinned_one(
    entries: list[Entry], excess_bytes: int, data: st.DataObject
) -> None:
    pinned = data.draw(st.sets(st.sampled_from([entry.digest for entry in entries]))) if entries else set()
    evictable = sum(entry.size_bytes for entry in entries if entry.digest not in pinned)

    chosen = victims(entries, excess_bytes, pinned)

    if chosen is None:
        assert evictable < excess_bytes
        return
    assert pinned.isdisjoint(entry.digest for entry in chosen)
    assert sum(entry.size_bytes for entry in chosen) >= excess_bytes
    assert not chosen or sum(entry.size_bytes for entry in chosen[:-1]) < excess_bytes
    assert max((entry.used_ns for entry in chosen), default=0) <= min(
        (entry.used_ns for entry in entries if entry not in chosen and entry.digest not in pinned), default=10**9
    )


class ModelCache:
    """An LRU by bytes, as anybody would write it."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.files: OrderedDict[str, int] = OrderedDict()

    def use(self, digest: str, size_bytes: int) -> tuple[bool, list[int]]:
        """Ask for a file; say whether it was there, and the sizes of what had to go."""
        if digest in self.files:
            self.files.move_to_end(digest)
            return True, []
        gone = []
        while sum(self.files.values()) + size_bytes > self.budget_bytes:
            gone.append(self.files.popitem(last=False)[1])
        self.files[digest] = size_bytes
        return False, gone


@settings(max_examples=25, deadline=None)
@given(st.integers(10, 40), st.lists(st.one_of(st.integers(1, 10), st.just("restart")), max_size=20))
def test_the_cache_on_disk_keeps_what_the_model_keeps(budget_bytes: int, asked: list[int | str]) -> None:
    """If files are asked for one after the other, with restarts between, hits and victims are those of the model."""
    events: list[Event] = []
    store = MemoryStore()
    needs = {size: put(store, size) for size in range(1, 11)}
    model = ModelCache(budget_bytes)
    with tempfile.TemporaryDirectory() as folder:
        cache = FileCache(Path(folder), budget_bytes, store, events.append)
        for size in asked:
            if isinstance(size, str):
                cache = FileCache(Path(folder), budget_bytes, store, events.append)
                continue
            events.clear()
            with cache.files([needs[size]]) as paths:
                assert paths[needs[size].digest].read_bytes() == store.objects[str(size)]
            hit, gone = model.use(needs[size].digest, size)
            assert [event.hit for event in events if isinstance(event, CacheUsed)] == [hit]
            assert [event.size_bytes for event in events if isinstance(event, CacheEvicted)] == gone
            assert all(event.used_bytes <= budget_bytes for event in events if isinstance(event, CacheSized))
            assert cache.used_bytes == sum(model.files.values())


def put(store: MemoryStore, size: int) -> Need:
    data = bytes([size]) * size
    store.put_bytes(str(size), data, "application/octet-stream")
    return Need(str(size), hashlib.sha256(data).hexdigest(), size, "lora")
