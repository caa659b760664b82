"""A lease is kept while its run moves, and given up when it does not."""

import threading
from collections.abc import Mapping

import pytest

from core.errors import JobCancelled, LeaseLost, QueueUnavailable
from core.ports import Lease
from core.queue.memory import MemoryQueue
from worker import lease as module
from worker.lease import LeaseKeeper

LEASE = Lease("1-a", "default", "g", (), 0)


class Beats(MemoryQueue):
    """A queue that counts heartbeats and answers them as told."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.beaten = threading.Event()
        self.answer: frozenset[str] | Exception = frozenset()

    def heartbeat(self, fence: str, *, lease_s: float, progress: Mapping[str, float]) -> frozenset[str]:
        self.count += 1
        self.beaten.set()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def keeper(queue: Beats, *, stall_s: float = 60, wedged: threading.Event | None = None) -> LeaseKeeper:
    on_wedged = (wedged or threading.Event()).set
    return LeaseKeeper(queue, LEASE, lease_s=0.2, stall_s=stall_s, on_wedged=on_wedged)


def wait_for_beat(queue: Beats) -> None:
    queue.beaten.clear()
    assert queue.beaten.wait(10)


def test_it_renews_and_carries_back_who_is_cancelled() -> None:
    queue = Beats()
    queue.answer = frozenset({"a"})
    with keeper(queue) as kept:
        wait_for_beat(queue)
        wait_for_beat(queue)
        assert kept.is_cancelled("a")
        kept.check(["a", "b"])
        with pytest.raises(JobCancelled):
            kept.check(["a"])


def test_a_lost_lease_raises_in_the_run() -> None:
    queue = Beats()
    queue.answer = LeaseLost("stale")
    with keeper(queue) as kept:
        wait_for_beat(queue)
        kept._thread.join(10)
        with pytest.raises(LeaseLost):
            kept.check([])


def test_a_queue_that_is_away_for_longer_than_the_lease_loses_it() -> None:
    queue = Beats()
    queue.answer = QueueUnavailable("away")
    with keeper(queue) as kept:
        for _ in range(6):
            wait_for_beat(queue)
        with pytest.raises(LeaseLost):
            kept.check([])


def test_a_wedged_run_loses_its_lease_and_then_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WEDGED_GRACE_S", 0.1)
    queue, wedged = Beats(), threading.Event()
    with keeper(queue, stall_s=0.0, wedged=wedged) as kept:
        assert wedged.wait(10)
        assert queue.count == 0
        with pytest.raises(LeaseLost):
            kept.check([])
