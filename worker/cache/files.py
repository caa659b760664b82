"""Files of the store, kept on local disk: verified, pinned while in use, within a budget of bytes.

All caches on one directory, in whatever thread or process of the host, act as one: a file is fetched once, and
nobody evicts what another has pinned.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from core.errors import CacheBusy, CacheTooSmall, ChecksumMismatch, StoreUnavailable
from core.events import CacheEvicted, CacheSized, CacheUsed, FileFetched
from core.ports import ObjectStore, Observer
from worker.cache.lru import Entry, victims
from worker.cache.shelf import DIGEST, Claim, Pin, Shelf

FETCHES_AT_ONCE = 4
"""Files of one need that travel at the same time; a large one is several connections already."""

POLL_S = 0.05
"""How often somebody who waits for another process looks again."""


@dataclass(frozen=True, slots=True)
class Need:
    """One file that is needed."""

    key: str
    """Object key in the store."""
    digest: str
    """SHA-256 of the content, 64 hex digits."""
    size_bytes: int
    kind: Literal["lora", "model"]
    """For metrics."""

    def __post_init__(self) -> None:
        """Refuse a digest that is none: it becomes a file name."""
        if not DIGEST.fullmatch(self.digest):
            msg = f"{self.digest[:80]!r} is no SHA-256 digest; register the object {self.key!r} again"
            raise ChecksumMismatch(msg)


@dataclass(frozen=True, slots=True)
class _Step:
    """What one look at the shelf came to."""

    claims: tuple[Claim, ...] = ()
    """Files that are now ours to fetch."""
    evicted: tuple[Entry, ...] = ()
    blocked: Literal["", "room", "fetch"] = ""
    """Why nothing can be done now: all room is pinned, or others are fetching all that is absent."""


class FileCache:
    """A cache directory of at most ``budget_bytes``, which counts what is being fetched too.

    Safe to share between threads. ``room_wait_s`` is how long a need waits for others to unpin, ``fetch_wait_s`` how
    long it waits for a download by somebody else. Raises ``StoreUnavailable`` if the directory cannot be used.
    """

    def __init__(
        self,
        root: Path,
        budget_bytes: int,
        store: ObjectStore,
        observe: Observer,
        *,
        room_wait_s: float = 60.0,
        fetch_wait_s: float = 900.0,
    ) -> None:
        self.budget_bytes = budget_bytes
        self._store = store
        self._observe = observe
        self._patience_s = {"room": room_wait_s, "fetch": fetch_wait_s}
        with _disk_errors(root):
            self._shelf = Shelf(root)
            self._trim()

    @contextlib.contextmanager
    def files(self, needs: Iterable[Need]) -> Iterator[Mapping[str, Path]]:
        """Give the path of each needed file by its digest; the files stay while the block runs.

        Raises ``CacheTooSmall`` (before anything is fetched, if the files exceed the budget by themselves),
        ``CacheBusy`` (others have pinned what would make room), ``ChecksumMismatch`` (nothing of that file is kept)
        and what ``ObjectStore`` raises. Files that were fetched before one failed stay in the cache.
        """
        wanted = {need.digest: need for need in needs}
        total_bytes = sum(need.size_bytes for need in wanted.values())
        if total_bytes > self.budget_bytes:
            msg = f"the files need {total_bytes} bytes, the cache may hold {self.budget_bytes}: enlarge its budget"
            raise CacheTooSmall(msg)
        pins: dict[str, Pin] = {}
        try:
            with _disk_errors(self._shelf.root):
                self._hold(wanted, pins)
            yield {digest: pins[digest].path for digest in wanted}
        finally:
            _release(pins)

    def holds(self, need: Need) -> bool:
        """Say whether the file is there now. Without a pin it may be gone the next moment."""
        return self._shelf.holds(need.digest, need.size_bytes)

    @property
    def used_bytes(self) -> int:
        """Bytes of finished files and of downloads under way, of all processes."""
        with _disk_errors(self._shelf.root), self._shelf.exclusive():
            return _sum(self._shelf.entries()) + sum(self._shelf.claims().values())

    def _hold(self, wanted: Mapping[str, Need], pins: dict[str, Pin]) -> None:
        """Pin every wanted file, fetching what is absent.

        Nobody waits for room with pins in hand, so two needs cannot wait for each other.
        """
        step = self._reserve(wanted, pins)
        for need in wanted.values():
            self._observe(CacheUsed(kind=need.kind, hit=need.digest in pins, size_bytes=need.size_bytes))
        blocked, since = step.blocked, time.monotonic()
        while True:
            if step.claims:
                self._tell_evicted(step.evicted)
                try:
                    self._fetch_all(step.claims, wanted, pins)
                finally:
                    self._tell_size()
            if len(pins) == len(wanted):
                return
            if step.blocked != blocked:
                blocked, since = step.blocked, time.monotonic()
            if step.blocked:
                self._wait(step.blocked, since, pins)
            step = self._reserve(wanted, pins)

    def _reserve(self, wanted: Mapping[str, Need], pins: dict[str, Pin]) -> _Step:
        """Pin what is there, and claim what nobody fetches if all of that can be given room."""
        shelf = self._shelf
        with shelf.exclusive():
            for need in wanted.values():
                if need.digest not in pins and (pin := shelf.pin(need.digest, need.size_bytes)):
                    pins[need.digest] = pin
            absent = [need for need in wanted.values() if need.digest not in pins]
            if not absent:
                return _Step()
            under_way = shelf.claims()
            ours = [need for need in absent if need.digest not in under_way]
            if not ours:
                return _Step(blocked="fetch")
            entries = shelf.entries()
            due_bytes = _sum(entries) + sum(under_way.values()) + sum(need.size_bytes for need in ours)
            evicted = victims(entries, due_bytes - self.budget_bytes, shelf.pinned(entries))
            if evicted is None:
                return _Step(blocked="room")
            for entry in evicted:
                shelf.remove(entry)
            return _Step(tuple(shelf.claim(need.digest, need.size_bytes) for need in ours), evicted)

    def _trim(self) -> None:
        """Bring a directory that was left, or used with a larger budget, within ours, as far as pins allow."""
        shelf = self._shelf
        with shelf.exclusive():
            entries = shelf.entries()
            excess_bytes = _sum(entries) + sum(shelf.claims().values()) - self.budget_bytes
            evicted = victims(entries, excess_bytes, shelf.pinned(entries)) or ()
            for entry in evicted:
                shelf.remove(entry)
        self._tell_evicted(evicted)
        self._tell_size()

    def _wait(self, why: Literal["room", "fetch"], since: float, pins: dict[str, Pin]) -> None:
        if why == "room":
            _release(pins)
        if time.monotonic() - since < self._patience_s[why]:
            time.sleep(POLL_S)
        elif why == "room":
            msg = (
                f"the files of running batches have filled the cache's {self.budget_bytes} bytes for "
                f"{self._patience_s[why]:g} s: try again; if it goes on, enlarge its budget, or run fewer workers on "
                f"{self._shelf.root}"
            )
            raise CacheBusy(msg)
        else:
            msg = f"another worker has been fetching the same file for {self._patience_s[why]:g} s: try again"
            raise StoreUnavailable(msg)

    def _fetch_all(self, claims: Sequence[Claim], wanted: Mapping[str, Need], pins: dict[str, Pin]) -> None:
        """Fetch what was claimed, in parallel. The first failure cancels those that have not begun."""
        with ThreadPoolExecutor(FETCHES_AT_ONCE, thread_name_prefix="fetch") as pool:
            fetches: dict[Future[Pin], Claim] = {
                pool.submit(self._fetch, claim, wanted[claim.digest]): claim for claim in claims
            }
            wait(fetches, return_when=FIRST_EXCEPTION)
            unbegun = [claim for fetch, claim in fetches.items() if fetch.cancel()]
        with self._shelf.exclusive():
            for claim in unbegun:
                self._shelf.drop(claim)
        errors = []
        for fetch, claim in fetches.items():
            if fetch.cancelled():
                continue
            if error := fetch.exception():
                errors.append(error)
            else:
                pins[claim.digest] = fetch.result()
        if errors:
            raise errors[0]

    def _fetch(self, claim: Claim, need: Need) -> Pin:
        started = time.monotonic()
        try:
            self._download(need, claim.data)
        except BaseException:
            with self._shelf.exclusive():
                self._shelf.drop(claim)
            raise
        with self._shelf.exclusive():
            pin = self._shelf.settle(claim)
        seconds = time.monotonic() - started
        self._observe(FileFetched(kind=need.kind, size_bytes=need.size_bytes, seconds=seconds))
        return pin

    def _download(self, need: Need, path: Path) -> None:
        """Write the object to a new file, verified and on the disk."""
        found_bytes = self._store.stat(need.key).size_bytes  # first: an object may have grown past the room kept for it
        if found_bytes != need.size_bytes:
            msg = f"object {need.key!r} has {found_bytes} bytes instead of {need.size_bytes}; register it again"
            raise ChecksumMismatch(msg)
        self._store.get_file(need.key, path)
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        if found != need.digest:
            msg = f"object {need.key!r} has the SHA-256 {found} instead of {need.digest}; register it again"
            raise ChecksumMismatch(msg)

    def _tell_evicted(self, evicted: Iterable[Entry]) -> None:
        for entry in evicted:
            self._observe(CacheEvicted(size_bytes=entry.size_bytes))

    def _tell_size(self) -> None:
        self._observe(CacheSized(used_bytes=self.used_bytes, budget_bytes=self.budget_bytes))


def _sum(entries: Iterable[Entry]) -> int:
    return sum(entry.size_bytes for entry in entries)


def _release(pins: dict[str, Pin]) -> None:
    while pins:
        pins.popitem()[1].release()


@contextlib.contextmanager
def _disk_errors(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        msg = f"the cache directory {root} cannot be used: {error}"
        raise StoreUnavailable(msg) from error
