"""For those who run the service: is it alive, is it ready, what does it count."""

from __future__ import annotations

import contextlib

from fastapi import APIRouter, Response

from api.context import Parts
from api.problems import responses
from api.views import Health
from core.errors import Busy, ObjectNotFound, QueueUnavailable, StoreDenied, StoreUnavailable
from core.ports import ObjectStore

router = APIRouter(tags=["operation"])

PROBE_KEY = "probe/readiness"
"""Asked of the store; it need not exist."""


@router.get("/healthz")
async def healthz() -> Health:
    """Say that the process answers. Looks at nothing else, so that a broken Redis restarts no API."""
    return Health()


@router.get("/readyz", responses=responses(QueueUnavailable, StoreUnavailable, StoreDenied, Busy))
def readyz(context: Parts) -> Health:
    """Say whether queue and store answer; the problem's code names the part that does not."""
    with context.checks.place():
        context.queue.ping()
        _reach(context.store)
    return Health()


@router.get("/metrics", include_in_schema=False)
def metrics(context: Parts) -> Response:
    """Give what Prometheus reads."""
    text, content_type = context.metrics.exposition()
    return Response(text, headers={"Content-Type": content_type})


def _reach(store: ObjectStore) -> None:
    with contextlib.suppress(ObjectNotFound):
        store.stat(PROBE_KEY)
