"""One process that uses a shared cache directory, run by ``test_file_cache``.

cache_user.py use  <cache> <budget> <store> <rounds> <seed>    use random files; print how many it fetched
cache_user.py pin  <cache> <budget> <store>                    pin all files, say so, stay until stdin ends
cache_user.py stop <cache> <budget> <store>                    get half of a file, say so, stay until stdin ends
"""

from __future__ import annotations

import hashlib
import random
import sys
from pathlib import Path

from core.events import CacheSized, Event, FileFetched
from core.store.links import LinkSigner
from core.store.local import LocalStore
from worker.cache.files import FileCache, Need


class HalfStore(LocalStore):
    """A store whose downloads stop half-way."""

    def get_file(self, key: str, path: Path) -> None:
        data = self.get_bytes(key)
        path.write_bytes(data[: len(data) // 2])
        say_and_stay("half")


def say_and_stay(what: str) -> None:
    print(what, flush=True)
    sys.stdin.read()


def needs_of(store: LocalStore) -> list[Need]:
    return [
        Need(stat.key, hashlib.sha256(store.get_bytes(stat.key)).hexdigest(), stat.size_bytes, "lora")
        for stat in store.list("")
    ]


def use(cache: FileCache, needs: list[Need], rounds: int, seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(rounds):
        wanted = draw.sample(needs, k=draw.randint(1, min(3, len(needs))))
        with cache.files(wanted) as paths:
            for _look in range(2):
                for need in wanted:
                    assert hashlib.sha256(paths[need.digest].read_bytes()).hexdigest() == need.digest


def main() -> None:
    mode, root, budget, folder = sys.argv[1:5]
    store = (HalfStore if mode == "stop" else LocalStore)(Path(folder), LinkSigner("", ""))
    events: list[Event] = []
    needs = needs_of(store)
    cache = FileCache(Path(root), int(budget), store, events.append)
    if mode == "use":
        use(cache, needs, int(sys.argv[5]), int(sys.argv[6]))
        assert all(event.used_bytes <= int(budget) for event in events if isinstance(event, CacheSized))
        print(sum(isinstance(event, FileFetched) for event in events))
    else:
        with cache.files(needs):
            say_and_stay("pinned")


if __name__ == "__main__":
    main()
