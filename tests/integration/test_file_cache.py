"""The file cache: one process with threads, several processes, and processes that are killed."""

from __future__ import annotations

import contextlib
import hashlib
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from core.errors import CacheBusy, CacheTooSmall, ChecksumMismatch, ObjectNotFound, StoreUnavailable
from core.events import CacheEvicted, CacheSized, CacheUsed, Event, FileFetched
from core.store.links import LinkSigner
from core.store.local import LocalStore
from core.store.memory import MemoryStore
from core.store.s3 import S3Store
from tests.s3_gateway import S3Gateway
from worker.cache.files import FileCache, Need
from worker.cache.shelf import Shelf

CACHE_USER = Path(__file__).parent / "cache_user.py"
KIB = 1024


def put(store: MemoryStore | LocalStore, key: str, size_bytes: int = 10) -> Need:
    """Put an object of unmistakable content and give the need for it."""
    data = (key.encode() * size_bytes)[:size_bytes]
    store.put_bytes(key, data, "application/octet-stream")
    return Need(key, hashlib.sha256(data).hexdigest(), size_bytes, "lora")


def cached(root: Path) -> set[str]:
    """Digests of the finished files."""
    return {path.name for path in root.glob("[0-9a-f][0-9a-f]/*")}


def downloads(store: MemoryStore) -> list[str]:
    return [key for call, key in store.calls if call == "get_file"]


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def events() -> list[Event]:
    return []


Make = Callable[..., FileCache]


@pytest.fixture
def make(tmp_path: Path, store: MemoryStore, events: list[Event]) -> Make:
    """Open the test's cache directory: as many times as a host has workers."""

    def make(budget_bytes: int = 100, **waits: float) -> FileCache:
        return FileCache(tmp_path / "cache", budget_bytes, store, events.append, **waits)

    return make


# --- one user ---------------------------------------------------------------------------------------------------


def test_a_file_is_fetched_once_and_then_found(store: MemoryStore, make: Make, events: list[Event]) -> None:
    need = put(store, "a")
    cache = make()
    assert not cache.holds(need)

    for _ in range(2):
        with cache.files([need]) as paths:
            assert {digest: path.read_bytes() for digest, path in paths.items()} == {need.digest: b"a" * 10}

    assert cache.holds(need)
    assert downloads(store) == ["a"]
    assert [event.hit for event in events if isinstance(event, CacheUsed)] == [False, True]
    assert [event.size_bytes for event in events if isinstance(event, FileFetched)] == [10]
    assert [event for event in events if isinstance(event, CacheSized)] == [CacheSized(0, 100), CacheSized(10, 100)]


def test_nothing_needed_gives_nothing(store: MemoryStore, make: Make) -> None:
    with make().files([]) as paths:
        assert paths == {}

    assert store.calls == []


def test_one_content_under_two_keys_is_one_file(store: MemoryStore, make: Make) -> None:
    need = put(store, "a")
    store.put_bytes("b", store.objects["a"], "application/octet-stream")

    with make(budget_bytes=10).files([need, Need("b", need.digest, 10, "lora")]) as paths:
        assert len(paths) == 1

    assert len(downloads(store)) == 1


def test_files_of_one_need_travel_at_the_same_time(tmp_path: Path) -> None:
    """If every download waits for the others to have begun, all of them still end."""
    together = threading.Barrier(3)

    class MeetingStore(MemoryStore):
        def get_file(self, key: str, path: Path) -> None:
            together.wait(timeout=20)
            super().get_file(key, path)

    store = MeetingStore()
    needs = [put(store, key) for key in "abc"]

    with FileCache(tmp_path, 100, store, lambda _event: None).files(needs) as paths:
        assert [paths[need.digest].read_bytes() for need in needs] == [b"a" * 10, b"b" * 10, b"c" * 10]


def test_a_set_larger_than_the_budget_is_refused_before_anything_is_fetched(store: MemoryStore, make: Make) -> None:
    needs = [put(store, key, 40) for key in "abc"]
    cache = make(budget_bytes=100)
    store.calls.clear()

    with pytest.raises(CacheTooSmall, match=r"need 120 bytes.*may hold 100"), cache.files(needs):
        pass

    assert store.calls == []


@pytest.mark.parametrize("digest", ["", "../../etc/passwd", "A" * 64, "0" * 63, "0" * 64 + "\n"])
def test_a_digest_that_is_none_is_refused(digest: str) -> None:
    with pytest.raises(ChecksumMismatch, match="no SHA-256 digest"):
        Need("k", digest, 1, "lora")


def test_an_object_of_other_bytes_is_refused_and_not_kept(store: MemoryStore, make: Make, tmp_path: Path) -> None:
    need = put(store, "a")
    store.put_bytes("a", b"b" * 10, "application/octet-stream")

    with pytest.raises(ChecksumMismatch, match="register it again"), make().files([need]):
        pass

    assert cached(tmp_path / "cache") == set()
    assert list((tmp_path / "cache/incoming").iterdir()) == []


