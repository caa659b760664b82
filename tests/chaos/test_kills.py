"""What dies comes back: workers, and Valkey itself. Real processes, real signals."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import httpx
import pytest
import redis

from cli.bundle import MODEL, running
from cli.stack import Stack
from core.job import Job, JobState
from core.queue.redis import RedisQueue
from tests.e2e.conftest import Service

NOOP = {"FUSELINE_ENGINE": "noop"}


def endings(stack: Stack) -> Counter[str]:
    """How often each job reached a terminal state, by the stream that the scripts write."""
    with redis.Redis.from_url(stack.valkey.url, decode_responses=True) as client:
        entries = client.xrange("fuse:out")
    return Counter(entry["id"] for _, entry in entries if JobState(entry["state"]).is_terminal)


def wait_until(holds: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def kill(process_id: int, who: str) -> None:
    """Kill a worker: its Celery parent, the child that holds the device, or both."""
    if who == "both":
        os.killpg(process_id, signal.SIGKILL)
    elif who == "parent":
        os.kill(process_id, signal.SIGKILL)
    else:
        device_holder = max(children(process_id), key=lambda child: child[1])[0]
        os.kill(device_holder, signal.SIGKILL)


def children(process_id: int) -> list[tuple[int, int]]:
    """Processes of a parent with the pages each holds in memory."""
    tasks = Path(f"/proc/{process_id}/task").iterdir()
    found = [child for task in tasks for child in (task / "children").read_text().split()]
    return [(int(child), int(Path(f"/proc/{child}/statm").read_text().split()[1])) for child in found]


def running_on(queue: RedisQueue, job_ids: list[str], worker: str) -> list[Job]:
    jobs = [queue.get("default", job_id) for job_id in job_ids]
    return [job for job in jobs if job.state is JobState.RUNNING and job.worker == worker]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("who", ["both", "parent", "child"])
def test_a_worker_killed_in_mid_batch_costs_no_job_and_doubles_none(tmp_path: Path, who: str) -> None:
    # Given two workers, the bundled model, and batches that take a while
    with running(Stack(tmp_path, workers=2)) as stack, Service(stack) as service:
        queue = service.queue
        service.wait([service.submit(), service.submit(loras=[{"name": "stripes", "scale": 1}])])
        ids = [
            service.submit(seed=number, steps=60, loras=[{"name": name, "scale": 1}])
            for number in range(3)
            for name in ("stripes", "outline", "heart", "dusk")
        ]
        # If one of them is killed while it samples a batch
        deadline = time.monotonic() + 60
        victims: list[Job] = []
        while not any(job.progress > 0 for job in victims):
            assert time.monotonic() < deadline
            time.sleep(0.02)
            victims = running_on(queue, ids, "worker-1")
        kill(stack.processes["worker-1"].pid, who)
        killed = time.monotonic()
        # Expect each of its jobs to run again within 30 s, and every job to succeed once
        for job in victims:
            service.wait_for(job.id, lambda view: view["state"] == "succeeded", 30)
        assert time.monotonic() - killed < 30
        views = service.wait(ids)
        assert [view["state"] for view in views] == ["succeeded"] * len(ids)
        assert set(endings(stack).values()) == {1}
        assert all(len(service.images(view)) == 1 for view in views)


@pytest.mark.timeout(240)
def test_valkey_killed_under_load_loses_no_acknowledged_job(tmp_path: Path) -> None:
    # Given a service under load
    with running(Stack(tmp_path, workers=2, settings=NOOP)) as stack, Service(stack) as service:
        acknowledged: list[str] = []
        refused: Counter[int] = Counter()
        stop = threading.Event()

        def submit_until_stopped() -> None:
            with httpx.Client(base_url=stack.api_url, timeout=10) as client:
                number = 0
                while not stop.is_set():
                    number += 1
                    answer = client.post("/v1/jobs", json={"model": MODEL, "prompt": f"job {number}"})
                    if answer.status_code == 202:
                        acknowledged.append(answer.json()["id"])
                    else:
                        refused[answer.status_code] += 1
                        time.sleep(0.05)

        threads = [threading.Thread(target=submit_until_stopped) for _ in range(2)]
        for thread in threads:
            thread.start()
        # If Valkey is killed and started again, three times
        for kills in range(3):
            wanted, seen = 20 * (kills + 1), refused.total()
            wait_until(partial(lambda least: len(acknowledged) >= least, wanted))
            stack.valkey.stop(signal.SIGKILL)
            wait_until(partial(lambda before: refused.total() > before, seen))
            stack.valkey.start()
        wait_until(lambda: len(acknowledged) >= 80)
        stop.set()
        for thread in threads:
            thread.join()
        # Expect the outage to have been answered with 503, and every acknowledged job to succeed once
        assert set(refused) == {503}
        views = service.wait(acknowledged, 120)
        assert Counter(view["state"] for view in views) == {"succeeded": len(acknowledged)}
        counted = endings(stack)
        assert {counted[job_id] for job_id in acknowledged} == {1}


@pytest.mark.timeout(240)
def test_sigterm_drains_a_worker(tmp_path: Path) -> None:
    # Given one worker in the middle of a long batch of several passes
    with running(Stack(tmp_path, workers=1)) as stack, Service(stack) as service:
        queue = service.queue
        holder = service.submit(steps=100, loras=[{"name": "dusk", "scale": 1}])
        service.wait_for(holder, lambda view: view["progress"] > 0)
        ids = [service.submit(steps=60, images=4, seed=number) for number in range(3)]
        service.wait_for(ids[0], lambda view: view["progress"] > 0)
        assert len({job.fence for job in running_on(queue, ids, "worker-1")}) == 1
        assert len(running_on(queue, ids, "worker-1")) == 3
        # If it is told to stop
        process = stack.processes["worker-1"]
        process.send_signal(signal.SIGTERM)
        # Expect it to finish the pass in hand, give back the rest without an attempt, and leave
        assert process.wait(60) == 0
        jobs = [queue.get("default", job_id) for job_id in ids]
        assert Counter(job.state for job in jobs) == {JobState.SUCCEEDED: 1, JobState.QUEUED: 2}
        assert [job.attempt for job in jobs if job.state is JobState.QUEUED] == [0, 0]
        assert queue.workers() == ()
        # and another worker to do the rest
        stack.start_worker(1)
        assert [view["state"] for view in service.wait(ids)] == ["succeeded"] * 3
        assert set(endings(stack).values()) == {1}


@pytest.mark.timeout(240)
def test_a_frozen_worker_loses_its_lease_and_cannot_double_a_job(tmp_path: Path) -> None:
    # Given two workers and short leases
    with running(Stack(tmp_path, workers=2, settings={"FUSELINE_LEASE_S": "3"})) as stack, Service(stack) as service:
        queue = service.queue
        service.wait([service.submit(), service.submit(loras=[{"name": "stripes", "scale": 1}])])
        ids = [service.submit(seed=number, steps=80) for number in range(4)]
        deadline = time.monotonic() + 60
        frozen = None
        while frozen is None:
            assert time.monotonic() < deadline
            for name in ("worker-1", "worker-2"):
                if any(job.progress > 0 for job in running_on(queue, ids, name)):
                    frozen = stack.processes[name]
                    break
        # If the one that samples is frozen for longer than its lease, and then goes on
        os.killpg(frozen.pid, signal.SIGSTOP)
        try:
            views = service.wait(ids)
        finally:
            os.killpg(frozen.pid, signal.SIGCONT)
        # Expect the other to have finished its jobs, each once
        assert [view["state"] for view in views] == ["succeeded"] * 4
        again = service.wait([service.submit(seed=number) for number in range(8)])
        assert [view["state"] for view in again] == ["succeeded"] * 8
        assert set(endings(stack).values()) == {1}
