"""Jobs and clocks for tests of the queue."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from core.job import JobResult, JobSpec, NewJob
from core.lora import LoraRef, LoraSet
from core.ports import Clock

POOL = "default"
COST = 64
"""Cost of a sample job: one step of 8 × 8 pixels."""
DONE = JobResult(worker="w1")


@dataclass
class HandClock(Clock):
    """A clock that stands until it is moved."""

    at_ms: int = 1_700_000_000_000

    def now_ms(self) -> int:
        return self.at_ms

    def forward(self, seconds: float) -> None:
        self.at_ms += round(seconds * 1000)


@dataclass
class Tokens:
    """Random parts of fences that are not random."""

    numbers: itertools.count[int] = field(default_factory=itertools.count)

    def __call__(self) -> str:
        return f"t{next(self.numbers)}"


def spec(letter: str = "a", *, steps: int = 1) -> JobSpec:
    """A small job whose group is named by a letter: equal letters, equal groups."""
    return JobSpec(
        model="shapes",
        model_digest="0" * 64,
        prompt="a red circle ✏",
        negative_prompt="",
        loras=LoraSet.of([LoraRef(digest=letter * 64)]),
        width=8,
        height=8,
        steps=steps,
        guidance=5.0,
        sampler="DPM++ 2M",
        seed=7,
        images=1,
    )


GROUPS = {letter: spec(letter).group for letter in "abcdef"}
"""Group ids by the letter that ``spec`` took."""


def new_job(
    job_id: str,
    letter: str = "a",
    *,
    tenant: str = "ada",
    steps: int = 1,
    pool: str = POOL,
    priority: int = 0,
    max_attempts: int = 3,
    key: str | None = None,
    body_hash: str = "",
) -> NewJob:
    return NewJob(
        id=job_id,
        tenant=tenant,
        pool=pool,
        spec=spec(letter, steps=steps),
        priority=priority,
        max_attempts=max_attempts,
        idempotency_key=key,
        body_hash=body_hash,
    )
