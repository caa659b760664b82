"""The state of the queue in memory: jobs, the leases on them, and how a job passes from one state to the next."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from core.job import Job, JobState
from core.ports import Lease


@dataclass(frozen=True, slots=True)
class Held:
    """A live lease, its jobs apart: those are the running jobs with its fence."""

    pool: str
    group: str
    worker: str
    request_id: str
    expires_ms: int


@dataclass(frozen=True, slots=True)
class Ending:
    """The call that ended a job's last lease: the same call again, its reply lost, is no error."""

    fence: str
    verb: str
    state: JobState


@dataclass(slots=True)
class Table:
    """Jobs by id and leases by fence. Lines and counts are not kept: they are read off the jobs."""

    jobs: dict[str, Job] = field(default_factory=dict)
    held: dict[str, Held] = field(default_factory=dict)
    endings: dict[str, Ending] = field(default_factory=dict)
    leases_expired: Counter[str] = field(default_factory=Counter)
    """By pool, ever."""
    dead_letters: Counter[str] = field(default_factory=Counter)
    """By pool, ever."""

    def select(self, *states: JobState) -> list[Job]:
        """List the jobs that are in one of these states."""
        return [job for job in self.jobs.values() if job.state in states]

    def line(self, pool: str) -> list[Job]:
        """List a pool's ready jobs, oldest first: by fair tag, equal tags by order of submission."""
        ready = (job for job in self.select(JobState.QUEUED) if job.pool == pool)
        return sorted(ready, key=lambda job: (job.tag, job.seq))

    def jobs_of(self, fence: str) -> tuple[Job, ...]:
        """List the jobs of a lease, oldest first."""
        running = (job for job in self.select(JobState.RUNNING) if job.fence == fence)
        return tuple(sorted(running, key=lambda job: (job.tag, job.seq)))

    def lease(self, fence: str) -> Lease:
        """Give a live lease as its holder sees it."""
        held = self.held[fence]
        return Lease(fence, held.pool, held.group, self.jobs_of(fence), held.expires_ms)

    def change(self, now_ms: int, job: Job, state: JobState | None = None, **fields: Any) -> None:
        """Replace a job. Entering a state sets what belongs to it; a lease ends with its last job."""
        if state is not None:
            entered: dict[str, Any] = {"state": state, "fence": ""}
            if state is JobState.QUEUED:
                entered |= {"ready_ms": now_ms, "due_ms": 0, "progress": 0.0}
            elif state.is_terminal:
                entered |= {"finished_ms": now_ms}
                self.dead_letters[job.pool] += state is JobState.FAILED
            fields = entered | fields
        self.jobs[job.id] = replace(job, **fields)
        if job.fence and not self.jobs_of(job.fence):
            del self.held[job.fence]
