"""The queue's state, read when Prometheus asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from core.errors import QueueError
from core.ports import PoolStats
from core.telemetry.registry import PREFIX, MetricInfo

QUEUE_UP = MetricInfo(f"{PREFIX}queue_up", "gauge", "1 when the queue answered this scrape, else 0.")
JOBS = MetricInfo(f"{PREFIX}queue_jobs", "gauge", "Jobs in the queue: queued, delayed, running.", ("pool", "state"))
POOL_GAUGES: tuple[tuple[MetricInfo, Callable[[PoolStats], float]], ...] = (
    (
        MetricInfo(f"{PREFIX}queue_groups", "gauge", "Groups (model and LoRA set) with ready jobs.", ("pool",)),
        lambda stats: stats.groups,
    ),
    (
        MetricInfo(f"{PREFIX}queue_leases", "gauge", "Batches that workers hold.", ("pool",)),
        lambda stats: stats.leases,
    ),
    (
        MetricInfo(f"{PREFIX}queue_tickets", "gauge", "Celery messages that wait in the broker.", ("pool",)),
        lambda stats: stats.tickets,
    ),
    (
        MetricInfo(
            f"{PREFIX}queue_oldest_ready_age_seconds",
            "gauge",
            "Age of the job at the head of the ready line; 0 when none is ready.",
            ("pool",),
        ),
        lambda stats: stats.oldest_ready_s,
    ),
)

POOL_COUNTERS: tuple[tuple[MetricInfo, Callable[[PoolStats], float]], ...] = (
    (
        MetricInfo(
            f"{PREFIX}leases_expired_total", "counter", "Leases taken back because nobody renewed them.", ("pool",)
        ),
        lambda stats: stats.leases_expired,
    ),
    (
        MetricInfo(f"{PREFIX}dead_letters_total", "counter", "Jobs that failed for good.", ("pool",)),
        lambda stats: stats.dead_letters,
    ),
)

QUEUE_INFOS = (QUEUE_UP, JOBS, *(info for info, _ in (*POOL_GAUGES, *POOL_COUNTERS)))
"""What a scrape of the queue gives."""


class QueueGauges(Collector):
    """Asks ``read`` for the pools' counts at each scrape. A queue that does not answer gives ``queue_up 0`` alone."""

    def __init__(self, read: Callable[[], Sequence[PoolStats]]) -> None:
        self._read = read

    def describe(self) -> Iterable[Metric]:
        """Name the metrics without asking the queue: it may be down when the process starts."""
        return [_family(info) for info in QUEUE_INFOS]

    def collect(self) -> Iterable[Metric]:
        """Ask the queue."""
        up = _family(QUEUE_UP)
        try:
            pools = self._read()
        except QueueError:
            up.add_metric([], 0)
            return [up]
        up.add_metric([], 1)
        return [up, _jobs(pools), *_by_pool(pools)]


def _jobs(pools: Sequence[PoolStats]) -> Metric:
    family = _family(JOBS)
    for stats in pools:
        for state, count in (("queued", stats.queued), ("delayed", stats.delayed), ("running", stats.running)):
            family.add_metric([stats.pool, state], count)
    return family


def _by_pool(pools: Sequence[PoolStats]) -> Iterable[Metric]:
    for info, value in (*POOL_GAUGES, *POOL_COUNTERS):
        family = _family(info)
        for stats in pools:
            family.add_metric([stats.pool], value(stats))
        yield family


def _family(info: MetricInfo) -> GaugeMetricFamily | CounterMetricFamily:
    family = CounterMetricFamily if info.type == "counter" else GaugeMetricFamily
    return family(info.name, info.help, labels=info.labels)
