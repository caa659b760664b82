"""What stands between the server and the routes: a bound on bodies, and a count of every request."""

from __future__ import annotations

import time
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.context import HttpMetrics

DISCARD_BYTES = 16 * 1024 * 1024
"""How much of a body that is too large is read and thrown away before the answer."""

UNMATCHED = "unmatched"
"""Route label of requests that no route took."""


class BodyLimit:
    """Refuses bodies of more than ``max_bytes`` with 413: by Content-Length before reading, else while reading."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        left = self._max_bytes

        async def bounded() -> Message:
            nonlocal left
            if declared.isdecimal() and int(declared[:20]) > self._max_bytes:
                await _discard(receive)
                raise self._too_large()
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                if message.get("more_body", False):
                    await _discard(receive)
                raise self._too_large()
            return message

        await self._app(scope, bounded, send)

    def _too_large(self) -> HTTPException:
        # what is left of the body is never read, so the connection cannot be used again
        detail = f"the request's body is larger than {self._max_bytes} bytes"
        return HTTPException(413, detail, headers={"Connection": "close"})


async def _discard(receive: Receive) -> None:
    """Read on for a bounded while: a client that is still sending when we close would see a reset, not our answer."""
    read, more = 0, True
    while more and read < DISCARD_BYTES:
        message = await receive()
        read += len(message.get("body", b""))
        more = message["type"] == "http.request" and message.get("more_body", False)


class Timing:
    """Counts requests and their seconds by method, route template and status."""

    def __init__(self, app: ASGIApp, metrics: HttpMetrics, now_s: Callable[[], float] = time.perf_counter) -> None:
        self._app = app
        self._metrics = metrics
        self._now_s = now_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, start_s = 500, self._now_s()

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            route = getattr(scope.get("route"), "path", UNMATCHED)
            seconds = self._now_s() - start_s
            self._metrics.http_request(method=scope["method"], route=route, status=status, seconds=seconds)
