"""A worker: ``python -m worker.main``. A Celery parent, and one spawned child that holds the device.

Reads the settings, builds the parts, starts Celery. The child imports this module too (Celery's ``include``) and
builds its runner at its first ticket, so that torch is imported there and nowhere else.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from celery.signals import setup_logging, worker_process_init, worker_ready, worker_shutting_down

from core.catalogue.redis import RedisCatalogue
from core.errors import FuselineError
from core.events import Event
from core.ports import Observer
from core.queue.connection import check_server, connect
from core.queue.redis import RedisQueue
from core.queue.tickets import WORKER_FLAGS, TicketOffice, make_celery, queue_name
from core.queue.upkeep import UpkeepThread
from core.settings import Settings
from core.store.open import open_store
from core.telemetry.logs import EventLog, configure
from core.telemetry.metrics import Metrics
from worker.parent import Parent
from worker.tasks import child

_log = logging.getLogger("worker")


@worker_process_init.connect(dispatch_uid="fuseline-child")
def _start_child(**_: Any) -> None:
    """Say how the child's runner is made, and serve its metrics from its first moment."""
    settings = Settings()
    metrics, log = Metrics(pools=[settings.pool]), EventLog()

    def observe(event: Event) -> None:
        metrics(event)
        log(event)

    child.build = lambda: build_runner(settings, observe)
    try:
        port = metrics.serve(settings.worker_metrics_port, settings.worker_metrics_host)
    except OSError as error:
        port = metrics.serve(0, settings.worker_metrics_host)
        _log.warning("metrics port %d is taken (%s); set another", settings.worker_metrics_port, error)
    _log.info("metrics on http://%s:%d/metrics", settings.worker_metrics_host, port)


@setup_logging.connect(dispatch_uid="fuseline-logging")
def _configure_logging(**_: Any) -> None:
    """Log as the settings say, in the parent and in the child; Celery then leaves logging alone."""
    settings = Settings()
    configure(settings.log_level, json_lines=settings.log_json)


def build_runner(settings: Settings, observe: Observer) -> Callable[[], int]:
    """Make the child's runner; return the function that takes batches until there is no work."""
    # torch and diffusers take seconds to import, and only the child needs them
    from worker.cache.files import FileCache  # noqa: PLC0415
    from worker.device import Device  # noqa: PLC0415
    from worker.runner import Runner, RunnerSettings  # noqa: PLC0415

    client = connect(settings.redis_url, timeout_s=settings.redis_timeout_s)
    queue = RedisQueue(client, slack=settings.slack, result_ttl_s=settings.result_ttl_s, observe=observe)
    store = _open_store(settings)
    cache = FileCache(settings.cache_dir, settings.cache_max_bytes, store, observe)
    runner = Runner(
        RunnerSettings(
            worker=settings.worker_name,
            pool=settings.pool,
            lease_s=settings.lease_s,
            stall_s=settings.stall_s,
            slack=settings.slack,
            batch_max=settings.batch_max,
            retry_base_s=settings.retry_base_s,
            retry_max_s=settings.retry_max_s,
        ),
        queue=queue,
        store=store,
        catalogue=RedisCatalogue(client),
        device=Device(cache, _engine_loader(settings), observe),
        observe=observe,
        end_process=lambda: os._exit(1),
    )
    drain_file = settings.drain_file
    assert drain_file is not None, "set by the parent"
    return lambda: runner.work(settings.ticket_budget_s, drain_file.exists)


def main() -> int:
    """Run a worker until it is told to stop; return the exit status."""
    settings = Settings()
    configure(settings.log_level, json_lines=settings.log_json)
    name = settings.worker_name or f"{socket.gethostname()}-{os.getpid()}"
    broker_url = settings.broker_url or settings.redis_url
    with tempfile.TemporaryDirectory(prefix="fuseline-worker-") as runtime:
        drain_file = Path(runtime) / "drain"
        # the spawned child reads its settings from the environment, as this process did
        os.environ |= {"FUSELINE_WORKER_NAME": name, "FUSELINE_DRAIN_FILE": str(drain_file)}
        try:
            parent = _build_parent(settings, name, broker_url, drain_file)
        except FuselineError as error:
            _log.error("%s: %s", error.code, error)
            return 1
        app = make_celery(broker_url, settings.pool)
        app.conf.include = ["worker.main"]
        app.conf.worker_redirect_stdouts = False
        worker_ready.connect(lambda **_: parent.start(), weak=False)
        worker_shutting_down.connect(lambda **_: parent.drain(), weak=False)
        arguments = ["worker", *WORKER_FLAGS, "-Q", queue_name(settings.pool), "-n", f"{name}@%h"]
        try:
            app.worker_main(arguments)
        except SystemExit as ended:
            return int(ended.code or 0)
        finally:
            parent.stop()
    return 0


def _build_parent(settings: Settings, name: str, broker_url: str, drain_file: Path) -> Parent:
    client = connect(settings.redis_url, timeout_s=settings.redis_timeout_s)
    if settings.require_durable_redis:
        for warning in check_server(client):
            _log.warning("%s", warning)
    queue = RedisQueue(client, slack=settings.slack, result_ttl_s=settings.result_ttl_s, observe=EventLog())
    return Parent(name, settings.pool, queue, UpkeepThread(queue, TicketOffice(broker_url)), drain_file)


def _open_store(settings: Settings) -> Any:
    return open_store(
        settings.store_url,
        s3_endpoint=settings.s3_endpoint,
        s3_public_endpoint=settings.s3_public_endpoint,
        s3_region=settings.s3_region,
    )


def _engine_loader(settings: Settings) -> Any:
    if settings.engine == "noop":
        from worker.engine.base import NoopEngine  # noqa: PLC0415

        return lambda _folder: NoopEngine()
    from worker.engine.pipeline import DiffusersEngine  # noqa: PLC0415

    return lambda folder: DiffusersEngine(
        folder, device=settings.device, dtype=settings.dtype, threads=settings.threads
    )


if __name__ == "__main__":
    sys.exit(main())
