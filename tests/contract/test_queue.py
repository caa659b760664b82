"""What every queue of jobs does. Runs over Redis and over the twin in memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from core.errors import IdempotencyConflict, InvalidRequest, JobNotFound, LeaseLost, QueueFull
from core.events import Event, JobSubmitted, LeaseExpired, StaleFinish
from core.job import Job, JobError, JobState
from core.ports import JobQueue, Lease, WorkerInfo
from core.queue.memory import MemoryQueue
from core.queue.redis import RedisQueue
from core.scheduling import WINDOW
from tests.queue_samples import COST, DONE, GROUPS, POOL, HandClock, new_job

OOM = JobError(code="engine_out_of_memory", message="too large")

MakeQueue = Callable[..., JobQueue]
_numbers = itertools.count()


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def events() -> list[Event]:
    return []


@pytest.fixture(params=["memory", "redis"])
def make_queue(request: pytest.FixtureRequest, clock: HandClock, events: list[Event]) -> Iterator[MakeQueue]:
    opened: list[RedisQueue] = []

    def make(**settings: Any) -> JobQueue:
        settings = {"now_ms": clock.now_ms, "observe": events.append} | settings
        if request.param == "memory":
            return MemoryQueue(**settings)
        queue = RedisQueue(request.getfixturevalue("redis_url"), **settings)
        opened.append(queue)
        return queue

    yield make
    for queue in opened:
        queue.client.close()


@pytest.fixture
def queue(make_queue: MakeQueue) -> JobQueue:
    return make_queue()


def claim(
    queue: JobQueue, letter: str = "a", *, limit: int = 4, worker: str = "w1", request: str = "", lease_s: float = 10
) -> Lease | None:
    request_id = request or f"request-{next(_numbers)}"
    return queue.claim(POOL, GROUPS[letter], worker=worker, limit=limit, request_id=request_id, lease_s=lease_s)


def claimed(queue: JobQueue, letter: str = "a", **how: Any) -> Lease:
    lease = claim(queue, letter, **how)
    assert lease is not None
    return lease


def ids(lease: Lease | None) -> list[str]:
    return [job.id for job in lease.jobs] if lease else []


def job_of(queue: JobQueue, job_id: str, tenant: str = "ada") -> Job:
    return queue.get(tenant, job_id)


# --- submit -----------------------------------------------------------------------------------------------------


def test_a_submitted_job_can_be_read_as_it_was_given(queue: JobQueue, clock: HandClock, events: list[Event]) -> None:
    # Given
    asked = new_job("j1", "b", steps=3, priority=2, max_attempts=5)

    # If
    answer = queue.submit(asked)

    # Expect
    job = job_of(queue, "j1")
    assert (answer.job_id, answer.replayed) == ("j1", False)
    assert (job.spec, job.state, job.priority, job.max_attempts) == (asked.spec, JobState.QUEUED, 2, 5)
    assert (job.group, job.created_ms, job.attempt) == (GROUPS["b"], clock.at_ms, 0)
    assert events == [JobSubmitted("j1", POOL, GROUPS["b"])]


def test_another_tenants_job_is_not_found(queue: JobQueue) -> None:
    queue.submit(new_job("j1", tenant="ada"))

    for call in (queue.get, queue.cancel):
        with pytest.raises(JobNotFound, match="j1"):
            call("bob", "j1")
    assert job_of(queue, "j1").state is JobState.QUEUED


def test_the_same_idempotency_key_gives_the_first_job(queue: JobQueue, events: list[Event]) -> None:
    queue.submit(new_job("j1", key="order-1", body_hash="f00"))

    answer = queue.submit(new_job("j2", key="order-1", body_hash="f00"))

    assert (answer.job_id, answer.replayed) == ("j1", True)
    assert queue.stats()[0].queued == 1
    assert len(events) == 1


def test_the_same_idempotency_key_with_another_body_is_refused(queue: JobQueue) -> None:
    queue.submit(new_job("j1", key="order-1", body_hash="f00"))

    with pytest.raises(IdempotencyConflict, match="j1"):
        queue.submit(new_job("j2", key="order-1", body_hash="ba7"))
    with pytest.raises(JobNotFound):
        job_of(queue, "j2")


@pytest.mark.parametrize(("result_ttl_s", "lives_s"), [(60, 60), (7 * 86_400, 86_400)])
def test_an_idempotency_key_is_forgotten_before_its_job(
    make_queue: MakeQueue, clock: HandClock, result_ttl_s: int, lives_s: int
) -> None:
    # Given
    queue = make_queue(result_ttl_s=result_ttl_s)
    queue.submit(new_job("j1", key="order-1", body_hash="f00"))

    # Expect
    if isinstance(queue, RedisQueue):  # its server does not follow a clock that is moved by hand
        (name,) = queue.client.scan_iter(match="fuse:idem:*")
        assert lives_s - 10 < queue.client.ttl(name) <= lives_s
    else:
        clock.forward(lives_s - 1)
        assert queue.submit(new_job("j2", key="order-1", body_hash="f00")).replayed
        clock.forward(1)
        assert not queue.submit(new_job("j3", key="order-1", body_hash="f00")).replayed


def test_tenants_do_not_share_idempotency_keys(queue: JobQueue) -> None:
    queue.submit(new_job("j1", tenant="a:b", key="c"))

    assert not queue.submit(new_job("j2", tenant="a", key="b:c")).replayed


def test_the_same_submit_again_is_one_job(queue: JobQueue) -> None:
    # the reply to the first was lost on its way
    queue.submit(new_job("j1"))

    assert queue.submit(new_job("j1")).replayed
    assert queue.stats()[0].queued == 1


def test_an_id_of_another_tenants_job_is_refused(queue: JobQueue) -> None:
    queue.submit(new_job("j1", tenant="ada"))

    with pytest.raises(InvalidRequest, match="j1"):
        queue.submit(new_job("j1", tenant="bob"))


def test_a_tenant_may_have_only_so_many_jobs_waiting(make_queue: MakeQueue) -> None:
    # Given a cap that is reached, with a job that runs beside it
    queue = make_queue(max_queued_per_tenant=2)
    queue.submit(new_job("j1"))
    claimed(queue, limit=1)
    queue.submit(new_job("j2"))
    queue.submit(new_job("j3"))

    # If, Expect
    with pytest.raises(QueueFull, match="2 jobs"):
        queue.submit(new_job("j4"))
    assert queue.submit(new_job("j5", tenant="bob")).job_id == "j5"
    queue.cancel("ada", "j2")
    assert queue.submit(new_job("j4")).job_id == "j4"


# --- the line ---------------------------------------------------------------------------------------------------


def test_tenants_take_turns(queue: JobQueue) -> None:
    # Given one who submits three jobs before the other submits two
    for number in range(3):
        queue.submit(new_job(f"a{number}", tenant="ada"))
    for number in range(2):
        queue.submit(new_job(f"b{number}", tenant="bob"))

    # Expect
    assert ids(claimed(queue, limit=9)) == ["a0", "b0", "a1", "b1", "a2"]


def test_a_tenant_of_dear_jobs_gets_fewer_of_them(queue: JobQueue) -> None:
    for number in range(4):
        queue.submit(new_job(f"dear{number}", tenant="ada", steps=3))
    for number in range(4):
        queue.submit(new_job(f"cheap{number}", tenant="bob", steps=1))

    assert ids(claimed(queue, limit=6)) == ["dear0", "cheap0", "cheap1", "cheap2", "dear1", "cheap3"]


def test_priority_moves_a_job_forward_and_charges_no_later_job(queue: JobQueue) -> None:
    # Given
    queue.submit(new_job("plain"))
    queue.submit(new_job("urgent", priority=1))
    queue.submit(new_job("next"))

    # Expect
    assert [queue.position(job_of(queue, name)) for name in ("urgent", "plain", "next")] == [0, 1, 2]
    assert job_of(queue, "next").tag == job_of(queue, "plain").tag + 2 * COST


def test_priority_is_bounded(queue: JobQueue) -> None:
    queue.submit(new_job("j1", tenant="ada", priority=10))
    queue.submit(new_job("j2", tenant="bob", priority=1_000_000))

    assert job_of(queue, "j1").tag == job_of(queue, "j2", "bob").tag


def test_newcomers_cannot_keep_a_tenants_second_job_waiting_for_ever(queue: JobQueue) -> None:
    # Given a tenant whose second job starts one share later
    queue.submit(new_job("first", "a"))
    queue.submit(new_job("second", "a"))
    claimed(queue, "a", limit=1)

    # If each claim is followed by a tenant that was never seen before
    served = []
    for number in range(5):
        queue.submit(new_job(f"n{number}", "a", tenant=f"t{number}"))
        served += ids(claimed(queue, "a", limit=1))

    # Expect
    assert "second" in served


def test_position_counts_older_jobs_and_ends_with_the_wait(queue: JobQueue) -> None:
    queue.submit(new_job("j1", "a"))
    queue.submit(new_job("j2", "b"))

    assert queue.position(job_of(queue, "j2")) == 1
    claimed(queue, "a")
    assert queue.position(job_of(queue, "j1")) is None
    assert queue.position(job_of(queue, "j2")) == 0


def test_a_snapshot_shows_groups_by_their_oldest_job(queue: JobQueue) -> None:
    # Given
    for number, letter in enumerate("abba"):
        queue.submit(new_job(f"j{number}", letter))
    claimed(queue, "b", limit=1, worker="w2")

    # If
    first, second = queue.snapshot(POOL).groups

    # Expect
    assert (first.group, first.ready, first.others, first.overtaken_ahead) == (GROUPS["a"], 2, 0, 0.0)
    assert (second.group, second.ready, second.others, second.overtaken_ahead) == (GROUPS["b"], 1, 1, float(COST))
    assert (second.head_seq, second.head_tag) == (job_of(queue, "j2").seq, job_of(queue, "j2").tag)
    assert not second.suspect
    assert queue.snapshot("another").groups == ()


def test_only_the_oldest_jobs_are_looked_at(make_queue: MakeQueue) -> None:
    queue = make_queue(slack=1e15)
    for number in range(WINDOW):
        queue.submit(new_job(f"a{number:03}", "a"))
    queue.submit(new_job("b", "b"))

    assert claim(queue, "b") is None
    assert [view.ready for view in queue.snapshot(POOL).groups] == [WINDOW]
    claimed(queue, "a", limit=1)
    assert ids(claim(queue, "b")) == ["b"]


# --- claim ------------------------------------------------------------------------------------------------------


def test_a_claim_leases_jobs_of_one_group_oldest_first(queue: JobQueue, clock: HandClock) -> None:
    # Given
    for number, letter in enumerate("abaaa"):
        queue.submit(new_job(f"j{number}", letter))
    clock.forward(3)

    # If
    lease = claimed(queue, "a", limit=3, worker="w7", lease_s=5)

    # Expect
    assert ids(lease) == ["j0", "j2", "j3"]
    assert (lease.pool, lease.group, lease.expires_ms) == (POOL, GROUPS["a"], clock.at_ms + 5000)
    for job in lease.jobs:
        assert (job.state, job.attempt, job.worker, job.fence) == (JobState.RUNNING, 1, "w7", lease.fence)
        assert (job.started_ms, job.ready_ms) == (clock.at_ms, clock.at_ms - 3000)
        assert job == job_of(queue, job.id)


def test_a_claim_of_a_group_without_ready_jobs_gives_nothing(queue: JobQueue) -> None:
    queue.submit(new_job("j1", "a"))

    assert claim(queue, "b") is None
    claimed(queue, "a")
    assert claim(queue, "a") is None


def test_the_same_request_gives_the_same_lease_while_it_lives(queue: JobQueue, clock: HandClock) -> None:
    # Given
    queue.submit(new_job("j1"))
    queue.submit(new_job("j2"))
    first = claimed(queue, limit=1, request="r1")

    # If the reply was lost and the call comes again
    clock.forward(1)
    again = claimed(queue, limit=1, request="r1")

    # Expect
    assert (again.fence, ids(again)) == (first.fence, ["j1"])
    assert again.expires_ms == first.expires_ms + 1000
    assert job_of(queue, "j1").attempt == 1
    queue.finish(first.fence, "j1", DONE)
    assert ids(claimed(queue, limit=1, request="r1")) == ["j2"]


def test_fences_rise_and_end_in_something_random(queue: JobQueue) -> None:
    queue.submit(new_job("j1"))
    queue.submit(new_job("j2"))

    numbers, tails = zip(*(claimed(queue, limit=1).fence.split("-") for _ in range(2)), strict=True)

    assert [int(number) for number in numbers] == [1, 2]
    assert len(set(tails)) == 2


# --- the bound on overtaking ------------------------------------------------------------------------------------


def test_later_jobs_of_another_group_may_overtake_only_up_to_the_slack(make_queue: MakeQueue) -> None:
    # Given
    queue = make_queue(slack=3 * COST)
    queue.submit(new_job("old", "a"))
    for number in range(9):
        queue.submit(new_job(f"b{number}", "b"))

    # If
    overtaking = ids(claim(queue, "b", limit=2)) + ids(claim(queue, "b", limit=2)) + ids(claim(queue, "b", limit=2))

    # Expect
    assert overtaking == ["b0", "b1", "b2"]
    assert job_of(queue, "old").overtaken_by == 3 * COST
    assert claim(queue, "b") is None
    assert ids(claim(queue, "a")) == ["old"]
    assert ids(claim(queue, "b", limit=1)) == ["b3"]


def test_no_slack_is_arrival_order(make_queue: MakeQueue) -> None:
    queue = make_queue(slack=0)
    for number, letter in enumerate("aba"):
        queue.submit(new_job(f"j{number}", letter))

    assert claim(queue, "b") is None
    assert ids(claim(queue, "a")) == ["j0"]
    assert claim(queue, "a") is None
    assert ids(claim(queue, "b")) == ["j1"]


def test_a_stream_of_new_tenants_in_one_group_cannot_starve_a_job(make_queue: MakeQueue) -> None:
    # Given a job, and a worker that would rather go on with another group
    queue = make_queue(slack=10 * COST)
    queue.submit(new_job("patient", "a"))

    # If new tenants keep joining that group, all at the pool's virtual time
    overtaking = 0
    for number in range(50):
        queue.submit(new_job(f"n{number}", "b", tenant=f"t{number}"))
        overtaking += claim(queue, "b", limit=1) is not None

    # Expect
    assert overtaking == 10
    assert ids(claim(queue, "a")) == ["patient"]


def test_the_cost_of_a_batch_counts_only_against_jobs_older_than_each_of_it(queue: JobQueue) -> None:
    for number, letter in enumerate("bacb"):
        queue.submit(new_job(f"j{number}", letter, steps=number + 1))

    claimed(queue, "b")

    assert [job_of(queue, name).overtaken_by for name in ("j1", "j2")] == [4.0 * COST, 4.0 * COST]


def test_a_job_that_comes_back_keeps_what_overtook_it(queue: JobQueue) -> None:
    queue.submit(new_job("j1", "a"))
    queue.submit(new_job("j2", "b"))
    claimed(queue, "b")
    lease = claimed(queue, "a")

    queue.release(lease.fence, ["j1"])

    assert job_of(queue, "j1").overtaken_by == COST


# --- while it runs ----------------------------------------------------------------------------------------------


def test_a_heartbeat_renews_the_lease_and_stores_progress(queue: JobQueue, clock: HandClock) -> None:
    # Given
    queue.submit(new_job("j1"))
    queue.submit(new_job("other", tenant="bob"))
    lease = claimed(queue, limit=1, lease_s=10)

    # If
    clock.forward(9)
    answer = queue.heartbeat(lease.fence, lease_s=10, progress={"j1": 0.25, "other": 0.9, "nobody": 0.5})

    # Expect
    assert answer == frozenset()
    assert job_of(queue, "j1").progress == 0.25
    assert job_of(queue, "other", "bob").progress == 0.0
    clock.forward(9)
    assert queue.reap() == ()
    clock.forward(1)
    assert [reaped.fence for reaped in queue.reap()] == [lease.fence]


def test_a_heartbeat_tells_which_jobs_are_to_be_cancelled(queue: JobQueue) -> None:
    queue.submit(new_job("j1"))
    queue.submit(new_job("j2"))
    lease = claimed(queue)

    job = queue.cancel("ada", "j2")

    assert (job.state, job.cancel_requested) == (JobState.RUNNING, True)
    assert queue.heartbeat(lease.fence, lease_s=10, progress={}) == {"j2"}
    queue.finish_cancelled(lease.fence, "j2")
    assert job_of(queue, "j2").state is JobState.CANCELLED
    assert queue.heartbeat(lease.fence, lease_s=10, progress={}) == frozenset()


# --- the end of a run -------------------------------------------------------------------------------------------


def test_a_finished_job_keeps_its_result_until_it_is_forgotten(
    make_queue: MakeQueue, clock: HandClock, request: pytest.FixtureRequest
) -> None:
    # Given
    queue = make_queue(result_ttl_s=60)
    queue.submit(new_job("j1"))
    lease = claimed(queue)

    # If
    clock.forward(2)
    queue.finish(lease.fence, "j1", DONE)

    # Expect
    job = job_of(queue, "j1")
    assert (job.state, job.result, job.progress, job.fence) == (JobState.SUCCEEDED, DONE, 1.0, "")
    assert (job.finished_ms, job.worker) == (clock.at_ms, "w1")
    if isinstance(queue, RedisQueue):  # its server does not follow a clock that is moved by hand
        assert 0 < queue.client.pttl("fuse:j:j1") <= 60_000
    else:
        clock.forward(60)
        with pytest.raises(JobNotFound):
            job_of(queue, "j1")


def test_the_same_finish_again_is_no_error(queue: JobQueue, events: list[Event]) -> None:
    # the reply to the first was lost on its way
    queue.submit(new_job("j1"))
    lease = claimed(queue)
    queue.finish(lease.fence, "j1", DONE)

    queue.finish(lease.fence, "j1", DONE)

    assert not any(isinstance(event, StaleFinish) for event in events)


def test_a_failed_run_is_tried_again_after_its_delay(queue: JobQueue, clock: HandClock) -> None:
    # Given
    queue.submit(new_job("j1", "a"))
    queue.submit(new_job("j2", "b"))
    lease = claimed(queue, "a")
    tag = lease.jobs[0].tag

    # If
    state = queue.fail(lease.fence, "j1", OOM, retry_in_s=5)

    # Expect
    job = job_of(queue, "j1")
    assert (state, job.state, job.error, job.fence) == (JobState.DELAYED, JobState.DELAYED, OOM, "")
    assert job.due_ms == clock.at_ms + 5000
    assert queue.stats()[0].delayed == 1
    clock.forward(4.999)
    assert queue.promote() == 0
    clock.forward(0.001)
    assert queue.promote() == 1
    assert queue.position(job_of(queue, "j1")) == 0
    assert job_of(queue, "j1").tag == tag
    assert claimed(queue, "a").jobs[0].attempt == 2


def test_a_failed_run_without_a_retry_or_attempts_left_ends_the_job(queue: JobQueue, clock: HandClock) -> None:
    queue.submit(new_job("once", max_attempts=1))
    queue.submit(new_job("never"))
    lease = claimed(queue)

    assert queue.fail(lease.fence, "once", OOM, retry_in_s=1) is JobState.FAILED
    assert queue.fail(lease.fence, "never", OOM, retry_in_s=None) is JobState.FAILED
    assert (job_of(queue, "never").error, job_of(queue, "never").finished_ms) == (OOM, clock.at_ms)


def test_the_same_fail_again_gives_the_same_answer(queue: JobQueue, clock: HandClock) -> None:
    queue.submit(new_job("j1"))
    lease = claimed(queue)
    queue.fail(lease.fence, "j1", OOM, retry_in_s=1)
    clock.forward(1)
    queue.promote()

    assert queue.fail(lease.fence, "j1", OOM, retry_in_s=1) is JobState.DELAYED
    assert job_of(queue, "j1").state is JobState.QUEUED


def test_released_jobs_return_to_their_old_place_uncounted(queue: JobQueue) -> None:
    # Given
    for number in range(4):
        queue.submit(new_job(f"j{number}"))
    lease = claimed(queue, limit=3)

    # If
    queue.release(lease.fence, ["j2", "j1", "j1"])

    # Expect
    assert [job_of(queue, f"j{number}").attempt for number in range(4)] == [1, 0, 0, 0]
    assert ids(claimed(queue)) == ["j1", "j2", "j3"]
    queue.finish(lease.fence, "j0", DONE)


def test_release_gives_back_all_of_its_jobs_or_none(queue: JobQueue) -> None:
    queue.submit(new_job("j1"))
    queue.submit(new_job("j2"))
    lease = claimed(queue)
    queue.finish(lease.fence, "j1", DONE)

    with pytest.raises(LeaseLost, match=lease.fence):
        queue.release(lease.fence, ["j2", "j1"])
    assert job_of(queue, "j2").state is JobState.RUNNING


@pytest.mark.parametrize("end", ["release", "fail", "expire"])
def test_a_job_that_its_owner_gave_up_does_not_run_again(queue: JobQueue, clock: HandClock, end: str) -> None:
    # Given
    queue.submit(new_job("j1"))
    lease = claimed(queue)
    queue.cancel("ada", "j1")

    # If
    if end == "release":
        queue.release(lease.fence, ["j1"])
    elif end == "fail":
        assert queue.fail(lease.fence, "j1", OOM, retry_in_s=1) is JobState.CANCELLED
    else:
        clock.forward(10)
        assert queue.reap()[0].requeued == ()

    # Expect
    assert job_of(queue, "j1").state is JobState.CANCELLED
    assert queue.stats()[0].leases == 0


def test_a_waiting_job_is_cancelled_at_once_and_a_finished_one_stays(queue: JobQueue, clock: HandClock) -> None:
    # Given one delayed, one queued, one done
    for name in ("delayed", "done", "queued"):
        queue.submit(new_job(name))
    lease = claimed(queue, limit=2)
    queue.fail(lease.fence, "delayed", OOM, retry_in_s=1)
    queue.finish(lease.fence, "done", DONE)

    # If
    states = {name: queue.cancel("ada", name).state for name in ("delayed", "done", "queued")}

    # Expect
    assert states == {
        "delayed": JobState.CANCELLED,
        "done": JobState.SUCCEEDED,
        "queued": JobState.CANCELLED,
    }
    clock.forward(1)
    assert queue.promote() == 0
    assert claim(queue) is None


# --- lost leases ------------------------------------------------------------------------------------------------


def test_a_stale_token_changes_nothing(queue: JobQueue, clock: HandClock, events: list[Event]) -> None:
    # Given a lease that was taken back and its job running elsewhere
    queue.submit(new_job("j1"))
    stale = claimed(queue, worker="w1").fence
    clock.forward(10)
    queue.reap()
    live = claimed(queue, worker="w2").fence
    before = job_of(queue, "j1")

    # If
    for call in (
        lambda: queue.finish(stale, "j1", DONE),
        lambda: queue.fail(stale, "j1", OOM, retry_in_s=None),
        lambda: queue.finish_cancelled(stale, "j1"),
        lambda: queue.release(stale, ["j1"]),
        lambda: queue.heartbeat(stale, lease_s=100, progress={"j1": 0.5}),
        lambda: queue.finish(live, "nobody", DONE),
    ):
        with pytest.raises(LeaseLost):
            call()

    # Expect
    assert job_of(queue, "j1") == before
    assert StaleFinish("j1", POOL) in events
    queue.finish(live, "j1", DONE)


def test_jobs_of_a_lost_lease_come_back_uncharged_and_run_alone(
    queue: JobQueue, clock: HandClock, events: list[Event]
) -> None:
    # Given
    for number in range(4):
        queue.submit(new_job(f"j{number}"))
    lease = claimed(queue, limit=2)

    # If
    clock.forward(10)
    reaped = queue.reap()

    # Expect
    assert [(r.fence, r.pool, r.requeued, r.failed) for r in reaped] == [(lease.fence, POOL, ("j0", "j1"), ())]
    assert LeaseExpired(POOL, 2) in events
    job = job_of(queue, "j0")
    assert (job.state, job.suspect, job.attempt, job.crashes) == (JobState.QUEUED, True, 0, 0)
    assert queue.snapshot(POOL).groups[0].suspect
    assert [ids(claim(queue)) for _ in range(3)] == [["j0"], ["j1"], ["j2", "j3"]]


def test_a_batch_ends_before_a_suspect(queue: JobQueue, clock: HandClock) -> None:
    queue.submit(new_job("suspect"))
    claimed(queue)
    queue.submit(new_job("urgent", priority=1))
    queue.submit(new_job("later"))
    clock.forward(10)
    queue.reap()

    assert [ids(claim(queue)) for _ in range(3)] == [["urgent"], ["suspect"], ["later"]]


def test_a_job_that_kills_its_worker_three_times_alone_is_a_dead_letter(queue: JobQueue, clock: HandClock) -> None:
    # Given a job that is suspect already
    queue.submit(new_job("j1"))
    claimed(queue)
    clock.forward(10)
    queue.reap()

    # If
    outcomes = []
    for _ in range(3):
        claimed(queue)
        clock.forward(10)
        (reaped,) = queue.reap()
        outcomes.append((reaped.requeued, reaped.failed, job_of(queue, "j1").crashes))

    # Expect
    assert outcomes == [(("j1",), (), 1), (("j1",), (), 2), ((), ("j1",), 3)]
    job = job_of(queue, "j1")
    assert job.state is JobState.FAILED
    assert job.error is not None
    assert (job.error.code, job.error.retryable, job.error.blame) == ("worker_lost", False, "server")
    assert claim(queue) is None


def test_a_failure_that_a_worker_could_report_clears_suspicion(queue: JobQueue, clock: HandClock) -> None:
    queue.submit(new_job("j1"))
    claimed(queue)
    clock.forward(10)
    queue.reap()
    lease = claimed(queue)

    queue.fail(lease.fence, "j1", OOM, retry_in_s=0)

    assert not job_of(queue, "j1").suspect


def test_reap_and_promote_take_no_more_than_asked(queue: JobQueue, clock: HandClock) -> None:
    for letter in "abcdef":
        queue.submit(new_job(f"j{letter}", letter))
        lease = claimed(queue, letter)
        if letter in "ab":
            queue.fail(lease.fence, f"j{letter}", OOM, retry_in_s=1)
    clock.forward(20)

    assert [queue.promote(limit=1) for _ in range(3)] == [1, 1, 0]
    assert [len(queue.reap(limit=3)) for _ in range(3)] == [3, 1, 0]


# --- the registry, the counters ---------------------------------------------------------------------------------


def test_workers_are_listed_until_their_entry_lapses(queue: JobQueue, clock: HandClock) -> None:
    # Given
    one = WorkerInfo("w1", POOL, busy=True, fused=GROUPS["a"], model="shapes")
    queue.see_worker(one, ttl_s=10)
    queue.see_worker(WorkerInfo("w2", POOL), ttl_s=20)
    queue.see_worker(WorkerInfo("w3", POOL), ttl_s=20)

    # If, Expect
    assert queue.workers()[0] == replace(one, seen_ms=clock.at_ms)
    queue.forget_worker("w3")
    assert [worker.id for worker in queue.workers()] == ["w1", "w2"]
    clock.forward(10)
    assert [worker.id for worker in queue.workers()] == ["w2"]
    queue.see_worker(WorkerInfo("w1", POOL), ttl_s=10)
    assert [(worker.id, worker.busy) for worker in queue.workers()] == [("w1", False), ("w2", False)]


def test_what_a_worker_does_not_say_stays_as_it_was_until_it_lapses(queue: JobQueue, clock: HandClock) -> None:
    # Given its child's word on what is fused
    queue.see_worker(WorkerInfo("w1", POOL, fused=GROUPS["a"], model="m"), ttl_s=10)

    # If its parent renews the entry
    queue.see_worker(WorkerInfo("w1", POOL, busy=True), ttl_s=10)

    # Expect
    assert queue.workers() == (WorkerInfo("w1", POOL, True, GROUPS["a"], "m", clock.at_ms),)
    clock.forward(10)
    queue.see_worker(WorkerInfo("w1", POOL), ttl_s=10)
    assert queue.workers() == (WorkerInfo("w1", POOL, seen_ms=clock.at_ms),)


def test_stats_count_each_pool(queue: JobQueue, clock: HandClock) -> None:
    # Given
    queue.submit(new_job("other", pool="big"))
    for number, letter in enumerate("aabbc"):
        queue.submit(new_job(f"j{number}", letter))
    clock.forward(1.5)
    lease = claimed(queue, "a", limit=2)
    queue.fail(lease.fence, "j0", OOM, retry_in_s=60)
    clock.forward(1)

    # If
    big, default = queue.stats()

    # Expect
    assert (big.pool, big.queued, big.groups, big.running, big.leases) == ("big", 1, 1, 0, 0)
    assert (default.pool, default.queued, default.delayed, default.running) == (POOL, 3, 1, 1)
    assert (default.groups, default.leases, default.oldest_ready_s) == (2, 1, 2.5)


def test_an_empty_queue_answers(queue: JobQueue) -> None:
    queue.ping()

    assert (queue.stats(), queue.workers(), queue.reap(), queue.promote()) == ((), (), (), 0)
