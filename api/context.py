"""What the routes work with, handed to ``create_app``; nothing of it is global."""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Protocol

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from api.access import Access
from api.gate import Gate
from core.ports import Catalogue, JobQueue, ObjectStore, Observer

SEED_LIMIT = 2**32
"""Seeds that are drawn lie below it, as in other image software."""

REGISTRATIONS_AT_ONCE = 8
"""LoRA files that one process reads at once: each holds a thread for as long as its file takes."""

CHECKS_AT_ONCE = 4
"""Readiness checks that one process makes at once: each may have to wait for a part that hangs."""


class Tickets(Protocol):
    """Tells workers that there is work."""

    def send(self, pool: str) -> object:
        """Publish one ticket, in bounded time. Does not raise: a lost ticket is topped up by upkeep."""
        ...


class HttpMetrics(Protocol):
    """What this process counts, and what a scrape of it reads."""

    def exposition(self) -> tuple[bytes, str]:
        """Give the text and its content type."""
        ...

    def http_request(self, *, method: str, route: str, status: int, seconds: float) -> None:
        """Count one request by the route's template."""
        ...


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on what may be asked, from the settings of the same names."""

    max_body_bytes: int = 256 * 1024
    max_prompt_chars: int = 8_000
    max_steps: int = 500
    max_images: int = 16
    max_loras: int = 16
    max_lora_bytes: int = 2 * 1024**3
    max_attempts: int = 5
    url_expires_s: int = 900


@dataclass(frozen=True, slots=True)
class Context:
    """The parts behind the API."""

    queue: JobQueue
    store: ObjectStore
    catalogue: Catalogue
    tickets: Tickets
    metrics: HttpMetrics
    observe: Observer
    access: Access = field(default_factory=Access)
    limits: Limits = field(default_factory=Limits)
    registrations: Gate = field(default_factory=lambda: Gate(REGISTRATIONS_AT_ONCE))
    checks: Gate = field(default_factory=lambda: Gate(CHECKS_AT_ONCE))
    new_id: Callable[[], str] = lambda: uuid.uuid4().hex
    draw_seed: Callable[[], int] = lambda: secrets.randbelow(SEED_LIMIT)


def context_of(request: Request) -> Context:
    """Find the context of the app that serves a request."""
    context = request.app.state.context
    assert isinstance(context, Context)
    return context


Parts = Annotated[Context, Depends(context_of)]
"""A route's parameter: the parts behind the API."""

_bearer = HTTPBearer(auto_error=False, description="A token of this service. Not needed while the API is open.")


def caller(
    context: Parts,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> str:
    """Name the tenant that calls. Raises ``Unauthorized``."""
    return context.access.tenant_of(credentials.credentials if credentials else None)


Caller = Annotated[str, Depends(caller)]
"""A route's parameter: the tenant that calls."""
