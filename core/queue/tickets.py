"""Celery carries tickets, not jobs: a message means "there is work for this pool", and nothing more.

Which jobs a ticket stands for is decided when a worker claims. So a ticket that is lost, doubled or left over harms
nobody: upkeep tops tickets up, and a worker that finds no work for one drops it. The settings here are what that
needs of Celery on Redis: messages are acknowledged when they arrive and never fetched ahead, held back or retried.
"""

from __future__ import annotations

import logging
from typing import Final

from celery import Celery
from kombu.exceptions import OperationalError

from core.errors import QueueUnavailable
from core.queue.connection import connect, once_more

log = logging.getLogger(__name__)

TASK_NAME: Final = "fuseline.work"
"""Name of the one task. Producers send it by name; only workers define it. It takes no arguments."""

WORKER_FLAGS: Final = (
    "--pool=prefork",
    "--concurrency=1",
    "--without-gossip",
    "--without-mingle",
    "--without-heartbeat",
)
"""Arguments of ``celery worker`` that have no setting: no chatter between workers, one child per GPU."""

TICKETS_MAX: Final = 100
"""Most tickets that one call sends."""


def queue_name(pool: str) -> str:
    """Name a pool's Celery queue, which is also the name of the Redis list that holds its messages."""
    return f"tickets.{pool}"


def make_celery(broker_url: str, pool: str, *, socket_timeout_s: float = 5.0) -> Celery:
    """Make the Celery application of a pool, for its worker or for a producer of tickets. Connects to nothing.

    The worker's own task limits are set by the worker.
    """
    app = Celery("fuseline", broker=broker_url, set_as_current=False)
    app.conf.update(
        # messages
        accept_content=["json"],
        task_serializer="json",
        task_default_queue=queue_name(pool),
        task_publish_retry_policy={"max_retries": 1, "interval_start": 0, "interval_step": 0.1, "interval_max": 0.1},
        # no results: the state of a job is in its queue
        result_backend=None,
        task_ignore_result=True,
        # acknowledged on arrival, taken one at a time: a ticket is a hint and is never worth protecting
        task_acks_late=False,
        worker_disable_prefetch=True,
        worker_prefetch_multiplier=1,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        # CUDA does not survive a fork, and importing torch takes longer than the usual 4 s
        worker_pool="prefork",
        worker_pool_start_method="spawn",
        worker_proc_alive_timeout=180,
        worker_concurrency=1,
        worker_enable_remote_control=True,
        worker_send_task_events=False,
        worker_hijack_root_logger=False,
        # a broker that is away is waited for
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={
            "socket_timeout": socket_timeout_s,
            "socket_connect_timeout": min(3.0, socket_timeout_s),
            "socket_keepalive": True,
            "health_check_interval": 15,
            "retry_on_timeout": False,
            "visibility_timeout": 3600,
        },
    )
    return app


class TicketOffice:
    """Sends tickets. No failure of the broker reaches the caller: a job that was accepted stays accepted.

    ``timeout_s`` bounds the look at the list that comes before each send, so a broker that hangs costs a submit no
    more than that; ``publish_timeout_s`` bounds a send.
    """

    def __init__(self, broker_url: str, *, timeout_s: float = 0.8, publish_timeout_s: float = 2.0) -> None:
        self._app = make_celery(broker_url, "default", socket_timeout_s=publish_timeout_s)
        self._client = connect(broker_url, timeout_s=timeout_s)

    def waiting(self, pool: str) -> int:
        """Count the tickets that no worker has taken. Raises ``QueueUnavailable``."""
        return int(once_more(lambda: self._client.llen(queue_name(pool))))

    def send(self, pool: str) -> bool:
        """See to it that a ticket waits, as a submit does. ``False`` if the broker failed: upkeep will try again."""
        return self.level(pool, 1)

    def level(self, pool: str, want: int) -> bool:
        """Top up to ``want`` waiting tickets, never more; ``False`` if the broker failed.

        Two callers at once may each add what is missing; the surplus is harmless.
        """
        try:
            for _ in range(min(want - self.waiting(pool), TICKETS_MAX)):
                self._app.send_task(TASK_NAME, queue=queue_name(pool))
        except (QueueUnavailable, OperationalError) as error:
            log.warning("no ticket went out for pool %s: the broker failed (%s); upkeep will try again", pool, error)
            return False
        return True

    def close(self) -> None:
        """Close the connections."""
        self._app.close()
        self._client.close()
