"""What keeps the queue moving when nobody calls: taking back lost leases, retries that are due, tickets.

Every API process and every worker's Celery parent does this each second. Each step is bounded and may be done by any
number of them at once.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from core.errors import QueueUnavailable
from core.ports import JobQueue, PoolStats, Reaped, WorkerInfo

log = logging.getLogger(__name__)

PERIOD_S = 1.0
JITTER = 0.25
"""Share of the period by which each wait is drawn shorter or longer, so that processes do not fall into step."""


class Tickets(Protocol):
    """What upkeep needs of ``TicketOffice``."""

    def level(self, pool: str, want: int) -> bool:
        """Top up to ``want`` waiting tickets."""
        ...


@dataclass(frozen=True, slots=True)
class Tick:
    """What one round of upkeep did."""

    reaped: tuple[Reaped, ...]
    promoted: int
    wanted: dict[str, int]
    """Tickets that should wait, by pool."""


def tickets_wanted(pool: PoolStats, workers: Iterable[WorkerInfo]) -> int:
    """Say how many tickets should wait for a pool: one for each idle worker that there is a job for.

    A busy worker needs none, for it claims until nothing is left. But while a job is ready there is always one: for
    the worker that ends its time budget just now, and for one that no registry shows yet.
    """
    idle = sum(worker.pool == pool.pool and not worker.busy for worker in workers)
    return min(pool.queued, max(1, idle))


def tick(queue: JobQueue, tickets: Tickets) -> Tick:
    """Do one bounded round. Raises ``QueueUnavailable``."""
    reaped, promoted = queue.reap(), queue.promote()
    workers = queue.workers()
    wanted = {pool.pool: tickets_wanted(pool, workers) for pool in queue.stats()}
    for pool, want in wanted.items():
        if want:
            tickets.level(pool, want)
    return Tick(reaped, promoted, wanted)


class UpkeepThread(threading.Thread):
    """Does a round each second until it is stopped. Outlives an outage of Redis: says so once, and when it is over."""

    def __init__(
        self,
        queue: JobQueue,
        tickets: Tickets,
        *,
        period_s: float = PERIOD_S,
        draw: Callable[[float, float], float] = random.uniform,
    ) -> None:
        super().__init__(name="upkeep", daemon=True)
        self._queue = queue
        self._tickets = tickets
        self._period_s = period_s
        self._draw = draw
        self._stopping = threading.Event()
        self._failing = False

    def run(self) -> None:
        """Work until ``stop`` is called."""
        while not self._stopping.wait(self._period_s * self._draw(1 - JITTER, 1 + JITTER)):
            self._round()

    def _round(self) -> None:
        try:
            tick(self._queue, self._tickets)
        except QueueUnavailable as error:
            if not self._failing:
                log.warning("upkeep waits for the queue: %s", error)
            self._failing = True
        else:
            if self._failing:
                log.info("upkeep goes on: the queue answers again")
            self._failing = False

    def stop(self, timeout_s: float = 5.0) -> None:
        """End after the round at hand, and wait for that."""
        self._stopping.set()
        if self.is_alive():
            self.join(timeout_s)
