"""The API's process: ``python -m api.main``. Settings come in here and nowhere else."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import signal
import socket
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import FrameType

import uvicorn

from api.access import Access
from api.app import create_app
from api.context import Context, Limits
from core.catalogue.redis import RedisCatalogue
from core.errors import FuselineError, QueueMisconfigured
from core.events import Event
from core.ports import PoolStats
from core.queue.connection import check_server
from core.queue.redis import RedisQueue
from core.queue.tickets import TicketOffice
from core.queue.upkeep import UpkeepThread
from core.settings import Settings
from core.store.open import open_store
from core.telemetry import logs
from core.telemetry.metrics import Metrics

DRAIN_S = 10
"""How long requests in hand may take once the process is told to end."""

_log = logging.getLogger(__name__)


def main() -> None:
    """Serve until SIGTERM or SIGINT. Leaves with a sentence where it cannot start."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)
    try:
        settings = Settings()
        logs.configure(settings.log_level, json_lines=settings.log_json)
        _serve(settings, _access(settings))
    except (FuselineError, ValueError, OSError) as error:
        sys.exit(f"the API does not start: {logs.redact(str(error))}")


def _leave(_signal: int, _frame: FrameType | None) -> None:
    # uvicorn finishes the requests in hand first, then hands the signal on to here
    sys.exit(0)


def _access(settings: Settings) -> Access:
    """Read the tokens. Raises ``ValueError`` for an API that would be open to the network."""
    access = Access.parse(settings.api_tokens.get_secret_value())
    if access.is_open and not _is_loopback(settings.api_host):
        msg = (
            f"FUSELINE_API_HOST is {settings.api_host}, which others can reach, and no token is set: "
            "set FUSELINE_API_TOKENS=tenant=token, or bind to 127.0.0.1"
        )
        raise ValueError(msg)
    return access


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _serve(settings: Settings, access: Access) -> None:
    family = socket.AF_INET6 if ":" in settings.api_host else socket.AF_INET
    with socket.create_server((settings.api_host, settings.api_port), family=family, backlog=1024) as listener:
        host = f"[{settings.api_host}]" if family is socket.AF_INET6 else settings.api_host
        url = f"http://{host}:{listener.getsockname()[1]}"
        with running_context(settings, access, settings.public_url or url) as context:
            config = uvicorn.Config(
                create_app(context),
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=DRAIN_S,
            )
            _log.info("the API listens on %s", url)
            uvicorn.Server(config).run(sockets=[listener])


@contextlib.contextmanager
def running_context(settings: Settings, access: Access, public_url: str) -> Iterator[Context]:
    """Build the real parts, with upkeep running, and close them again.

    Raises ``QueueUnavailable``, ``QueueMisconfigured`` and ``StoreError`` for parts that cannot be served from.
    """
    metrics, event_log = Metrics(pools=[settings.pool]), logs.EventLog()

    def observe(event: Event) -> None:
        metrics(event)
        event_log(event)

    queue = RedisQueue(
        settings.redis_url,
        slack=settings.slack,
        max_queued_per_tenant=settings.max_queued_per_tenant,
        result_ttl_s=settings.result_ttl_s,
        timeout_s=settings.redis_timeout_s,
        observe=observe,
    )
    _check_server(queue, required=settings.require_durable_redis)
    tickets = TicketOffice(settings.broker_url or settings.redis_url, timeout_s=settings.redis_timeout_s)
    metrics.watch_queue(lambda: _stats(queue, tickets))
    store = open_store(
        settings.store_url,
        s3_endpoint=settings.s3_endpoint,
        s3_public_endpoint=settings.s3_public_endpoint,
        s3_region=settings.s3_region,
        public_url=public_url,
        url_secret=settings.url_secret.get_secret_value(),
    )
    upkeep = UpkeepThread(queue, tickets)
    upkeep.start()
    try:
        yield Context(
            queue=queue,
            store=store,
            catalogue=RedisCatalogue(queue.client),
            tickets=tickets,
            metrics=metrics,
            observe=observe,
            access=access,
            limits=_limits(settings),
        )
    finally:
        upkeep.stop()
        tickets.close()
        queue.client.close()


def _check_server(queue: RedisQueue, *, required: bool) -> None:
    try:
        for warning in check_server(queue.client):
            _log.warning(warning)
    except QueueMisconfigured as error:
        if required:
            raise
        _log.warning("%s (FUSELINE_REQUIRE_DURABLE_REDIS is off)", error)


def _stats(queue: RedisQueue, tickets: TicketOffice) -> tuple[PoolStats, ...]:
    return tuple(replace(stats, tickets=tickets.waiting(stats.pool)) for stats in queue.stats())


def _limits(settings: Settings) -> Limits:
    return Limits(
        max_body_bytes=settings.max_body_bytes,
        max_prompt_chars=settings.max_prompt_chars,
        max_steps=settings.max_steps,
        max_images=settings.max_images,
        max_loras=settings.max_loras,
        max_lora_bytes=settings.max_lora_bytes,
        max_attempts=settings.max_attempts,
        url_expires_s=settings.url_expires_s,
    )


if __name__ == "__main__":
    main()
