"""Jobs: submit, look, cancel."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Annotated

from fastapi import APIRouter, Header, Response, status

from api.context import Caller, Context, Parts
from api.problems import TOO_LARGE, FieldProblem, FieldsInvalid, responses
from api.resolve import resolve
from api.schemas import SubmitRequest
from api.views import Accepted, ImageView, JobView, ResolvedJob
from core.errors import (
    IdempotencyConflict,
    InvalidPromptTag,
    InvalidRequest,
    JobNotFound,
    QueueFull,
    QueueUnavailable,
    Unauthorized,
    UnknownLora,
    UnknownModel,
)
from core.job import Job, JobState, NewJob

router = APIRouter(prefix="/v1/jobs", tags=["jobs"], responses=responses(Unauthorized, QueueUnavailable))

_ID = re.compile(r"[0-9a-f]{32}")
_BARE_KEY = re.compile(r"[\x20-\x7e]{1,255}")
_QUOTED_KEY = re.compile(r'"((?:[\x20\x21\x23-\x5b\x5d-\x7e]|\\["\\]){1,255})"')
_SUBMIT_ERRORS = (InvalidRequest, InvalidPromptTag, IdempotencyConflict, UnknownLora, UnknownModel, QueueFull)


@router.post(
    "",
    status_code=status.HTTP_202_ACCEPTED,
    responses=responses(Unauthorized, QueueUnavailable, *_SUBMIT_ERRORS) | TOO_LARGE,
)
def submit_job(
    asked: SubmitRequest,
    tenant: Caller,
    context: Parts,
    response: Response,
    idempotency_key: Annotated[
        str | None,
        Header(description="Makes a repeated submit the same job, for a day at most."),
    ] = None,
) -> Accepted:
    """Take a job. Everything it names is resolved now: what it draws no longer depends on when it runs."""
    key = _key(idempotency_key)
    pool, spec = resolve(asked, tenant, context)
    job = NewJob(
        id=context.new_id(),
        tenant=tenant,
        pool=pool,
        spec=spec,
        priority=asked.priority,
        max_attempts=context.limits.max_attempts,
        idempotency_key=key,
        body_hash=asked.body_hash() if key else "",
    )
    taken = context.queue.submit(job)
    if taken.replayed:
        spec = context.queue.get(tenant, taken.job_id).spec
        response.headers["Idempotency-Replayed"] = "true"
    else:
        context.tickets.send(pool)
    response.headers["Location"] = f"{router.prefix}/{taken.job_id}"
    return Accepted(id=taken.job_id, request=ResolvedJob.of(spec))


@router.get("/{job_id}", responses=responses(JobNotFound))
def read_job(job_id: str, tenant: Caller, context: Parts) -> JobView:
    """Show a job as it is now, with fresh URLs of its images."""
    return _view(context.queue.get(tenant, _checked(job_id)), context)


@router.delete(
    "/{job_id}",
    responses=responses(JobNotFound)
    | {202: {"model": JobView, "description": "It runs; its worker is asked to stop."}},
)
def cancel_job(job_id: str, tenant: Caller, context: Parts, response: Response) -> JobView:
    """Cancel a job: at once if it waits, as soon as its worker hears of it if it runs, not at all if it is over."""
    job = context.queue.cancel(tenant, _checked(job_id))
    if not job.state.is_terminal:
        response.status_code = status.HTTP_202_ACCEPTED
    return _view(job, context)


def _view(job: Job, context: Context) -> JobView:
    position = context.queue.position(job) if job.state is JobState.QUEUED else None
    expires_s = context.limits.url_expires_s
    url_expires = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=expires_s)
    images = [
        ImageView.of(image, context.store.url(image.key, expires_s=expires_s), url_expires)
        for image in (job.result.images if job.result else ())
    ]
    return JobView.of(job, position=position, images=images)


def _checked(job_id: str) -> str:
    if not _ID.fullmatch(job_id):
        msg = "no such job"
        raise JobNotFound(msg)
    return job_id


def _key(header: str | None) -> str | None:
    """Read an Idempotency-Key: a structured-field string, or bare as most clients send it."""
    if header is None:
        return None
    quoted = _QUOTED_KEY.fullmatch(header)
    if quoted:
        return re.sub(r"\\(.)", r"\1", quoted[1])
    if header.startswith('"') or not _BARE_KEY.fullmatch(header):
        message = "is no key: send 1 to 255 printable ASCII characters, bare or in double quotes"
        raise FieldsInvalid(FieldProblem(field="Idempotency-Key", message=message))
    return header
