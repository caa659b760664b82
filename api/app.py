"""The application: routes, guards and the one door for errors, around a context."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from anyio import to_thread
from fastapi import FastAPI, Request

from api import problems
from api.context import Context
from api.guard import BodyLimit, Timing
from api.routes import ROUTERS
from core.events import SubmitRejected

API_VERSION = "1"

THREADS = 128
"""Requests that may wait for Redis or the store at once. When Redis hangs, so many get their 503 together."""


def create_app(context: Context) -> FastAPI:
    """Build the application. It holds nothing but what the context brings."""
    app = FastAPI(
        title="Fuseline",
        summary="A job queue that makes images with diffusion models and LoRA files.",
        version=API_VERSION,
        redirect_slashes=False,
        lifespan=_with_threads,
    )
    app.state.context = context
    for router in ROUTERS:
        app.include_router(router)
    app.add_middleware(BodyLimit, max_bytes=context.limits.max_body_bytes)
    app.add_middleware(Timing, metrics=context.metrics)

    def on_refusal(request: Request, code: str) -> None:
        if request.method == "POST" and request.url.path == "/v1/jobs":
            context.observe(SubmitRejected(code))

    problems.install(app, on_refusal)
    _document_problems(app)
    return app


@contextlib.asynccontextmanager
async def _with_threads(_app: FastAPI) -> AsyncIterator[None]:
    to_thread.current_default_thread_limiter().total_tokens = THREADS
    yield


def _document_problems(app: FastAPI) -> None:
    """Let OpenAPI say what errors really are: problem+json, validation errors as well."""
    describe = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = describe()
            for operations in schema["paths"].values():
                for operation in operations.values():
                    _as_problems(operation["responses"])
            for unused in ("HTTPValidationError", "ValidationError"):
                schema["components"]["schemas"].pop(unused, None)
        return describe()

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend its schema


def _as_problems(answers: dict[str, Any]) -> None:
    content = {problems.MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    for status, answer in answers.items():
        if int(status) >= 400:  # noqa: PLR2004 - the statuses of errors
            answer["content"] = content
