"""What only the queue on a real server can show: lifetimes of keys, outages, the server's settings."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from time import monotonic

import pytest
import redis

from cli.embedded import EmbeddedValkey, running_valkey
from core.errors import QueueMisconfigured, QueueUnavailable
from core.job import JobError, JobState
from core.ports import WorkerInfo
from core.queue import keys
from core.queue.connection import check_server, connect
from core.queue.keys import Lifetime, kind_of
from core.queue.redis import RedisQueue
from core.queue.scripts import VERBS, source
from tests.queue_samples import DONE, GROUPS, POOL, new_job

OOPS = JobError(code="x", message="x")


@pytest.fixture
def queue(redis_url: str) -> Iterator[RedisQueue]:
    queue = RedisQueue(redis_url)
    yield queue
    queue.client.close()


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[EmbeddedValkey]:
    """A server that the test may torment."""
    with running_valkey(tmp_path) as server:
        yield server


def take(queue: RedisQueue, letter: str, request_id: str, lease_s: float = 30) -> str:
    lease = queue.claim(POOL, GROUPS[letter], worker="w1", limit=1, request_id=request_id, lease_s=lease_s)
    assert lease is not None
    return lease.fence


def live_through_everything(queue: RedisQueue) -> None:
    """Bring jobs to every end, and leave one in every state on the way."""
    queue.see_worker(WorkerInfo("w1", POOL), ttl_s=60)
    for letter in "abcdef":
        queue.submit(new_job(letter, letter, key=f"key-{letter}"))
    queue.finish(take(queue, "a", "r1"), "a", DONE)
    queue.fail(take(queue, "b", "r2"), "b", OOPS, retry_in_s=None)
    queue.fail(take(queue, "c", "r3"), "c", OOPS, retry_in_s=60)
    take(queue, "d", "r4")
    queue.cancel("ada", "e")


# --- keys -------------------------------------------------------------------------------------------------------


def test_every_key_is_declared_with_its_type_and_lifetime(queue: RedisQueue) -> None:
    # If
    live_through_everything(queue)

    # Expect
    names: list[str] = queue.client.keys("*")  # type: ignore[assignment]
    seen = set()
    for name in names:
        kind = kind_of(keys.PREFIX, name)
        assert kind is not None, f"{name} is not declared in core/queue/keys.py"
        assert queue.client.type(name) == kind.type, name
        assert (queue.client.pttl(name) > 0) == expires(queue, kind, name), name
        seen.add(kind.word)
    assert seen == {kind.word for kind in keys.KEYS}


def expires(queue: RedisQueue, kind: keys.Key, name: str) -> bool:
    if kind.lifetime is Lifetime.AFTER_END:
        return JobState(str(queue.client.hget(name, "state"))).is_terminal
    return kind.lifetime is Lifetime.EXPIRES


def test_nothing_lasting_is_left_when_no_job_waits_or_runs(queue: RedisQueue) -> None:
    # Given
    live_through_everything(queue)

    # If
    for letter in "cdf":
        queue.cancel("ada", letter)
    queue.finish_cancelled(queue.get("ada", "d").fence, "d")

    # Expect
    names: list[str] = queue.client.keys("*")  # type: ignore[assignment]
    lasting = [name for name in names if queue.client.pttl(name) == -1]
    kinds = {kind_of(keys.PREFIX, name) for name in lasting}
    assert {kind.lifetime for kind in kinds if kind} == {Lifetime.PERSISTENT}


def test_dead_letters_and_the_outbox_are_bounded(queue: RedisQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given
    monkeypatch.setattr(keys, "DEAD_MAX", 3)
    monkeypatch.setattr(keys, "OUT_MAX", 10)
    small = RedisQueue(queue.client)

    # If
    for number in range(60):
        small.submit(new_job(f"j{number:02}"))
        fence = take(small, "a", f"r{number}")
        small.fail(fence, f"j{number:02}", OOPS, retry_in_s=None)

    # Expect
    assert queue.client.zrange("fuse:dead", 0, -1) == ["j57", "j58", "j59"]
    assert 10 <= queue.client.xlen("fuse:out") < 180


def test_each_change_of_state_is_told_once_in_order(queue: RedisQueue) -> None:
    queue.submit(new_job("j1"))
    queue.release(take(queue, "a", "r1"), ["j1"])
    queue.finish(take(queue, "a", "r2"), "j1", DONE)

    entries: list[tuple[str, dict[str, str]]] = queue.client.xrange("fuse:out")  # type: ignore[assignment]
    assert [fields["state"] for _, fields in entries] == ["queued", "running", "queued", "running", "succeeded"]
    assert {(fields["id"], fields["pool"], fields["tenant"]) for _, fields in entries} == {("j1", POOL, "ada")}


def test_queues_of_other_prefixes_share_a_server_unseen(queue: RedisQueue) -> None:
    other = RedisQueue(queue.client, prefix="other:")
    queue.submit(new_job("j1"))

    assert other.stats() == ()
    other.submit(new_job("j1", tenant="bob"))
    assert queue.get("ada", "j1").tenant == "ada"


# --- verbs ------------------------------------------------------------------------------------------------------


def test_every_script_is_a_verb_with_a_header() -> None:
    files = {file.name for file in (resources.files("core.queue") / "scripts").iterdir()}
    assert files == {f"{verb}.lua" for verb in VERBS} | {"lib.lua"}
    for verb in VERBS:
        text = (resources.files("core.queue") / "scripts" / f"{verb}.lua").read_text()
        header = text[: re.search(r"^[^-]", text, re.MULTILINE).start()]  # type: ignore[union-attr]
        assert all(word in header for word in ("-- KEYS  prefix", "-- ARGV  now", "-- Gives")), verb


@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_walks_the_whole_keyspace(verb: str) -> None:
    commands = set(re.findall(r"redis\.p?call\(\s*'(\w+)'", source(verb)))

    assert commands
    assert not commands & {"KEYS", "SCAN", "HSCAN", "SSCAN", "ZSCAN", "EVAL", "FLUSHALL", "FLUSHDB"}


def test_scripts_are_sent_again_when_the_server_forgot_them(queue: RedisQueue) -> None:
    queue.submit(new_job("j1"))
    queue.client.script_flush()

    assert queue.stats()[0].queued == 1


def test_costs_and_tags_stay_exact_when_they_are_large(queue: RedisQueue) -> None:
    # Given jobs of an odd cost near the largest that a double counts exactly
    steps = (2**51 + 1) // 64
    for number in range(3):
        queue.submit(new_job(f"j{number}", steps=steps))

    assert queue.get("ada", "j2").tag == 2 * 64 * steps


def test_many_workers_at_once_never_hold_the_same_job(queue: RedisQueue) -> None:
    # Given
    jobs = [f"j{number:03}" for number in range(120)]
    for number, name in enumerate(jobs):
        queue.submit(new_job(name, "abc"[number % 3]))
    ready = threading.Barrier(6)

    def work(worker: int) -> list[str]:
        ready.wait()
        mine = []
        for turn in range(400):
            views = queue.snapshot(POOL).groups
            if not views:
                break
            how = {"worker": f"w{worker}", "request_id": f"{worker}-{turn}"}
            lease = queue.claim(POOL, views[0].group, limit=4, lease_s=30, **how)
            for job in lease.jobs if lease else ():
                queue.finish(lease.fence, job.id, DONE)  # type: ignore[union-attr]
                mine.append(job.id)
        return mine

    # If
    with ThreadPoolExecutor(6) as pool:
        done = [name for mine in pool.map(work, range(6)) for name in mine]

    # Expect
    assert sorted(done) == jobs


# --- outages ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", [signal.SIGSTOP, signal.SIGKILL])
@pytest.mark.parametrize("connected", [True, False])
def test_a_server_that_hangs_or_is_gone_is_told_within_two_seconds(
    own_server: EmbeddedValkey, trouble: signal.Signals, connected: bool
) -> None:
    # Given
    queue = RedisQueue(own_server.url)
    if connected:
        queue.ping()

    # If
    assert own_server.process is not None
    own_server.process.send_signal(trouble)
    started = monotonic()
    with pytest.raises(QueueUnavailable, match="try again"):
        queue.submit(new_job("j1"))
    seconds = monotonic() - started
    own_server.process.send_signal(signal.SIGCONT)
    queue.client.close()

    # Expect
    assert seconds < 2


def test_a_restarted_server_is_used_again_without_an_error(own_server: EmbeddedValkey) -> None:
    # Given
    queue = RedisQueue(own_server.url)
    queue.submit(new_job("j1"))

    # If
    own_server.stop(signal.SIGKILL)
    own_server.start()

    # Expect
    assert queue.get("ada", "j1").state is JobState.QUEUED
    queue.finish(take(queue, "a", "r1"), "j1", DONE)
    queue.client.close()


def test_a_full_server_takes_no_job_and_starts_none_but_lets_running_ones_end(queue: RedisQueue) -> None:
    # Given
    for letter in "abcde":
        queue.submit(new_job(letter, letter))
    done, broken, given_back, lost = (take(queue, letter, f"r-{letter}") for letter in "abcd")
    before = queue.client.dbsize()

    # If
    queue.client.config_set("maxmemory", "1")
    try:
        with pytest.raises(QueueUnavailable):
            queue.submit(new_job("one more"))
        with pytest.raises(QueueUnavailable):
            take(queue, "e", "r-e")
        assert queue.client.dbsize() == before
        queue.heartbeat(lost, lease_s=0, progress={"d": 0.5})
        queue.finish(done, "a", DONE)
        queue.fail(broken, "b", OOPS, retry_in_s=60)
        queue.release(given_back, ["c"])
        queue.reap()
        queue.cancel("ada", "e")
    finally:
        queue.client.config_set("maxmemory", "0")

    # Expect
    (stats,) = queue.stats()
    assert (stats.queued, stats.delayed, stats.running, stats.leases) == (2, 1, 0, 0)
    assert [queue.get("ada", letter).state for letter in "ae"] == [JobState.SUCCEEDED, JobState.CANCELLED]


def test_a_wrong_script_is_not_called_an_outage(queue: RedisQueue) -> None:
    queue.client.set("fuse:waiting", "not a hash")

    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        queue.submit(new_job("j1"))


# --- the server's settings --------------------------------------------------------------------------------------


def test_a_durable_server_has_nothing_to_warn_of(redis_url: str) -> None:
    with connect(redis_url, timeout_s=1) as client:
        assert check_server(client) == []


def test_a_server_that_may_evict_is_refused(own_server: EmbeddedValkey) -> None:
    with connect(own_server.url, timeout_s=1) as client:
        client.config_set("maxmemory-policy", "allkeys-lru")

        with pytest.raises(QueueMisconfigured, match="allkeys-lru; set it to noeviction"):
            check_server(client)


@pytest.mark.parametrize(
    ("name", "value", "warning"),
    [
        ("appendonly", "no", "set appendonly yes"),
        ("appendfsync", "everysec", "appendfsync is everysec"),
    ],
)
def test_a_server_that_may_forget_is_warned_of(own_server: EmbeddedValkey, name: str, value: str, warning: str) -> None:
    with connect(own_server.url, timeout_s=1) as client:
        client.config_set(name, value)

        (told,) = check_server(client)
        assert warning in told


def test_a_server_that_keeps_its_settings_to_itself_is_warned_of(own_server: EmbeddedValkey) -> None:
    with connect(own_server.url, timeout_s=1) as client:
        client.acl_setuser(
            "app", enabled=True, passwords=["+secret"], categories=["+@all"], commands=["-config"], keys=["*"]
        )
    with connect(own_server.url.replace("redis://", "redis://app:secret@"), timeout_s=1) as client:
        (told,) = check_server(client)
        assert "does not tell its appendfsync" in told


def test_a_wrong_password_is_an_outage_in_our_words(own_server: EmbeddedValkey) -> None:
    queue = RedisQueue(own_server.url.replace("redis://", "redis://app:wrong@"))

    with pytest.raises(QueueUnavailable, match=r"WRONGPASS|[Ii]nvalid username"):
        queue.ping()
    queue.client.close()
