"""The Celery task. A ticket means "there is work for this pool"; which jobs it stands for is decided by the runner.

The task is one of the two doors where any exception is caught: what a bug leaves open is a lease that lapses, and
its jobs come back as suspects.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from celery import shared_task
from celery.signals import worker_process_init

from core.errors import QueueUnavailable
from core.queue.tickets import TASK_NAME

_log = logging.getLogger(__name__)


@dataclass
class Child:
    """The process that holds the device. It makes its runner at the first ticket, so that it reports in time."""

    build: Callable[[], Callable[[], int]] | None = None
    """Makes the function that takes batches until there is no work and counts them. Set by ``worker.main``."""
    _work: Callable[[], int] | None = None

    def work(self) -> int:
        """Take batches until there is no work; count them."""
        if self._work is None:
            assert self.build is not None, "worker.main installs the runner"
            self._work = self.build()
        return self._work()


child = Child()


@worker_process_init.connect
def _ignore_sigterm(**_: Any) -> None:
    """Let the parent alone hear SIGTERM; the child ends its batch and is then told to stop."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@shared_task(name=TASK_NAME)
def work() -> None:
    """Work through the queue."""
    try:
        child.work()
    except QueueUnavailable as error:
        _log.warning("the queue is out of reach, this ticket ends: %s", error)
    except Exception:  # noqa: BLE001 - a door: see above
        _log.exception("a batch ended in an unforeseen error; its jobs come back when their lease lapses")
