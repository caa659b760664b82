"""The store's in-memory twin: what a store is, in the fewest lines, and a store whose faults a test can choose."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from core.errors import ObjectNotFound, StoreError, StoreUnavailable
from core.ports import ObjectStat
from core.store.keys import check_key, check_prefix


class MemoryStore:
    """An ``ObjectStore`` in a dictionary. Safe to share between threads."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.delay_s = 0.0
        """How long each call takes before it does anything."""
        self.calls: list[tuple[str, str]] = []
        """Name and key of every call, failed ones included."""
        self._faults: list[StoreError] = []
        self._lock = threading.Lock()

    def fail_next(self, calls: int, error: StoreError | None = None) -> None:
        """Let the next so many calls raise the error, or ``StoreUnavailable`` if none is given."""
        with self._lock:
            self._faults = [error or StoreUnavailable("the store answered 500")] * calls

    def stat(self, key: str) -> ObjectStat:
        """Ask for an object's size."""
        self._begin("stat", check_key(key))
        return ObjectStat(key, len(self._read(key)))

    def get_file(self, key: str, path: Path) -> None:
        """Write an object into a new file."""
        self._begin("get_file", check_key(key))
        path.write_bytes(self._read(key))

    def get_bytes(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        """Read an object or a part of it."""
        self._begin("get_bytes", check_key(key))
        data = self._read(key)[start:]
        return data if length is None else data[:length]

    def put_file(self, key: str, path: Path, content_type: str) -> None:
        """Take a file's content."""
        del content_type
        self._begin("put_file", check_key(key))
        self.objects[key] = path.read_bytes()

    def put_bytes(self, key: str, data: bytes, content_type: str) -> None:
        """Take bytes."""
        del content_type
        self._begin("put_bytes", check_key(key))
        self.objects[key] = bytes(data)

    def list(self, prefix: str) -> Iterator[ObjectStat]:
        """List the objects whose key begins with a prefix, in key order."""
        self._begin("list", check_prefix(prefix))
        for key, data in sorted(self.objects.items(), key=lambda item: item[0].encode()):
            if key.startswith(prefix):
                yield ObjectStat(key, len(data))

    def delete(self, key: str) -> None:
        """Remove an object; none of that key is no error."""
        self._begin("delete", check_key(key))
        self.objects.pop(key, None)

    def url(self, key: str, *, expires_s: int) -> str:
        """Make a URL that names the object. Nothing serves it."""
        return f"memory:///{quote(check_key(key))}?expires={int(time.time()) + expires_s}"

    def _begin(self, call: str, key: str) -> None:
        with self._lock:
            self.calls.append((call, key))
            fault = self._faults.pop() if self._faults else None
        if self.delay_s:
            time.sleep(self.delay_s)
        if fault is not None:
            raise fault

    def _read(self, key: str) -> bytes:
        try:
            return self.objects[key]
        except KeyError:
            msg = f"the store holds no object {key!r}"
            raise ObjectNotFound(msg) from None