def test_an_object_of_another_size_is_refused_without_fetching_it(store: MemoryStore, make: Make) -> None:
    need = put(store, "a")
    store.put_bytes("a", b"a" * 10_000, "application/octet-stream")

    with pytest.raises(ChecksumMismatch, match="10000 bytes instead of 10"), make().files([need]):
        pass

    assert downloads(store) == []


def test_a_cached_file_that_lost_bytes_is_fetched_again(store: MemoryStore, make: Make) -> None:
    need = put(store, "a")
    cache = make()
    with cache.files([need]) as paths:
        paths[need.digest].write_bytes(b"short")

    with cache.files([need]) as paths:
        assert paths[need.digest].read_bytes() == b"a" * 10


def test_a_store_that_fails_for_a_while_is_the_callers_to_retry(
    store: MemoryStore, make: Make, events: list[Event], tmp_path: Path
) -> None:
    need = put(store, "a")
    cache = make()
    store.fail_next(1)

    with pytest.raises(StoreUnavailable, match="500"), cache.files([need]):
        pass
    assert list((tmp_path / "cache/incoming").iterdir()) == []
    assert events[-1] == CacheSized(0, 100)

    with cache.files([need]) as paths:
        assert paths[need.digest].exists()


def test_one_missing_object_fails_the_need_and_unpins_the_rest(store: MemoryStore, make: Make, tmp_path: Path) -> None:
    there, absent = put(store, "a", 60), put(store, "b", 40)
    store.delete("b")
    cache = make(budget_bytes=100)

    with pytest.raises(ObjectNotFound, match="b"), cache.files([there, absent]):
        pass
    assert cached(tmp_path / "cache") <= {there.digest}

    other = put(store, "c", 100)
    with cache.files([other]):
        assert cached(tmp_path / "cache") == {other.digest}


def test_a_smaller_budget_applies_from_the_start(
    store: MemoryStore, make: Make, events: list[Event], tmp_path: Path
) -> None:
    needs = [put(store, key, 30) for key in "abc"]
    for need in needs:
        with make(budget_bytes=100).files([need]):
            pass

    make(budget_bytes=50)

    assert cached(tmp_path / "cache") == {needs[2].digest}
    assert [event.size_bytes for event in events if isinstance(event, CacheEvicted)] == [30, 30]
    assert events[-1] == CacheSized(30, 50)


def test_a_directory_that_cannot_be_used_is_a_typed_error(tmp_path: Path, store: MemoryStore) -> None:
    (tmp_path / "file").write_bytes(b"")

    with pytest.raises(StoreUnavailable, match="cannot be used"):
        FileCache(tmp_path / "file", 100, store, lambda _event: None)


def test_only_what_others_hold_is_worth_another_try() -> None:
    assert CacheBusy.retryable
    assert not CacheTooSmall.retryable


# --- several users ----------------------------------------------------------------------------------------------


def test_a_pinned_file_is_never_evicted(store: MemoryStore, make: Make) -> None:
    """If what is pinned leaves no room, a need waits as long as it may and then says what to do."""
    old, other = put(store, "a", 60), put(store, "b", 60)

    with make().files([old]) as paths:
        with pytest.raises(CacheBusy, match="running batches"), make(room_wait_s=0.1).files([other]):
            pass
        assert paths[old.digest].read_bytes() == store.objects["a"]

    with make(room_wait_s=0.1).files([other]):
        assert not make().holds(old)


def test_a_younger_file_goes_before_an_older_pinned_one(store: MemoryStore, make: Make) -> None:
    old, young, new = (put(store, key, 40) for key in "abc")
    cache = make()

    with cache.files([old]):
        with cache.files([young]):
            pass
        with cache.files([new]):
            assert cache.holds(old)
            assert not cache.holds(young)


def test_a_need_goes_on_as_soon_as_there_is_room(store: MemoryStore, make: Make, tmp_path: Path) -> None:
    old, other = put(store, "a", 60), put(store, "b", 60)
    asked = threading.Event()

    def observe(event: Event) -> None:
        if isinstance(event, CacheUsed):
            asked.set()

    def fetch_other() -> bytes:
        with FileCache(tmp_path / "cache", 100, store, observe).files([other]) as paths:
            return paths[other.digest].read_bytes()

    with ThreadPoolExecutor(1) as pool:
        with make().files([old]):
            fetched = pool.submit(fetch_other)
            assert asked.wait(20)
            assert downloads(store) == ["a"]
        assert fetched.result(timeout=20) == store.objects["b"]


