"""The cache's directory, as all processes of a host see it.

    lock                          held for the moment in which anything below changes
    ab/abcd...                    a finished file, named by its digest; a shared flock on it is a pin
    incoming/abcd...-<bytes>/     a download; an exclusive flock on it says that its process lives

A process that dies drops its flocks, and with them its pins and its claim to a download; what it left in
``incoming`` is removed by whoever looks next. The modification time of a finished file is when it was last used. The
directory must be on a local disk, because flock is not dependable elsewhere.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from worker.cache.lru import Entry

DIGEST = re.compile(r"[0-9a-f]{64}")
"""A SHA-256 digest: the only names that finished files have."""


class Flock:
    """An advisory lock on an open file or directory, against other threads as well as other processes."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def take(cls, path: Path, how: int) -> Self | None:
        """Lock as ``LOCK_SH`` or ``LOCK_EX`` without waiting. ``None`` if it is held, or nothing is there."""
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, how | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        return cls(descriptor)

    def release(self) -> None:
        """Unlock, explicitly: a forked child may hold a copy of the descriptor."""
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        os.close(self._descriptor)


@dataclass(frozen=True, slots=True)
class Pin:
    """A finished file that stays until ``release``."""

    path: Path
    lock: Flock

    def release(self) -> None:
        """Let the file be evicted again."""
        self.lock.release()


@dataclass(frozen=True, slots=True)
class Claim:
    """The sole right to download one file, and the room that is kept for it."""

    digest: str
    folder: Path
    lock: Flock

    @property
    def data(self) -> Path:
        """Where the download goes. Whatever else lies beside it is removed with the claim."""
        return self.folder / "data"


class Shelf:
    """The directory. Every method but ``exclusive`` and ``holds`` is for use inside ``exclusive``."""

    def __init__(self, root: Path) -> None:
        (root / "incoming").mkdir(parents=True, exist_ok=True)
        self.root = root.resolve()
        self._incoming = self.root / "incoming"

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep every other thread and process of the host out, for a moment: never while bytes travel."""
        descriptor = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        lock = Flock(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            lock.release()

    def holds(self, digest: str, size_bytes: int) -> bool:
        """Say whether the finished file is there, of that size."""
        try:
            return self._path(digest).stat().st_size == size_bytes
        except FileNotFoundError:
            return False

    def pin(self, digest: str, size_bytes: int) -> Pin | None:
        """Pin a finished file and note its use. One of another size is damaged: it is removed."""
        path = self._path(digest)
        lock = Flock.take(path, fcntl.LOCK_SH)
        if lock is None:
            return None
        if not self.holds(digest, size_bytes):
            lock.release()
            path.unlink()
            return None
        _note_use(path)
        return Pin(path, lock)

    def entries(self) -> tuple[Entry, ...]:
        """List the finished files."""
        return tuple(self._listing())

    def pinned(self, entries: Iterable[Entry]) -> Collection[str]:
        """Which of these files some thread or process has pinned."""
        return {entry.digest for entry in entries if not _is_free(self._path(entry.digest))}

    def remove(self, entry: Entry) -> None:
        """Remove a finished file. Who has it open or mapped keeps its content."""
        self._path(entry.digest).unlink()

    def claims(self) -> dict[str, int]:
        """Bytes kept for each download under way, by digest. Removes those of dead processes."""
        live: dict[str, int] = {}
        for folder in list(self._incoming.iterdir()):
            if _is_free(folder):
                shutil.rmtree(folder)
                continue
            digest, _, size_bytes = folder.name.partition("-")
            live[digest] = int(size_bytes)
        return live

    def claim(self, digest: str, size_bytes: int) -> Claim:
        """Claim a download that ``claims`` has just not named."""
        folder = self._incoming / f"{digest}-{size_bytes}"
        folder.mkdir()
        lock = Flock.take(folder, fcntl.LOCK_EX)
        assert lock is not None, "claimed twice inside one exclusive section"
        return Claim(digest, folder, lock)

    def drop(self, claim: Claim) -> None:
        """Give up a download and all of its bytes."""
        shutil.rmtree(claim.folder)
        claim.lock.release()

    def settle(self, claim: Claim) -> Pin:
        """Make a complete, verified and synced download a finished file, pinned from the start."""
        path = self._path(claim.digest)
        path.parent.mkdir(exist_ok=True)
        lock = Flock.take(claim.data, fcntl.LOCK_SH)
        assert lock is not None, "nobody else locks a download's data"
        _note_use(claim.data)
        claim.data.replace(path)
        self.drop(claim)
        return Pin(path, lock)

    def _path(self, digest: str) -> Path:
        return self.root / digest[:2] / digest

    def _listing(self) -> Iterator[Entry]:
        for folder in self.root.glob("[0-9a-f][0-9a-f]"):
            with os.scandir(folder) as files:
                for file in files:
                    if DIGEST.fullmatch(file.name):
                        stat = file.stat()
                        yield Entry(file.name, stat.st_size, stat.st_mtime_ns)


def _note_use(path: Path) -> None:
    now = time.time_ns()  # explicitly: the file system's own clock is coarser, and the order would not be exact
    os.utime(path, ns=(now, now))


def _is_free(path: Path) -> bool:
    lock = Flock.take(path, fcntl.LOCK_EX)
    if lock is None:
        return False
    lock.release()
    return True
