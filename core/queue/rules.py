"""What both queues agree on: the numbers and sentences of the queue's rules."""

from __future__ import annotations

import secrets
from typing import Final

from core.errors import IdempotencyConflict, InvalidRequest, JobNotFound, LeaseLost, QueueFull
from core.events import Event
from core.job import JobError
from core.scheduling import DEFAULT_SLACK_JOBS, NOMINAL_COST

SLACK: Final[float] = DEFAULT_SLACK_JOBS * NOMINAL_COST
"""Default bound on overtaking, in cost units."""

MAX_QUEUED_PER_TENANT: Final = 100_000
RESULT_TTL_S: Final[float] = 7 * 86_400
CRASHES_MAX: Final = 3
"""So many lost leases of a job that ran alone as a suspect make it a dead letter."""

PRIORITY_MAX: Final = 10
PRIORITY_CREDIT: Final = NOMINAL_COST
"""How much earlier in line one step of priority puts a job, in cost units."""

WORKER_LOST: Final = JobError(
    code="worker_lost",
    message=f"the worker was lost {CRASHES_MAX} times while it ran this job alone; change the job before trying again",
)


def credit(priority: int) -> int:
    """Cost units by which a priority puts a job earlier in line; bounded, so that nothing starves."""
    return max(-PRIORITY_MAX, min(PRIORITY_MAX, priority)) * PRIORITY_CREDIT


def random_token() -> str:
    """Draw the random part of a fence: a rewound Redis must not issue one twice."""
    return secrets.token_hex(8)


def unobserved(_event: Event, /) -> None:
    """Listen to nothing."""


def not_found(job_id: str) -> JobNotFound:
    """Say that the caller has no such job."""
    return JobNotFound(f"there is no job {job_id!r}; jobs that are over are forgotten after some days")


def conflict(job_id: str) -> IdempotencyConflict:
    """Say that an idempotency key came with another body."""
    return IdempotencyConflict(f"this idempotency key belongs to job {job_id}, which was asked for differently")


def id_taken(job_id: str) -> InvalidRequest:
    """Say that a job id is in use."""
    return InvalidRequest(f"the job id {job_id!r} is in use; draw another one")


def full(cap: int) -> QueueFull:
    """Say that the tenant's cap is reached."""
    return QueueFull(f"{cap} jobs wait already, as many as your account may have; submit again when some are done")


def lease_lost(fence: str, what: str) -> LeaseLost:
    """Say that a token is no longer the live one."""
    return LeaseLost(f"lease {fence} is no longer live for {what}; drop the work: another worker may have it")