def test_many_threads_fetch_a_file_once(store: MemoryStore, make: Make, events: list[Event]) -> None:
    need = put(store, "a")
    start = threading.Barrier(8)
    store.delay_s = 0.05

    def use(_thread: int) -> bytes:
        cache = make()
        start.wait(timeout=20)
        with cache.files([need]) as paths:
            return paths[need.digest].read_bytes()

    with ThreadPoolExecutor(8) as pool:
        contents = list(pool.map(use, range(8)))

    assert contents == [store.objects["a"]] * 8
    assert downloads(store) == ["a"]
    assert sum(isinstance(event, FileFetched) for event in events) == 1


def test_another_takes_over_a_download_that_failed(tmp_path: Path) -> None:
    """If the one that fetches fails while a second one waits for it, the second one fetches the file itself."""
    begun, may_fail = threading.Event(), threading.Event()

    class FailsOnce(MemoryStore):
        def get_file(self, key: str, path: Path) -> None:
            if not begun.is_set():
                begun.set()
                assert may_fail.wait(20)
                msg = "the store answered 500"
                raise StoreUnavailable(msg)
            super().get_file(key, path)

    store = FailsOnce()
    need = put(store, "a")
    used: list[Event] = []

    def use(observe: Callable[[Event], None]) -> bytes:
        with FileCache(tmp_path, 100, store, observe).files([need]) as paths:
            return paths[need.digest].read_bytes()

    def second(event: Event) -> None:
        used.append(event)
        if isinstance(event, CacheUsed):
            may_fail.set()

    with ThreadPoolExecutor(2) as pool:
        first_use = pool.submit(use, lambda _event: None)
        assert begun.wait(20)
        second_use = pool.submit(use, second)
        with pytest.raises(StoreUnavailable):
            first_use.result(timeout=20)
        assert second_use.result(timeout=20) == b"a" * 10

    assert [event.hit for event in used if isinstance(event, CacheUsed)] == [False]


def test_who_waits_for_room_holds_none(store: MemoryStore, make: Make, tmp_path: Path) -> None:
    """If a need waits for room, a file that it found already may still make room for another need."""
    found, wanted, pinned, last = (put(store, key, 50) for key in "abcd")
    asked = threading.Event()

    def observe(event: Event) -> None:
        if isinstance(event, CacheUsed):
            asked.set()

    def use() -> int:
        with FileCache(tmp_path / "cache", 100, store, observe).files([found, wanted]) as paths:
            return len(paths)

    with make().files([found, pinned]):
        pass
    with ThreadPoolExecutor(1) as pool:
        with make().files([pinned]):
            waiter = pool.submit(use)
            assert asked.wait(20)
            with make(room_wait_s=20).files([pinned, last]):
                assert not waiter.done()
        assert waiter.result(timeout=20) == 2


def test_needs_that_compete_for_room_never_wait_for_each_other(store: MemoryStore, make: Make) -> None:
    """If the room holds one need at a time and the needs overlap, each gets its turn."""
    a, b, c = (put(store, key, 50) for key in "abc")

    def use(needs: list[Need]) -> int:
        cache = make(budget_bytes=100, room_wait_s=60)
        for _ in range(5):
            with cache.files(needs) as paths:
                assert all(path.exists() for path in paths.values())
        return 5

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(use, [[a, b], [b, c], [c, a]])) == [5, 5, 5]


# --- several processes ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def process(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(CACHE_USER), *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        try:
            yield running
        finally:
            running.kill()


def said(running: subprocess.Popen[str]) -> str:
    assert running.stdout is not None
    return running.stdout.readline().strip()


def bytes_on_disk(root: Path) -> int:
    """Bytes of everything in the directory, at a moment in which no file is finished or evicted."""
    total = 0
    with Shelf(root).exclusive():
        for path in root.rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # an unfinished download
                total += path.stat().st_size if path.is_file() else 0
    return total


def download_is_seen(root: Path) -> bool:
    try:
        return any((root / "incoming").glob("*/*"))
    except FileNotFoundError:  # it ended while we looked
        return False


