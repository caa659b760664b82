"""What the Celery parent does beside handing tickets to its child: upkeep, the registry, the drain signal.

The parent holds no device and imports no torch. It alone hears SIGTERM: it then writes the drain file, which the
child reads between forward passes.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from celery.worker import state as celery_state

from core.errors import QueueUnavailable
from core.ports import JobQueue, WorkerInfo
from core.queue.upkeep import UpkeepThread

_log = logging.getLogger(__name__)

SEEN_PERIOD_S = 2.0
"""How often a worker renews its entry in the registry."""
SEEN_TTL_S = 10.0


class Parent:
    """The threads of one Celery parent."""

    def __init__(self, worker: str, pool: str, queue: JobQueue, upkeep: UpkeepThread, drain_file: Path) -> None:
        self._worker = worker
        self._pool = pool
        self._queue = queue
        self._upkeep = upkeep
        self._drain_file = drain_file
        self._stopping = threading.Event()
        self._registry = threading.Thread(target=self._stay_registered, name="registry", daemon=True)

    def start(self) -> None:
        """Begin upkeep and enter the registry."""
        self._upkeep.start()
        self._registry.start()

    def drain(self) -> None:
        """Tell the child to finish the forward pass in hand and give the rest back."""
        _log.info("draining: the pass in hand is finished, the rest goes back to the queue")
        self._drain_file.touch()

    def stop(self) -> None:
        """Leave the registry and end the threads."""
        self._stopping.set()
        self._upkeep.stop()
        if self._registry.is_alive():
            self._registry.join()
        try:
            self._queue.forget_worker(self._worker)
        except QueueUnavailable as error:
            _log.warning("left without telling the registry, the entry lapses by itself: %s", error)

    def _stay_registered(self) -> None:
        failing = False
        while True:
            info = WorkerInfo(id=self._worker, pool=self._pool, busy=bool(celery_state.active_requests))
            try:
                self._queue.see_worker(info, ttl_s=SEEN_TTL_S)
                failing = False
            except QueueUnavailable as error:
                if not failing:
                    _log.warning("not seen by the registry, will try again: %s", error)
                failing = True
            if self._stopping.wait(SEEN_PERIOD_S):
                return
