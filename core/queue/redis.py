"""The queue of jobs in Redis. Each call is one script of ``scripts/``: see there for what it keeps true."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import redis

from core.events import JobSubmitted, LeaseExpired, StaleFinish
from core.job import Job, JobError, JobResult, JobState, NewJob
from core.ports import Lease, Observer, PoolStats, Reaped, Submitted, WorkerInfo
from core.queue import keys, rules
from core.queue.connection import connect, once_more
from core.queue.job_hash import job_from_hash, pairs
from core.queue.scripts import Scripts
from core.scheduling import WINDOW, GroupView, Snapshot


class RedisQueue:
    """``core.ports.JobQueue`` on one Redis or Valkey server. Safe to share between threads.

    ``source`` is a URL or a client made by ``connection.connect``. ``slack`` is in cost units (steps × pixels ×
    images). ``now_ms`` and ``token`` replace the server's clock and the random part of fences, for tests. No call
    takes longer than two ``timeout_s`` on a server that hangs: it raises ``QueueUnavailable``.
    """

    def __init__(
        self,
        source: str | redis.Redis,
        *,
        slack: float = rules.SLACK,
        max_queued_per_tenant: int = rules.MAX_QUEUED_PER_TENANT,
        result_ttl_s: float = rules.RESULT_TTL_S,
        timeout_s: float = 0.8,
        prefix: str = keys.PREFIX,
        now_ms: Callable[[], int] | None = None,
        token: Callable[[], str] = rules.random_token,
        observe: Observer = rules.unobserved,
    ) -> None:
        self.client = connect(source, timeout_s=timeout_s) if isinstance(source, str) else source
        self._scripts = Scripts(self.client, prefix)
        self._prefix = prefix
        self._slack = slack
        self._max_queued = max_queued_per_tenant
        self._ttl_ms = _ms(result_ttl_s)
        self._now_ms = now_ms
        self._token = token
        self._observe = observe

    # --- for those who submit ------------------------------------------------------------------------------------

    def submit(self, job: NewJob) -> Submitted:
        """Take a job. Raises ``IdempotencyConflict``, ``QueueFull``, and ``InvalidRequest`` if another has its id."""
        idem = "" if job.idempotency_key is None else hashlib.sha256(job.idempotency_key.encode()).hexdigest()
        outcome, *rest = self._run(
            "submit",
            *(job.id, job.tenant, job.pool, job.spec.group, job.spec.to_json()),
            *(job.spec.cost, rules.credit(job.priority), job.priority, job.max_attempts),
            *(job.body_hash, idem, min(_ms(keys.IDEMPOTENCY_TTL_S), self._ttl_ms), self._max_queued),
        )
        if outcome == "conflict":
            raise rules.conflict(rest[0])
        if outcome == "taken":
            raise rules.id_taken(job.id)
        if outcome == "full":
            raise rules.full(self._max_queued)
        if outcome == "new":
            self._observe(JobSubmitted(job.id, job.pool, job.spec.group))
        return Submitted(rest[0], replayed=outcome == "replay")

    def get(self, tenant: str, job_id: str) -> Job:
        """Read a job of that tenant. Raises ``JobNotFound``."""
        name = keys.JOB.at(self._prefix, job_id)
        fields: Any = once_more(lambda: self.client.hgetall(name))
        if fields.get("tenant") != tenant:
            raise rules.not_found(job_id)
        return job_from_hash(fields)

    def position(self, job: Job) -> int | None:
        """How many ready jobs of its pool are older, or ``None`` when it is not ready."""
        line, member = keys.READY.at(self._prefix, job.pool), keys.member(job.seq, job.id)
        rank: Any = once_more(lambda: self.client.zrank(line, member))
        return None if rank is None else int(rank)

    def cancel(self, tenant: str, job_id: str) -> Job:
        """Cancel at once if it waits, ask its worker if it runs, leave it if it is over. Raises ``JobNotFound``."""
        fields = self._run("cancel", tenant, job_id, self._ttl_ms)
        if fields is None:
            raise rules.not_found(job_id)
        return job_from_hash(pairs(fields))

    # --- for workers ---------------------------------------------------------------------------------------------

    def snapshot(self, pool: str) -> Snapshot:
        """Show the groups of the oldest ready jobs."""
        return Snapshot(
            tuple(
                GroupView(group, float(tag), int(seq), int(ready), float(overtaken), int(others), suspect == "1")
                for group, tag, seq, ready, overtaken, others, suspect in self._run("snapshot", pool, WINDOW)
            )
        )

    def claim(self, pool: str, group: str, *, worker: str, limit: int, request_id: str, lease_s: float) -> Lease | None:
        """Lease up to ``limit`` (≥ 1) jobs of a group, oldest first; ``None`` if it may not be taken now."""
        answer = self._run(
            "claim",
            *(pool, group, worker, limit, request_id, _ms(lease_s)),
            *(self._token(), self._slack, WINDOW, _ms(keys.REQUEST_GRACE_S)),
        )
        if answer is None:
            return None
        fence, group, expires, *jobs = answer
        return Lease(fence, pool, group, tuple(job_from_hash(pairs(fields)) for fields in jobs), int(expires))

    def heartbeat(self, fence: str, *, lease_s: float, progress: Mapping[str, float]) -> frozenset[str]:
        """Renew a lease, store progress (0 to 1 by job id), and learn which of its jobs are to be cancelled."""
        steps: list[str | float] = []
        for job_id, done in progress.items():
            steps += [job_id, float(done)]
        outcome, *ids = self._run("heartbeat", fence, _ms(lease_s), _ms(keys.REQUEST_GRACE_S), *steps)
        if outcome == "stale":
            raise rules.lease_lost(fence, "a heartbeat")
        return frozenset(ids)

    def finish(self, fence: str, job_id: str, result: JobResult) -> None:
        """End a job as succeeded. The same call again, its first reply lost, is no error."""
        self._fenced("finish", fence, job_id, self._ttl_ms, result.model_dump_json())

    def fail(self, fence: str, job_id: str, error: JobError, *, retry_in_s: float | None) -> JobState:
        """End a run as failed: retried after a delay while attempts are left and ``retry_in_s`` is given."""
        delay = "" if retry_in_s is None else _ms(retry_in_s)
        return JobState(self._fenced("fail", fence, job_id, self._ttl_ms, error.model_dump_json(), delay))

    def finish_cancelled(self, fence: str, job_id: str) -> None:
        """End a job as cancelled, as its owner asked."""
        self._fenced("cancelled", fence, job_id, self._ttl_ms)

    def release(self, fence: str, job_ids: Sequence[str]) -> None:
        """Give jobs back to their old place in line without counting an attempt."""
        if self._run("release", fence, self._ttl_ms, *dict.fromkeys(job_ids))[0] == "stale":
            raise rules.lease_lost(fence, "all of " + ", ".join(job_ids))

    # --- for upkeep ----------------------------------------------------------------------------------------------

    def reap(self, *, limit: int = 100) -> tuple[Reaped, ...]:
        """Take back leases that have expired. Any number of callers is harmless."""
        error = rules.WORKER_LOST.model_dump_json()
        taken = self._run("reap", limit, self._ttl_ms, rules.CRASHES_MAX, error)
        for _, pool, requeued, failed, cancelled in taken:
            self._observe(LeaseExpired(pool, len(requeued) + len(failed) + len(cancelled)))
        return tuple(Reaped(fence, pool, tuple(requeued), tuple(failed)) for fence, pool, requeued, failed, _ in taken)

    def promote(self, *, limit: int = 100) -> int:
        """Put delayed jobs that are due back in line; say how many."""
        return int(self._run("promote", limit))

    def see_worker(self, info: WorkerInfo, *, ttl_s: float) -> None:
        """Enter or renew a worker in the registry; what is ``None`` stays as it was."""
        fields: dict[str, str | int] = {"pool": info.pool, "busy": int(info.busy)}
        fields |= {name: value for name in ("fused", "model") if (value := getattr(info, name)) is not None}
        self._run("see", info.id, _ms(ttl_s), *itertools.chain.from_iterable(fields.items()))

    def forget_worker(self, worker: str) -> None:
        """Take a worker out of the registry."""
        self._run("forget", worker)

    def workers(self) -> tuple[WorkerInfo, ...]:
        """List the workers whose entry has not lapsed, by id."""
        entries = map(pairs, self._run("workers", keys.WORKERS_MAX))
        return tuple(
            WorkerInfo(e["id"], e["pool"], e["busy"] == "1", e.get("fused"), e.get("model"), int(e["seen_ms"]))
            for e in entries
        )

    def stats(self) -> tuple[PoolStats, ...]:
        """Count, by pool. O(pools). ``tickets`` is the broker's to know: see ``TicketOffice.waiting``."""
        return tuple(
            PoolStats(pool, queued, delayed, running, groups, leases, int(age_ms) / 1000, 0, expired, dead)
            for pool, queued, delayed, running, groups, leases, age_ms, expired, dead in self._run("stats")
        )

    def ping(self) -> None:
        """Raise ``QueueUnavailable`` unless the queue answers."""
        once_more(self.client.ping)

    def _fenced(self, verb: str, fence: str, job_id: str, *args: str | float) -> str:
        outcome, detail = self._run(verb, fence, job_id, *args)
        if outcome == "stale":
            self._observe(StaleFinish(job_id, detail))
            raise rules.lease_lost(fence, f"job {job_id}")
        return str(detail)

    def _run(self, verb: str, *args: str | float) -> Any:
        """Run a script; every one of them may be repeated, so a broken connection is tried again once."""
        now = "" if self._now_ms is None else str(self._now_ms())
        return once_more(lambda: self._scripts.run(verb, now, *args))


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
