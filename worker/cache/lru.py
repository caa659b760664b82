"""Which files leave the cache: the least recently used first, never a pinned one. Pure.

The directory is the cache's only memory, so that all processes of a host share one order and it outlives them; this
module decides on a listing of it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of the cache."""

    digest: str
    size_bytes: int
    used_ns: int
    """When it was last asked for."""


def victims(entries: Iterable[Entry], excess_bytes: int, pinned: Collection[str]) -> tuple[Entry, ...] | None:
    """Name the files that must go to free ``excess_bytes``, or ``None`` when the pinned digests leave too little.

    They are the shortest run of unpinned files, least recently used first, that frees as much; equal times go by
    digest.
    """
    chosen: list[Entry] = []
    for entry in sorted(entries, key=lambda entry: (entry.used_ns, entry.digest)):
        if excess_bytes <= 0:
            break
        if entry.digest not in pinned:
            chosen.append(entry)
            excess_bytes -= entry.size_bytes
    return tuple(chosen) if excess_bytes <= 0 else None
