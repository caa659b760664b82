"""The queue of jobs in memory: the readable specification of what the scripts do, and the stand-in for tests."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from core.events import JobSubmitted, LeaseExpired, StaleFinish
from core.job import Job, JobError, JobResult, JobState, NewJob
from core.ports import Lease, Observer, PoolStats, Reaped, Submitted, WorkerInfo
from core.queue import rules
from core.queue.keys import IDEMPOTENCY_TTL_S
from core.queue.table import Ending, Held, Table
from core.scheduling import WINDOW, GroupView, Snapshot


class MemoryQueue:
    """``core.ports.JobQueue`` in one process. The arguments are those of ``RedisQueue``."""

    def __init__(
        self,
        *,
        slack: float = rules.SLACK,
        max_queued_per_tenant: int = rules.MAX_QUEUED_PER_TENANT,
        result_ttl_s: float = rules.RESULT_TTL_S,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        token: Callable[[], str] = rules.random_token,
        observe: Observer = rules.unobserved,
    ) -> None:
        self._slack = slack
        self._max_queued = max_queued_per_tenant
        self._ttl_ms = round(result_ttl_s * 1000)
        self._now_ms = now_ms
        self._token = token
        self._observe = observe
        self._lock = threading.RLock()
        self._table = Table()
        self._idempotency: dict[tuple[str, str], tuple[str, str, int]] = {}
        self._virtual_time: Counter[str] = Counter()
        self._virtual_finish: Counter[tuple[str, str]] = Counter()
        self._workers: dict[str, tuple[WorkerInfo, int]] = {}
        self._pools: set[str] = set()
        self._seq = self._fence = 0

    # --- for those who submit ------------------------------------------------------------------------------------

    def submit(self, job: NewJob) -> Submitted:
        """Take a job. Raises ``IdempotencyConflict``, ``QueueFull``, and ``InvalidRequest`` if another has its id."""
        with self._lock:
            known = self._known(job)
            if known is not None:
                return Submitted(known, replayed=True)
            waiting = self._table.select(JobState.QUEUED, JobState.DELAYED)
            if sum(other.tenant == job.tenant for other in waiting) >= self._max_queued:
                raise rules.full(self._max_queued)
            self._enter(job)
        self._observe(JobSubmitted(job.id, job.pool, job.spec.group))
        return Submitted(job.id, replayed=False)

    def _known(self, job: NewJob) -> str | None:
        """Find the job that this submit made before, by its idempotency key or its id."""
        if job.idempotency_key is not None and (job.tenant, job.idempotency_key) in self._idempotency:
            job_id, body_hash, until_ms = self._idempotency[job.tenant, job.idempotency_key]
            if until_ms > self._now_ms():
                if body_hash != job.body_hash:
                    raise rules.conflict(job_id)
                return job_id
        if job.id not in self._table.jobs:
            return None
        if self._table.jobs[job.id].tenant != job.tenant:
            raise rules.id_taken(job.id)
        return job.id

    def _enter(self, job: NewJob) -> None:
        now, self._seq = self._now_ms(), self._seq + 1
        start = max(self._virtual_time[job.pool], self._virtual_finish[job.pool, job.tenant])
        self._virtual_finish[job.pool, job.tenant] = start + job.spec.cost
        self._pools.add(job.pool)
        if job.idempotency_key is not None:
            until_ms = now + min(IDEMPOTENCY_TTL_S * 1000, self._ttl_ms)
            self._idempotency[job.tenant, job.idempotency_key] = (job.id, job.body_hash, until_ms)
        self._table.jobs[job.id] = Job(
            id=job.id,
            tenant=job.tenant,
            pool=job.pool,
            group=job.spec.group,
            spec=job.spec,
            state=JobState.QUEUED,
            priority=job.priority,
            tag=float(start - rules.credit(job.priority)),
            seq=self._seq,
            max_attempts=job.max_attempts,
            created_ms=now,
            ready_ms=now,
        )

    def get(self, tenant: str, job_id: str) -> Job:
        """Read a job of that tenant. Raises ``JobNotFound``."""
        with self._lock:
            job = self._table.jobs.get(job_id)
            if job is not None and job.state.is_terminal and job.finished_ms + self._ttl_ms <= self._now_ms():
                del self._table.jobs[job_id]
                job = None
            if job is None or job.tenant != tenant:
                raise rules.not_found(job_id)
            return job

    def position(self, job: Job) -> int | None:
        """How many ready jobs of its pool are older, or ``None`` when it is not ready."""
        with self._lock:
            ids = [ready.id for ready in self._table.line(job.pool)]
            return ids.index(job.id) if job.id in ids else None

    def cancel(self, tenant: str, job_id: str) -> Job:
        """Cancel at once if it waits, ask its worker if it runs, leave it if it is over. Raises ``JobNotFound``."""
        with self._lock:
            job = self.get(tenant, job_id)
            if job.state is JobState.RUNNING:
                self._table.change(self._now_ms(), job, cancel_requested=True)
            elif not job.state.is_terminal:
                self._table.change(self._now_ms(), job, JobState.CANCELLED, cancel_requested=True)
            return self._table.jobs[job_id]

    # --- for workers ---------------------------------------------------------------------------------------------

    def snapshot(self, pool: str) -> Snapshot:
        """Show the groups of the oldest ready jobs."""
        with self._lock:
            views: dict[str, GroupView] = {}
            worst = 0.0
            for job in self._table.line(pool)[:WINDOW]:
                if job.group in views:
                    view = views[job.group]
                    views[job.group] = replace(view, ready=view.ready + 1)
                else:
                    others = sum(held.pool == pool and held.group == job.group for held in self._table.held.values())
                    views[job.group] = GroupView(job.group, job.tag, job.seq, 1, worst, others, job.suspect)
                worst = max(worst, job.overtaken_by)
            return Snapshot(tuple(views.values()))

    def claim(self, pool: str, group: str, *, worker: str, limit: int, request_id: str, lease_s: float) -> Lease | None:
        """Lease up to ``limit`` (≥ 1) jobs of a group, oldest first; ``None`` if it may not be taken now."""
        with self._lock:
            now = self._now_ms()
            expires_ms, token = now + round(lease_s * 1000), self._token()
            for fence, held in self._table.held.items():
                if held.request_id == request_id:
                    self._table.held[fence] = replace(held, expires_ms=expires_ms)
                    return self._table.lease(fence)
            line = self._table.line(pool)
            batch, overtaken = self._batch(line[:WINDOW], group, limit)
            if not batch:
                return None
            for job_id, cost in overtaken.items():
                passed = self._table.jobs[job_id]
                self._table.change(self._now_ms(), passed, overtaken_by=passed.overtaken_by + cost)
            share = sum(job.spec.cost for job in batch) // len({job.tenant for job in line})
            self._virtual_time[pool] = max(self._virtual_time[pool] + share, int(line[0].tag))
            self._fence += 1
            fence = f"{self._fence}-{token}"
            self._table.held[fence] = Held(pool, group, worker, request_id, expires_ms)
            for job in batch:
                run = {"attempt": job.attempt + 1, "started_ms": now, "fence": fence, "worker": worker}
                self._table.change(self._now_ms(), job, JobState.RUNNING, progress=0.0, **run)
            return self._table.lease(fence)

    def _batch(self, window: Iterable[Job], group: str, limit: int) -> tuple[list[Job], dict[str, int]]:
        """Choose the jobs to lease; tell by id what cost passes each older job that stays."""
        batch: list[Job] = []
        overtaken: dict[str, int] = {}
        for job in window:
            if job.group != group:
                overtaken[job.id] = 0
                continue
            if any(self._table.jobs[other].overtaken_by + cost >= self._slack for other, cost in overtaken.items()):
                break
            if job.suspect and batch:
                break
            batch.append(job)
            overtaken = {other: cost + job.spec.cost for other, cost in overtaken.items()}
            if job.suspect or len(batch) == limit:
                break
        return batch, overtaken

    def heartbeat(self, fence: str, *, lease_s: float, progress: Mapping[str, float]) -> frozenset[str]:
        """Renew a lease, store progress (0 to 1 by job id), and learn which of its jobs are to be cancelled."""
        with self._lock:
            if fence not in self._table.held:
                raise rules.lease_lost(fence, "a heartbeat")
            self._table.held[fence] = replace(
                self._table.held[fence], expires_ms=self._now_ms() + round(lease_s * 1000)
            )
            for job in self._table.jobs_of(fence):
                self._table.change(self._now_ms(), job, progress=float(progress.get(job.id, job.progress)))
            return frozenset(job.id for job in self._table.jobs_of(fence) if job.cancel_requested)

    def finish(self, fence: str, job_id: str, result: JobResult) -> None:
        """End a job as succeeded. The same call again, its first reply lost, is no error."""
        with self._lock:
            if not self._repeated("finish", fence, job_id):
                job = self._running(fence, job_id)
                self._end("finish", job, JobState.SUCCEEDED, result=result, progress=1.0)

    def fail(self, fence: str, job_id: str, error: JobError, *, retry_in_s: float | None) -> JobState:
        """End a run as failed: retried after a delay while attempts are left and ``retry_in_s`` is given."""
        with self._lock:
            if not self._repeated("fail", fence, job_id):
                job = self._running(fence, job_id)
                if retry_in_s is None or job.attempt >= job.max_attempts:
                    self._end("fail", job, JobState.FAILED, error=error, suspect=False)
                elif job.cancel_requested:
                    self._end("fail", job, JobState.CANCELLED, error=error, suspect=False)
                else:
                    due_ms = self._now_ms() + round(retry_in_s * 1000)
                    self._end("fail", job, JobState.DELAYED, error=error, suspect=False, due_ms=due_ms, progress=0.0)
            return self._table.endings[job_id].state

    def finish_cancelled(self, fence: str, job_id: str) -> None:
        """End a job as cancelled, as its owner asked."""
        with self._lock:
            if not self._repeated("cancelled", fence, job_id):
                self._end("cancelled", self._running(fence, job_id), JobState.CANCELLED)

    def release(self, fence: str, job_ids: Sequence[str]) -> None:
        """Give jobs back to their old place in line without counting an attempt."""
        with self._lock:
            fresh = [job_id for job_id in dict.fromkeys(job_ids) if not self._repeated("release", fence, job_id)]
            jobs = [self._table.jobs.get(job_id) for job_id in fresh]
            if any(job is None or job.fence != fence for job in jobs):
                raise rules.lease_lost(fence, "all of " + ", ".join(job_ids))
            for job in jobs:
                assert job is not None
                state = JobState.CANCELLED if job.cancel_requested else JobState.QUEUED
                self._end("release", job, state, attempt=job.attempt - 1)

    def _repeated(self, verb: str, fence: str, job_id: str) -> bool:
        ending = self._table.endings.get(job_id)
        return ending is not None and (ending.fence, ending.verb) == (fence, verb)

    def _running(self, fence: str, job_id: str) -> Job:
        job = self._table.jobs.get(job_id)
        if job is None or job.fence != fence:
            self._observe(StaleFinish(job_id, job.pool if job else ""))
            raise rules.lease_lost(fence, f"job {job_id}")
        return job

    def _end(self, verb: str, job: Job, state: JobState, **fields: Any) -> None:
        self._table.endings[job.id] = Ending(job.fence, verb, state)
        self._table.change(self._now_ms(), job, state, **fields)

    # --- for upkeep ----------------------------------------------------------------------------------------------

    def reap(self, *, limit: int = 100) -> tuple[Reaped, ...]:
        """Take back leases that have expired. Any number of callers is harmless."""
        with self._lock:
            now = self._now_ms()
            expired = sorted(
                (held.expires_ms, fence) for fence, held in self._table.held.items() if held.expires_ms <= now
            )
            return tuple(self._reap(fence) for _, fence in expired[:limit])

    def _reap(self, fence: str) -> Reaped:
        pool, jobs = self._table.held[fence].pool, self._table.jobs_of(fence)
        self._observe(LeaseExpired(pool, len(jobs)))
        self._table.leases_expired[pool] += 1
        for job in jobs:
            alone = int(job.suspect)  # a suspect runs alone: its crash, its attempt
            blame = {"suspect": True, "crashes": job.crashes + alone, "attempt": job.attempt - 1 + alone}
            if job.cancel_requested:
                self._table.change(self._now_ms(), job, JobState.CANCELLED, **blame)
            elif job.crashes + alone >= rules.CRASHES_MAX:
                self._table.change(self._now_ms(), job, JobState.FAILED, error=rules.WORKER_LOST, **blame)
            else:
                self._table.change(self._now_ms(), job, JobState.QUEUED, **blame)
        by_state = {
            state: tuple(job.id for job in jobs if self._table.jobs[job.id].state is state)
            for state in (JobState.QUEUED, JobState.FAILED)
        }
        return Reaped(fence, pool, by_state[JobState.QUEUED], by_state[JobState.FAILED])

    def promote(self, *, limit: int = 100) -> int:
        """Put delayed jobs that are due back in line; say how many."""
        with self._lock:
            due = [job for job in self._table.select(JobState.DELAYED) if job.due_ms <= self._now_ms()]
            due = sorted(due, key=lambda job: (job.due_ms, job.id))[:limit]
            for job in due:
                self._table.change(self._now_ms(), job, JobState.QUEUED)
            return len(due)

    def see_worker(self, info: WorkerInfo, *, ttl_s: float) -> None:
        """Enter or renew a worker in the registry; what is ``None`` stays as it was."""
        with self._lock:
            now = self._now_ms()
            was, until_ms = self._workers.get(info.id, (info, now))
            if until_ms > now:
                fused = was.fused if info.fused is None else info.fused
                info = replace(info, fused=fused, model=was.model if info.model is None else info.model)
            self._workers[info.id] = (replace(info, seen_ms=now), now + round(ttl_s * 1000))

    def forget_worker(self, worker: str) -> None:
        """Take a worker out of the registry."""
        with self._lock:
            self._workers.pop(worker, None)

    def workers(self) -> tuple[WorkerInfo, ...]:
        """List the workers whose entry has not lapsed, by id."""
        with self._lock:
            now = self._now_ms()
            return tuple(self._workers[name][0] for name in sorted(self._workers) if self._workers[name][1] > now)

    def stats(self) -> tuple[PoolStats, ...]:
        """Count, by pool."""
        with self._lock:
            return tuple(self._stats(pool) for pool in sorted(self._pools))

    def _stats(self, pool: str) -> PoolStats:
        line = self._table.line(pool)
        states = Counter(job.state for job in self._table.jobs.values() if job.pool == pool)
        return PoolStats(
            pool=pool,
            queued=len(line),
            delayed=states[JobState.DELAYED],
            running=states[JobState.RUNNING],
            groups=len({job.group for job in line}),
            leases=sum(held.pool == pool for held in self._table.held.values()),
            oldest_ready_s=max(0, self._now_ms() - line[0].ready_ms) / 1000 if line else 0.0,
            leases_expired=self._table.leases_expired[pool],
            dead_letters=self._table.dead_letters[pool],
        )

    def ping(self) -> None:
        """Answer."""
