"""Keeps a lease alive while its batch makes progress, and carries back what the queue says of it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

from core.errors import JobCancelled, LeaseLost, QueueUnavailable
from core.ports import JobQueue, Lease

_log = logging.getLogger(__name__)

WEDGED_GRACE_S = 10.0
"""How long a run that lost its lease for want of progress may take to notice."""


class LeaseKeeper:
    """Renews a lease from a thread of its own, for the length of a ``with`` block.

    It renews only while ``advance`` has been called within ``stall_s``: a wedged run loses its lease, and its jobs go
    to another worker. If it is still wedged after ``WEDGED_GRACE_S`` more, ``on_wedged`` is called to end the process,
    for nothing else interrupts a device call. When the lease is lost, ``check`` raises in the runner's thread, which
    then stores nothing.
    """

    def __init__(
        self, queue: JobQueue, lease: Lease, *, lease_s: float, stall_s: float, on_wedged: Callable[[], object]
    ) -> None:
        self.lease = lease
        self._queue = queue
        self._lease_s = lease_s
        self._stall_s = stall_s
        self._on_wedged = on_wedged
        self._progress: dict[str, float] = {}
        self._cancelled: frozenset[str] = frozenset()
        self._lost: LeaseLost | None = None
        self._advanced = time.monotonic()
        self._renewed = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew_until_stopped, name=f"lease-{lease.fence}", daemon=True)

    def __enter__(self) -> Self:
        """Begin to renew."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop renewing. What is left of the lease then lapses by itself."""
        self._stop.set()
        self._thread.join()

    def advance(self, job_ids: Iterable[str] = (), progress: float = 0.0) -> None:
        """Note that the run moves: these jobs are done to this fraction."""
        self._advanced = time.monotonic()
        self._progress.update(dict.fromkeys(job_ids, progress))

    def is_cancelled(self, job_id: str) -> bool:
        """Whether the job's owner asked for its end."""
        return job_id in self._cancelled

    def check(self, job_ids: Iterable[str]) -> None:
        """Raise ``LeaseLost``, or ``JobCancelled`` once all of these jobs are cancelled."""
        if self._lost is not None:
            raise self._lost
        silent_s = time.monotonic() - self._renewed
        if silent_s > self._lease_s:
            msg = (
                f"lease {self.lease.fence} could not be renewed for {silent_s:.1f} s: another worker may hold its jobs"
            )
            raise LeaseLost(msg)
        ids = set(job_ids)
        if ids and ids <= self._cancelled:
            msg = "cancelled by its owner"
            raise JobCancelled(msg)

    def _renew_until_stopped(self) -> None:
        while not self._stop.wait(self._lease_s / 4):
            stalled_s = time.monotonic() - self._advanced
            if stalled_s > self._stall_s:
                self._lost = LeaseLost(f"lease {self.lease.fence} given up: no progress for {stalled_s:.0f} s")
                if not self._stop.wait(WEDGED_GRACE_S):
                    _log.critical("the run is wedged; this process ends and is replaced")
                    self._on_wedged()
                return
            asked = time.monotonic()
            try:
                self._cancelled = self._queue.heartbeat(
                    self.lease.fence, lease_s=self._lease_s, progress=dict(self._progress)
                )
                self._renewed = asked
            except LeaseLost as lost:
                self._lost = lost
                return
            except QueueUnavailable as error:
                _log.warning("lease %s not renewed, will try again: %s", self.lease.fence, error)
