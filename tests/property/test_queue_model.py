"""The scripts on a real server against the twin in memory, step by step, by a clock that the test moves."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule, run_state_machine_as_test

from core.errors import FuselineError
from core.job import Job, JobError, JobState, NewJob
from core.ports import JobQueue, Lease, WorkerInfo
from core.queue import keys
from core.queue.job_hash import job_from_hash
from core.queue.memory import MemoryQueue
from core.queue.redis import RedisQueue
from core.scheduling import choose
from tests.queue_samples import COST, DONE, GROUPS, HandClock, Tokens, new_job

SLACK = 2 * COST
STEPS_MAX = 3
LEASE_S = 10.0
CAP = 8
OOPS = JobError(code="engine_failed", message="no", retryable=True)

tenants = st.sampled_from(["ada", "bob", "eve"])
letters = st.sampled_from("abc")
pools = st.sampled_from(["default", "default", "default", "big"])
picks = st.integers(min_value=0, max_value=7)

Held = tuple[str, tuple[str, ...]]
"""A fence that was given out and the jobs that it covered."""

Indexes = dict[str, list[str] | dict[str, int]]
"""Lines and leases, and hashes of counters, by the name of their key."""


class QueueMachine(RuleBasedStateMachine):
    """Does the same to both queues; they must answer alike and look alike after each step."""

    jobs: Bundle[tuple[str, str]] = Bundle("jobs")
    leases: Bundle[Held] = Bundle("leases")
    requests: Bundle[tuple[str, str, str]] = Bundle("requests")

    def __init__(self, client: redis.Redis, reached: Counter[str]) -> None:
        super().__init__()
        client.flushdb()
        self.client = client
        self.reached = reached
        self.clock = HandClock()
        how: dict[str, Any] = {"slack": SLACK, "max_queued_per_tenant": CAP, "now_ms": self.clock.now_ms}
        self.real = RedisQueue(client, token=Tokens(), **how)
        self.twin = MemoryQueue(token=Tokens(), **how)
        self.numbers = itertools.count()
        self.owners: dict[str, str] = {}
        self.fences: list[int] = []
        self.running: dict[str, tuple[str, str]] = {}

    def name(self, kind: str) -> str:
        return f"{kind}{next(self.numbers)}"

    def both(self, call: Callable[[JobQueue], Any]) -> Any:
        """Do something to both queues; give the answer that they agree on, or the error."""
        answers = []
        for queue in (self.real, self.twin):
            try:
                answers.append(call(queue))
            except FuselineError as error:
                answers.append((type(error), str(error)))
        assert answers[0] == answers[1]
        return answers[0]

    # --- submit and cancel ---------------------------------------------------------------------------------------

    def submit(self, job: NewJob) -> Any:
        answer = self.both(lambda queue: queue.submit(job))
        if isinstance(answer, tuple):
            self.reached[answer[0].__name__] += 1
            return multiple()
        self.owners.setdefault(answer.job_id, job.tenant)
        return (job.tenant, answer.job_id)

    @rule(target=jobs, tenant=tenants, pool=pools, letters=st.lists(letters, min_size=1, max_size=6))
    def submit_some(self, tenant: str, pool: str, letters: list[str]) -> Any:
        submitted = [self.submit(new_job(self.name("j"), letter, tenant=tenant, pool=pool)) for letter in letters]
        return multiple(*(job for job in submitted if isinstance(job, tuple)))

    @rule(
        target=jobs,
        tenant=tenants,
        letter=letters,
        how=st.fixed_dictionaries(
            {
                "steps": st.integers(1, STEPS_MAX),
                "priority": st.sampled_from([0, -1, 1, 99]),
                "max_attempts": st.integers(1, 3),
                "key": st.sampled_from([None, "k1", "k2"]),
                "body_hash": st.sampled_from(["", "f00"]),
            }
        ),
    )
    def submit_special(self, tenant: str, letter: str, how: dict[str, Any]) -> Any:
        return self.submit(new_job(self.name("j"), letter, tenant=tenant, **how))

    @rule(job=jobs)
    def cancel(self, job: tuple[str, str]) -> None:
        self.both(lambda queue: queue.cancel(*job))

    @rule(tenant=tenants, job=jobs)
    def read_another(self, tenant: str, job: tuple[str, str]) -> None:
        self.both(lambda queue: queue.get(tenant, job[1]))

    # --- claim ---------------------------------------------------------------------------------------------------

    def claim(self, pool: str, group: str, worker: str, limit: int, request: str) -> Any:
        how: dict[str, Any] = {"worker": worker, "limit": limit, "request_id": request, "lease_s": LEASE_S}
        lease = self.both(lambda queue: queue.claim(pool, group, **how))
        if lease is None:
            self.reached["refused"] += any(view.group == group for view in self.twin.snapshot(pool).groups)
            return multiple()
        self.watch(lease)
        return (lease.fence, tuple(job.id for job in lease.jobs))

    def watch(self, lease: Lease) -> None:
        number = int(lease.fence.split("-")[0])
        if number not in self.fences:
            assert number > max(self.fences, default=0)
            self.fences.append(number)
        assert len({job.group for job in lease.jobs}) == 1
        assert len(lease.jobs) == 1 or not any(job.suspect for job in lease.jobs)

    @rule(target=leases, pool=pools, letter=letters, limit=st.integers(1, 3))
    def claim_any(self, pool: str, letter: str, limit: int) -> Any:
        return self.claim(pool, GROUPS[letter], "w1", limit, self.name("r"))

    @rule(target=leases, pool=pools, letter=letters, limit=st.integers(1, 3))
    def claim_by_policy(self, pool: str, letter: str, limit: int) -> Any:
        snapshot = self.both(lambda queue: queue.snapshot(pool))
        group = choose(snapshot, fused=GROUPS[letter], slack=SLACK)
        if group is None:
            return multiple()
        held = self.claim(pool, group, "w2", limit, self.name("r"))
        assert isinstance(held, tuple), "what the policy chose from a fresh snapshot can be claimed"
        return held

    @rule(target=leases, letter=letters, request=st.sampled_from(["again1", "again2"]))
    def claim_again(self, letter: str, request: str) -> Any:
        return self.claim("default", GROUPS[letter], "w3", 2, request)

    # --- fenced calls, also with fences that are long gone -------------------------------------------------------

    @rule(held=leases, share=st.floats(0, 1))
    def heartbeat(self, held: Held, share: float) -> None:
        fence, ids = held
        progress = dict.fromkeys(ids, share)
        self.both(lambda queue: queue.heartbeat(fence, lease_s=LEASE_S, progress=progress))

    @rule(held=leases, pick=picks)
    def finish(self, held: Held, pick: int) -> None:
        fence, ids = held
        self.both(lambda queue: queue.finish(fence, ids[pick % len(ids)], DONE))

    @rule(held=leases, pick=picks, retry_in_s=st.sampled_from([None, 0.0, 5.0, 5.0]))
    def fail(self, held: Held, pick: int, retry_in_s: float | None) -> None:
        fence, ids = held
        self.both(lambda queue: queue.fail(fence, ids[pick % len(ids)], OOPS, retry_in_s=retry_in_s))

    @rule(held=leases, pick=picks)
    def finish_cancelled(self, held: Held, pick: int) -> None:
        fence, ids = held
        self.both(lambda queue: queue.finish_cancelled(fence, ids[pick % len(ids)]))

    @rule(held=leases, pick=picks)
    def release(self, held: Held, pick: int) -> None:
        fence, ids = held
        self.both(lambda queue: queue.release(fence, ids[pick % len(ids) :]))

    # --- time and upkeep -----------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.001, 1.0, 4.0, 6.0, 700.0]))
    def wait(self, seconds: float) -> None:
        self.clock.forward(seconds)

    @rule(limit=st.integers(1, 3))
    def reap(self, limit: int) -> None:
        self.both(lambda queue: queue.reap(limit=limit))

    @rule(limit=st.integers(1, 3))
    def promote(self, limit: int) -> None:
        self.both(lambda queue: queue.promote(limit=limit))

    @rule(pool=pools, times=st.sampled_from([1, 1, 1, 4]))
    def workers_die_on_the_head(self, pool: str, times: int) -> None:
        for _ in range(times):
            views = self.twin.snapshot(pool).groups
            if views:
                self.claim(pool, views[0].group, "w4", 2, self.name("r"))
            self.clock.forward(LEASE_S)
            self.both(lambda queue: queue.reap())

    @rule(
        worker=st.sampled_from(["w1", "w2"]),
        busy=st.booleans(),
        fused=st.sampled_from([None, "g1", ""]),
        ttl_s=st.sampled_from([600.0, 4000.0]),  # real lifetimes: the server's own clock must not come near them
    )
    def see_worker(self, worker: str, busy: bool, fused: str | None, ttl_s: float) -> None:
        info = WorkerInfo(worker, "default", busy=busy, fused=fused)
        self.both(lambda queue: queue.see_worker(info, ttl_s=ttl_s))

    @rule(worker=st.sampled_from(["w1", "w2"]))
    def forget_worker(self, worker: str) -> None:
        self.both(lambda queue: queue.forget_worker(worker))

    # --- what always holds ---------------------------------------------------------------------------------------

    @invariant()
    def everything_holds(self) -> None:
        stored, indexes = self.read_server()
        self.both_look_alike(stored)
        self.every_job_is_in_exactly_one_place(stored, indexes)
        counted = {name: found for name, found in indexes.items() if isinstance(found, dict)}
        assert counted == expected_counters(stored)
        for job in stored:
            self.reached[job.state] += 1
            assert job.overtaken_by < SLACK + STEPS_MAX * COST
            self.reached["overtaken to the limit"] += job.overtaken_by >= SLACK
            self.reached["dead"] += job.error is not None and job.error.code == "worker_lost"

    def both_look_alike(self, stored: Sequence[Job]) -> None:
        self.both(lambda queue: queue.stats())
        self.both(lambda queue: queue.workers())
        self.both(lambda queue: queue.snapshot("default"))
        self.both(lambda queue: queue.snapshot("big"))
        assert {job.id: job for job in stored} == {name: self.twin.get(who, name) for name, who in self.owners.items()}
        for job in stored[-1:]:
            self.both(lambda queue, job=job: queue.position(job))  # type: ignore[misc]

    def every_job_is_in_exactly_one_place(self, stored: Sequence[Job], indexes: Indexes) -> None:
        places: dict[str, set[str]] = {}
        for name, entries in indexes.items():
            if name.startswith(("ready:", "lj:")) or name == "delayed":
                for entry in entries:
                    places.setdefault(entry.rsplit(":", 1)[-1], set()).add(name)
        for job in stored:
            expected = {
                JobState.QUEUED: {f"ready:{job.pool}"},
                JobState.DELAYED: {"delayed"},
                JobState.RUNNING: {f"lj:{job.fence}"},
            }
            assert places.pop(job.id, set()) == expected.get(job.state, set())
        assert places == {}
        assert {f"lj:{fence}" for fence in indexes.get("leases", ())} == {n for n in indexes if n.startswith("lj:")}

    def read_server(self) -> tuple[list[Job], Indexes]:
        """Read every job by its hash, and every line, lease and hash of counters by its name."""
        with self.client.pipeline(transaction=False) as pipe:
            for job_id in self.owners:
                pipe.hgetall(f"{keys.PREFIX}j:{job_id}")
            pipe.keys(keys.PREFIX + "*")
            *jobs, found = pipe.execute()
            names = [name.removeprefix(keys.PREFIX) for name in found]
            lines = [n for n in names if n.startswith(("ready:", "lj:")) or n in {"delayed", "leases"}]
            hashes = [n for n in names if n.startswith(("groups:", "lined:", "count:", "taken:"))]
            hashes += [n for n in names if n in {"waiting", "inflight"}]
            for name in lines:
                pipe.zrange(keys.PREFIX + name, 0, -1)
            for name in hashes:
                pipe.hgetall(keys.PREFIX + name)
            answers = pipe.execute()
        indexes: Indexes = dict(zip(lines, answers, strict=False))
        for name, counters in zip(hashes, answers[len(lines) :], strict=True):
            indexes[name] = {field: int(number) for field, number in counters.items()}
        return [job_from_hash(fields) for fields in jobs], indexes


def expected_counters(jobs: Sequence[Job]) -> dict[str, dict[str, int]]:
    """Count afresh what the server counts as it goes. A counter of 0 is not there."""
    counters: dict[str, Counter[str]] = {}

    def add(name: str, field: str) -> None:
        counters.setdefault(name, Counter())[field] += 1

    for job in jobs:
        if job.state is JobState.QUEUED:
            add(f"groups:{job.pool}", job.group)
            add(f"lined:{job.pool}", job.tenant)
        if job.state in {JobState.QUEUED, JobState.DELAYED}:
            add("waiting", job.tenant)
        if job.state in {JobState.DELAYED, JobState.RUNNING}:
            add(f"count:{job.pool}", str(job.state))
        if job.state is JobState.RUNNING:
            add("inflight", job.tenant)
    for pool, group, _fence in {(job.pool, job.group, job.fence) for job in jobs if job.fence}:
        add(f"taken:{pool}", group)
        add(f"count:{pool}", "leases")
    return {name: dict(counter) for name, counter in counters.items()}


@contextmanager
def unsynced(client: redis.Redis) -> Iterator[None]:
    """Let the server leave syncing to the system: no step here is about power cuts."""
    client.config_set("appendfsync", "no")
    try:
        yield
    finally:
        client.config_set("appendfsync", "always")


def explore(redis_url: str, *, examples: int, steps: int) -> Counter[str]:
    """Run random histories; count by name the rarer things that they came through."""
    reached: Counter[str] = Counter()
    with redis.Redis.from_url(redis_url, decode_responses=True) as client, unsynced(client):
        run_state_machine_as_test(
            lambda: QueueMachine(client, reached),  # type: ignore[arg-type]  # any factory will do
            settings=settings(
                max_examples=examples,
                stateful_step_count=steps,
                deadline=None,
                print_blob=True,
                suppress_health_check=list(HealthCheck),
            ),
        )
    return reached


RARE = {*JobState, "refused", "overtaken to the limit", "dead", "QueueFull", "IdempotencyConflict"}


@pytest.mark.timeout(400)
def test_the_scripts_do_what_the_twin_does(redis_url: str) -> None:
    reached = explore(redis_url, examples=150, steps=60)

    assert {name for name in RARE if reached[name]} == RARE


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_scripts_do_what_the_twin_does_for_long(redis_url: str) -> None:
    reached = explore(redis_url, examples=500, steps=120)

    assert {name for name in RARE if reached[name]} == RARE
