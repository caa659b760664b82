"""Every refusal as RFC 9457 ``application/problem+json``: one table from error codes to HTTP statuses."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

import core.errors
from core.errors import FuselineError, InvalidRequest

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_S = 2
"""How long callers are asked to wait before they try again what may succeed later."""

STATUS: Mapping[str, int] = MappingProxyType(
    {
        "unauthorized": 401,
        "link_invalid": 403,
        "job_not_found": 404,
        "unknown_lora": 404,
        "unknown_model": 404,
        "object_not_found": 404,
        "name_taken": 409,
        "queue_full": 429,
        "busy": 503,
        "queue_unavailable": 503,
        "store_unavailable": 503,
        "store_denied": 503,
    }
)
"""Status by error code. Any other code is 422 when the client must change something, else 500."""

_HTTP_CODES: Mapping[int, str] = MappingProxyType(
    {400: "invalid_request", 404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}
)
_SHOWN_ERRORS = 20
_log = logging.getLogger(__name__)


class FieldProblem(BaseModel):
    """What is wrong with one field."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    field: str
    """Path of the field in the request, such as ``loras.0.name``."""
    message: str


class Problem(BaseModel):
    """An error, as RFC 9457 describes it, with this service's members ``code``, ``retryable`` and ``errors``."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    type: str = Field(examples=["urn:fuseline:problem:unknown_lora"])
    title: str
    """What the type means, the same each time."""
    status: int
    detail: str
    """What happened this time and what to do."""
    instance: str
    """Path of the request."""
    code: str
    """Stable name of the error: what programs should look at."""
    retryable: bool
    """Whether the same request may succeed later."""
    errors: list[FieldProblem] = []
    """The fields at fault, where there are any."""
    incident: str | None = None
    """Names the entry of the server's log, when the fault is the server's."""


class FieldsInvalid(InvalidRequest):
    """One or more fields are out of range."""

    def __init__(self, *errors: FieldProblem) -> None:
        self.errors = errors
        super().__init__(_joined(errors))


def status_of(error: type[FuselineError]) -> int:
    """Tell the HTTP status of an error."""
    return STATUS.get(error.code, 422 if error.blame == "client" else 500)


def title_of(code: str) -> str:
    """Tell what an error code means, the same each time; of an unknown one, that the service failed."""
    kinds = (kind for kind in vars(core.errors).values() if isinstance(kind, type) and issubclass(kind, FuselineError))
    return next((_title(kind) for kind in kinds if kind.code == code), "The service failed")


def of_error(error: FuselineError, instance: str) -> Problem:
    """Describe an error. The message of one that is the server's fault goes to the log, not to the client."""
    status = status_of(type(error))
    title = _title(type(error))
    blameless = error.blame == "client"
    return Problem(
        type=f"urn:fuseline:problem:{error.code}",
        title=title,
        status=status,
        detail=str(error) if blameless else f"{title}.",
        instance=instance,
        code=error.code,
        retryable=error.retryable,
        errors=list(error.errors) if isinstance(error, FieldsInvalid) else [],
        incident=None if blameless else _incident(),
    )


def response(problem: Problem, headers: Mapping[str, str] | None = None) -> Response:
    """Make the HTTP answer."""
    wait = {"Retry-After": str(RETRY_AFTER_S)} if problem.retryable else {}
    challenge = {"WWW-Authenticate": "Bearer"} if problem.status == 401 else {}  # noqa: PLR2004 - RFC 9110, 15.5.2
    # what a client sent is told back to it, so it may be text that UTF-8 cannot write
    body = json.dumps(problem.model_dump(exclude_defaults=True), ensure_ascii=False).encode(errors="replace")
    return Response(body, problem.status, {**(headers or {}), **wait, **challenge}, MEDIA_TYPE)


def responses(*errors: type[FuselineError]) -> dict[int | str, dict[str, Any]]:
    """Describe a route's refusals for OpenAPI."""
    described: dict[int | str, dict[str, Any]] = {}
    for status in sorted({status_of(error) for error in errors}):
        codes = " · ".join(f"`{error.code}` {_title(error)}" for error in errors if status_of(error) == status)
        described[status] = {"model": Problem, "description": codes}
    return described


TOO_LARGE: Final[dict[int | str, dict[str, Any]]] = {
    413: {"model": Problem, "description": "`request_too_large` The body is larger than the service takes"}
}
"""What a route that takes a body may answer besides."""


def install(app: FastAPI, on_refusal: Callable[[Request, str], None]) -> None:
    """Answer every failure of the app with a problem; ``on_refusal`` hears the request and the code."""

    def answer(request: Request, problem: Problem, headers: Mapping[str, str] | None = None) -> Response:
        on_refusal(request, problem.code)
        return response(problem, headers)

    async def fuseline_error(request: Request, error: FuselineError) -> Response:
        problem = of_error(error, request.url.path)
        if problem.incident:
            level = logging.WARNING if error.retryable else logging.ERROR
            _log.log(level, "incident %s: %s: %s", problem.incident, error.code, error)
        return answer(request, problem)

    async def validation_error(request: Request, error: RequestValidationError) -> Response:
        return answer(request, of_error(FieldsInvalid(*_field_problems(error.errors())), request.url.path))

    async def http_error(request: Request, error: HTTPException) -> Response:
        return answer(request, _of_http(error, request.url.path), error.headers)

    async def unforeseen(request: Request, error: Exception) -> Response:
        problem = of_error(FuselineError(), request.url.path)
        _log.error("incident %s: %s %s", problem.incident, request.method, request.url.path, exc_info=error)
        return answer(request, problem)

    # Starlette looks a handler up by the error's class, so each gets what it names
    handlers: dict[type[Exception], Any] = {
        FuselineError: fuseline_error,
        RequestValidationError: validation_error,
        HTTPException: http_error,
        Exception: unforeseen,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)


def _of_http(error: HTTPException, instance: str) -> Problem:
    code = _HTTP_CODES.get(error.status_code, f"http_{error.status_code}")
    return Problem(
        type=f"urn:fuseline:problem:{code}",
        title=code.replace("_", " ").capitalize(),
        status=error.status_code,
        detail=error.detail,
        instance=instance,
        code=code,
        retryable=False,
    )


def _field_problems(errors: Sequence[Mapping[str, Any]]) -> list[FieldProblem]:
    return [FieldProblem(field=_path(error["loc"]), message=_message(error)) for error in errors[:_SHOWN_ERRORS]]


def _path(place: Sequence[str | int]) -> str:
    """Join a location without its first part, which says body, path, query or header."""
    return ".".join(str(part)[:80] for part in place[1:]) or str(place[0])


def _message(error: Mapping[str, Any]) -> str:
    if error["type"] == "json_invalid":
        return f"the body is not JSON: {error['ctx']['error']}"
    return str(error["msg"]).removeprefix("Value error, ")


def _joined(errors: Sequence[FieldProblem]) -> str:
    return "; ".join(f"{error.field}: {error.message}" for error in errors)


def _title(error: type[FuselineError]) -> str:
    return (error.__doc__ or error.__name__).strip().splitlines()[0].rstrip(".").replace("``", "")


def _incident() -> str:
    return secrets.token_hex(6)
