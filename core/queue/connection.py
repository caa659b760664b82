"""How the queue reaches Redis: bounded in time, with failures in our own words, on a server that cannot lose jobs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from core.errors import QueueMisconfigured, QueueUnavailable

T = TypeVar("T")

HEALTH_CHECK_S = 15
"""A connection that was idle for longer is tried before it is used."""

_UNAVAILABLE = (
    redis.ConnectionError,  # with it: loading, wrong password
    redis.TimeoutError,
    redis.exceptions.OutOfMemoryError,
    redis.exceptions.ReadOnlyError,
    redis.exceptions.MasterDownError,
    redis.exceptions.ClusterDownError,
)
_UNAVAILABLE_CODES = ("MISCONF", "NOREPLICAS", "OOM", "READONLY", "BUSY", "UNKILLABLE", "LOADING")


def connect(url: str, *, timeout_s: float) -> redis.Redis:
    """Make a client; nothing is sent yet.

    A call on it takes at most ``timeout_s`` to connect and as long for each answer. redis-py's own retries are off:
    they nest, and three timeouts would become nine.
    """
    return redis.Redis.from_url(
        url,
        decode_responses=True,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        socket_keepalive=True,
        health_check_interval=HEALTH_CHECK_S,
        retry=Retry(NoBackoff(), 0),
    )


def once_more(call: Callable[[], T]) -> T:
    """Make a call that may be repeated, again if its connection breaks; a timeout is final.

    A pooled connection breaks when the server was restarted since; the next one is fresh. Raises
    ``QueueUnavailable``.
    """
    with unavailable():
        try:
            return call()
        except redis.ConnectionError as error:
            if isinstance(error, redis.BusyLoadingError | redis.AuthenticationError | redis.TimeoutError):
                raise
            return call()


@contextmanager
def unavailable() -> Iterator[None]:
    """Turn what redis-py raises when the server cannot serve into ``QueueUnavailable``."""
    try:
        yield
    except _UNAVAILABLE as error:
        raise _translated(error) from error
    except redis.ResponseError as error:
        if not str(error).startswith(_UNAVAILABLE_CODES):
            raise
        raise _translated(error) from error


def _translated(error: redis.RedisError) -> QueueUnavailable:
    return QueueUnavailable(f"Redis does not serve ({type(error).__name__}: {error}); try again shortly")


def check_server(client: redis.Redis) -> list[str]:
    """Look for server settings that could lose jobs.

    Returns warnings, in sentences. Raises ``QueueMisconfigured`` if the server may evict keys, ``QueueUnavailable``.
    """
    policy = _info(client, "memory").get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        msg = f"Redis may drop jobs: maxmemory-policy is {policy}; set it to noeviction"
        raise QueueMisconfigured(msg)
    if not int(_info(client, "persistence").get("aof_enabled", 0)):
        return ["Redis keeps no append-only file: a restart loses jobs; set appendonly yes"]
    sync = _setting(client, "appendfsync")
    if sync is None:
        return ["Redis does not tell its appendfsync: make sure that it is always"]
    if sync != "always":
        return [f"appendfsync is {sync}: a power cut can lose the last jobs that were accepted; set it to always"]
    return []


def _info(client: redis.Redis, section: str) -> dict[str, Any]:
    answer: dict[str, Any] = once_more(lambda: client.info(section))
    return answer


def _setting(client: redis.Redis, name: str) -> str | None:
    """Read one setting; ``None`` where the user may not (managed servers forbid CONFIG)."""
    try:
        value: str | None = once_more(lambda: client.config_get(name)).get(name)
    except redis.ResponseError:
        return None
    return value
