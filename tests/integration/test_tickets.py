"""Tickets through a real broker, and the upkeep that keeps them level."""

from __future__ import annotations

import json
import logging
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

import pytest
import redis

from cli.embedded import running_valkey
from core.errors import QueueUnavailable
from core.job import JobError
from core.ports import PoolStats, WorkerInfo
from core.queue.memory import MemoryQueue
from core.queue.tickets import TASK_NAME, TICKETS_MAX, TicketOffice, make_celery, queue_name
from core.queue.upkeep import UpkeepThread, tick, tickets_wanted
from tests.queue_samples import GROUPS, POOL, HandClock, new_job


@pytest.fixture
def office(redis_url: str) -> Iterator[TicketOffice]:
    office = TicketOffice(redis_url)
    yield office
    office.close()


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        yield client


class Levels:
    """Remembers to what level the tickets were brought."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    def level(self, pool: str, want: int) -> bool:
        self.asked.append((pool, want))
        return True


# --- tickets ----------------------------------------------------------------------------------------------------


def test_a_ticket_is_a_small_message_in_the_pools_list(office: TicketOffice, client: redis.Redis) -> None:
    # If
    sent = office.send("gpu")

    # Expect
    assert sent
    messages: list[str] = client.lrange("tickets.gpu", 0, -1)  # type: ignore[assignment]
    (message,) = messages
    assert json.loads(message)["headers"]["task"] == TASK_NAME
    assert len(message) < 1024 + 512


def test_tickets_are_topped_up_and_never_taken_away(office: TicketOffice) -> None:
    for want, expected in ((3, 3), (2, 3), (0, 3), (5, 5)):
        office.level("gpu", want)
        assert office.waiting("gpu") == expected


def test_one_call_sends_only_so_many_tickets(office: TicketOffice) -> None:
    office.level("gpu", 10 * TICKETS_MAX)

    assert office.waiting("gpu") == TICKETS_MAX


def test_a_burst_of_submits_leaves_one_ticket_not_a_heap(office: TicketOffice) -> None:
    for _ in range(20):
        office.send("gpu")

    assert office.waiting("gpu") == 1


def test_tickets_outlive_a_broker_that_forgot_everything(office: TicketOffice, client: redis.Redis) -> None:
    # routes that a broker forgets would swallow messages in silence; tickets need none
    office.send("gpu")
    client.flushall()

    assert office.send("gpu")
    assert office.waiting("gpu") == 1


def test_a_celery_consumer_of_the_pool_gets_the_ticket(office: TicketOffice, redis_url: str) -> None:
    # Given
    office.send("gpu")
    app = make_celery(redis_url, "gpu")
    got: list[str] = []

    # If
    with app.connection_for_read() as connection, connection.channel() as channel:
        queue = app.amqp.queues[queue_name("gpu")]
        message = queue.bind(channel).get(no_ack=True)
        got.append(message.headers["task"])

    # Expect
    assert got == [TASK_NAME]
    assert office.waiting("gpu") == 0


@pytest.mark.parametrize("trouble", [signal.SIGSTOP, signal.SIGKILL])
def test_no_trouble_of_the_broker_reaches_the_one_who_submits(tmp_path: Path, trouble: signal.Signals) -> None:
    with running_valkey(tmp_path) as broker:
        # Given an office that has sent a ticket
        office = TicketOffice(broker.url)
        assert office.send("gpu")

        # If
        assert broker.process is not None
        broker.process.send_signal(trouble)
        started = monotonic()
        sent = office.send("gpu")
        seconds = monotonic() - started
        broker.process.send_signal(signal.SIGCONT)
        office.close()

        # Expect
        assert not sent
        assert seconds < 2


def test_celery_is_set_up_so_that_tickets_are_only_hints(redis_url: str) -> None:
    conf = make_celery(redis_url, "gpu").conf

    assert conf.task_default_queue == "tickets.gpu"
    assert (conf.accept_content, conf.task_serializer) == (["json"], "json")
    assert not conf.task_acks_late
    assert conf.task_ignore_result
    assert conf.result_backend is None
    assert conf.worker_disable_prefetch
    assert conf.worker_prefetch_multiplier == 1
    assert (conf.worker_pool, conf.worker_pool_start_method, conf.worker_concurrency) == ("prefork", "spawn", 1)
    assert conf.worker_proc_alive_timeout == 180
    assert conf.broker_transport_options["socket_timeout"] == 5.0


# --- how many ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("queued", "idle", "busy", "wanted"),
    [
        pytest.param(0, 3, 0, 0, id="no work, no ticket"),
        pytest.param(9, 3, 1, 3, id="one for each idle worker"),
        pytest.param(2, 3, 0, 2, id="but none without a job for it"),
        pytest.param(9, 0, 4, 1, id="one in reserve while all are busy"),
        pytest.param(9, 0, 0, 1, id="and before any worker is known"),
    ],
)
def test_there_is_a_ticket_for_each_idle_worker_that_has_work(queued: int, idle: int, busy: int, wanted: int) -> None:
    stats = PoolStats(POOL, queued=queued, delayed=0, running=0, groups=1, leases=0, oldest_ready_s=0)
    workers = [WorkerInfo(f"i{n}", POOL) for n in range(idle)]
    workers += [WorkerInfo(f"b{n}", POOL, busy=True) for n in range(busy)]
    workers += [WorkerInfo("elsewhere", "other")]

    assert tickets_wanted(stats, workers) == wanted


# --- upkeep -----------------------------------------------------------------------------------------------------


def test_a_round_takes_back_leases_then_retries_then_levels_tickets() -> None:
    # Given a lease that was lost, a retry that is due, and an idle worker beside the one that is registered as busy
    clock, levels = HandClock(), Levels()
    queue = MemoryQueue(now_ms=clock.now_ms)
    for name, letter in (("lost", "a"), ("due", "b")):
        queue.submit(new_job(name, letter))
        lease = queue.claim(POOL, GROUPS[letter], worker="w1", limit=1, request_id=name, lease_s=10)
        if letter == "b":
            assert lease is not None
            queue.fail(lease.fence, name, JobError(code="x", message="x"), retry_in_s=5)
    clock.forward(10)
    for worker, busy in (("w1", True), ("w2", False), ("w3", False)):
        queue.see_worker(WorkerInfo(worker, POOL, busy=busy), ttl_s=10)

    # If
    done = tick(queue, levels)

    # Expect
    assert [reaped.requeued for reaped in done.reaped] == [("lost",)]
    assert done.promoted == 1
    assert levels.asked == [(POOL, 2)]
    assert tick(queue, levels).reaped == ()


def test_a_pool_without_ready_jobs_gets_no_ticket() -> None:
    queue, levels = MemoryQueue(), Levels()
    queue.submit(new_job("j1"))
    queue.cancel("ada", "j1")

    assert tick(queue, levels).wanted == {POOL: 0}
    assert levels.asked == []


class AwayThenBack(MemoryQueue):
    """Cannot be reached for its first rounds; tells when a round went through."""

    def __init__(self, failures: int) -> None:
        super().__init__()
        self.failures = failures
        self.went_through = threading.Event()

    def promote(self, *, limit: int = 100) -> int:
        self.failures -= 1
        if self.failures >= 0:
            msg = "Redis is away"
            raise QueueUnavailable(msg)
        self.went_through.set()
        return super().promote(limit=limit)


def test_upkeep_outlives_an_outage_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    # Given
    caplog.set_level(logging.INFO, logger="core.queue.upkeep")
    queue = AwayThenBack(failures=3)
    thread = UpkeepThread(queue, Levels(), period_s=0.001)

    # If
    thread.start()
    came_back = queue.went_through.wait(10)
    thread.stop()

    # Expect
    assert came_back
    assert not thread.is_alive()
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


def test_waits_are_jittered_around_the_period() -> None:
    # Given
    asked: list[tuple[float, float]] = []
    queue = AwayThenBack(failures=0)

    def draw(low: float, high: float) -> float:
        asked.append((low, high))
        return low

    thread = UpkeepThread(queue, Levels(), period_s=0.001, draw=draw)

    # If
    thread.start()
    assert queue.went_through.wait(10)
    thread.stop()

    # Expect
    assert set(asked) == {(0.75, 1.25)}


def test_a_thread_that_never_started_can_be_stopped() -> None:
    UpkeepThread(MemoryQueue(), Levels()).stop()