@pytest.fixture
def objects(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store", LinkSigner("", ""))


def test_processes_share_one_budget_and_each_download(objects: LocalStore, tmp_path: Path) -> None:
    """If three processes use random files, with room for all, each file is fetched by exactly one of them."""
    for i in range(6):
        put(objects, f"file-{i}", 64 * KIB)
    arguments = ("use", tmp_path / "cache", 6 * 64 * KIB, objects.root, 12)

    with contextlib.ExitStack() as stack:
        users = [stack.enter_context(process(*arguments, seed)) for seed in range(3)]
        fetched = [int(said(user)) for user in users]
        assert [user.wait(20) for user in users] == [0, 0, 0]

    assert sum(fetched) == len(cached(tmp_path / "cache")) == 6


def test_processes_in_need_of_more_than_the_budget_keep_to_it(objects: LocalStore, tmp_path: Path) -> None:
    """If three processes draw from twice as many bytes as fit, the directory never holds more than may be there."""
    for i in range(8):
        put(objects, f"file-{i}", 64 * KIB)
    budget, largest = 4 * 64 * KIB, 0
    arguments = ("use", tmp_path / "cache", budget, objects.root, 15)

    with contextlib.ExitStack() as stack:
        users = [stack.enter_context(process(*arguments, seed)) for seed in range(3)]
        while any(user.poll() is None for user in users):
            largest = max(largest, bytes_on_disk(tmp_path / "cache"))
            time.sleep(0.005)
        assert [user.returncode for user in users] == [0, 0, 0]

    assert 2 * 64 * KIB < largest <= budget


def test_a_pin_of_another_process_holds_until_that_process_dies(objects: LocalStore, tmp_path: Path) -> None:
    pinned = put(objects, "a", 60)
    with process("pin", tmp_path / "cache", 100, objects.root) as holder:
        assert said(holder) == "pinned"
        other = put(objects, "b", 60)
        cache = FileCache(tmp_path / "cache", 100, objects, lambda _event: None, room_wait_s=0.1)
        with pytest.raises(CacheBusy), cache.files([other]):
            pass
        assert cache.holds(pinned)

        holder.send_signal(signal.SIGKILL)
        holder.wait(20)

    with cache.files([other]):
        assert not cache.holds(pinned)


def test_a_process_killed_in_a_download_leaves_nothing_that_is_trusted(objects: LocalStore, tmp_path: Path) -> None:
    """If it dies half-way, its bytes and the room it had reserved are gone with the next look."""
    need = put(objects, "a", 100)
    with process("stop", tmp_path / "cache", 100, objects.root) as fetcher:
        assert said(fetcher) == "half"
        assert bytes_on_disk(tmp_path / "cache") == 50
        fetcher.send_signal(signal.SIGKILL)
        fetcher.wait(20)

    cache = FileCache(tmp_path / "cache", 100, objects, lambda _event: None)
    assert bytes_on_disk(tmp_path / "cache") == cache.used_bytes == 0
    with cache.files([need]) as paths:
        assert paths[need.digest].read_bytes() == objects.get_bytes("a")


def test_who_waits_for_a_killed_process_takes_over_its_download(objects: LocalStore, tmp_path: Path) -> None:
    need = put(objects, "a", 100)
    asked = threading.Event()

    def observe(event: Event) -> None:
        if isinstance(event, CacheUsed):
            asked.set()

    def use() -> bytes:
        with FileCache(tmp_path / "cache", 100, objects, observe).files([need]) as paths:
            return paths[need.digest].read_bytes()

    with process("stop", tmp_path / "cache", 100, objects.root) as fetcher, ThreadPoolExecutor(1) as pool:
        assert said(fetcher) == "half"
        waiter = pool.submit(use)
        assert asked.wait(20)
        assert not waiter.done()
        fetcher.send_signal(signal.SIGKILL)
        assert waiter.result(timeout=20) == objects.get_bytes("a")


def test_a_series_of_kills_in_downloads_leaves_a_sound_cache(objects: LocalStore, tmp_path: Path) -> None:
    """If processes are killed the moment a download is seen, every finished file is whole and the room is kept."""
    needs = {need.digest: need for need in (put(objects, f"file-{i}", 512 * KIB) for i in range(8))}
    root, budget = tmp_path / "cache", 3 * 512 * KIB
    root.mkdir()

    for seed in range(6):
        with process("use", root, budget, objects.root, 10_000, seed) as user:
            while not download_is_seen(root):
                assert user.poll() is None
            user.send_signal(signal.SIGKILL)
            user.wait(20)
        assert bytes_on_disk(root) <= budget
        for digest in cached(root):
            path = root / digest[:2] / digest
            assert hashlib.sha256(path.read_bytes()).hexdigest() == digest

    cache = FileCache(root, budget, objects, lambda _event: None)
    assert list((root / "incoming").iterdir()) == []
    for need in needs.values():
        with cache.files([need]) as paths:
            assert paths[need.digest].stat().st_size == need.size_bytes


def test_a_file_of_several_parts_comes_from_s3(
    s3_gateway: S3Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_gateway.env.items():
        monkeypatch.setenv(name, value)
    bucket = s3_gateway.make_bucket(f"b-{uuid.uuid4().hex}")
    store = S3Store(bucket, endpoint=s3_gateway.endpoint)
    data = random.Random(0).randbytes(20 * KIB * KIB)
    store.put_bytes("lora", data, "application/octet-stream")
    need = Need("lora", hashlib.sha256(data).hexdigest(), len(data), "lora")

    with FileCache(tmp_path / "cache", len(data), store, lambda _event: None).files([need]) as paths:
        assert paths[need.digest].read_bytes() == data

    assert bytes_on_disk(tmp_path / "cache") == len(data)
