"""Events become Prometheus metrics.

Base units (seconds, bytes), one prefix, counters end in ``_total``. Labels are bounded: never a job, a tenant, a LoRA
or a URL. docs/metrics.md lists them all and is generated.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import assert_never

from prometheus_client import ProcessCollector, start_http_server
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from core.events import (
    BatchClaimed,
    BatchSampled,
    CacheEvicted,
    CacheSized,
    CacheUsed,
    Event,
    FileFetched,
    Fused,
    JobFinished,
    JobRetried,
    JobsReleased,
    JobSubmitted,
    LeaseExpired,
    ModelLoaded,
    StageTimed,
    StaleFinish,
    StepDone,
    SubmitRejected,
)
from core.ports import PoolStats
from core.telemetry.queue_gauges import QUEUE_INFOS, QueueGauges
from core.telemetry.registry import MetricInfo, Registry

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
"""Values of the label ``method``; whatever else a client sends counts as ``other``."""

HTTP_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0)
SHORT_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
LONG_BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)
IMAGE_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 32)

SubmitEvent = JobSubmitted | SubmitRejected
CacheEvent = CacheUsed | CacheEvicted | CacheSized | FileFetched
EngineEvent = ModelLoaded | Fused | StageTimed | BatchSampled | StepDone
JobEvent = BatchClaimed | JobFinished | JobRetried | JobsReleased | LeaseExpired | StaleFinish


class Metrics:
    """One process's metrics: an observer of events with a registry of its own.

    ``pools`` are those whose counters read 0 before anything happened, so that a first increase is seen as one.
    ``now_s`` gives seconds since the epoch.
    """

    def __init__(self, *, pools: Iterable[str] = (), now_s: Callable[[], float] = time.time) -> None:
        self.registry = Registry()
        ProcessCollector(registry=self.registry)
        self._submits = _Submits(self.registry)
        self._jobs = _Jobs(self.registry, pools)
        self._progress = _Progress(self.registry, now_s)
        self._engine = _Engine(self.registry)
        self._cache = _Cache(self.registry)
        self._http = self.registry.histogram(
            "http_request_duration_seconds",
            "Duration of HTTP requests, by route template and status code.",
            *("method", "route", "status"),
            buckets=HTTP_BUCKETS,
        )
        self._close_server: Callable[[], None] = lambda: None

    def __call__(self, event: Event) -> None:
        """Count one event."""
        match event:
            case JobSubmitted() | SubmitRejected():
                self._submits(event)
            case BatchClaimed() | JobFinished() | JobRetried() | JobsReleased() | LeaseExpired() | StaleFinish():
                self._jobs(event)
            case ModelLoaded() | Fused() | StageTimed() | BatchSampled() | StepDone():
                self._engine(event)
            case CacheUsed() | CacheEvicted() | CacheSized() | FileFetched():
                self._cache(event)
            case _:
                assert_never(event)
        self._progress(event)

    def http_request(self, *, method: str, route: str, status: int, seconds: float) -> None:
        """Count one HTTP request. ``route`` is the template (``/v1/jobs/{id}``), never the path that was asked for."""
        self._http.labels(method if method in METHODS else "other", route, str(status)).observe(seconds)

    def watch_queue(self, stats: Callable[[], Sequence[PoolStats]]) -> None:
        """Ask the queue for its counts at each scrape. For processes that serve ``/metrics`` over the API."""
        self.registry.register(QueueGauges(stats))

    def exposition(self) -> tuple[bytes, str]:
        """Give what a scrape reads, and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_PLAIN_0_0_4

    def serve(self, port: int, host: str = "127.0.0.1") -> int:
        """Serve ``/metrics`` from a thread until ``close``; give the port, which the system chooses when it is 0.

        Raises ``OSError`` if the port is taken.
        """
        server, thread = start_http_server(port, addr=host, registry=self.registry)

        def close() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        self._close_server = close
        return int(server.server_port)

    def close(self) -> None:
        """Stop serving, if it does."""
        close, self._close_server = self._close_server, lambda: None
        close()


def metric_infos() -> tuple[MetricInfo, ...]:
    """List every metric there is, by name."""
    return tuple(sorted((*Metrics().registry.infos, *QUEUE_INFOS), key=lambda info: info.name))


class _Submits:
    def __init__(self, registry: Registry) -> None:
        self._taken = registry.counter("submitted_total", "Jobs that the queue took.", "pool")
        self._rejected = registry.counter(
            "submit_rejected_total", "Submits that were refused, by error code.", "reason"
        )

    def __call__(self, event: SubmitEvent) -> None:
        match event:
            case JobSubmitted(pool=pool):
                self._taken.labels(pool).inc()
            case SubmitRejected(reason=reason):
                self._rejected.labels(reason).inc()
            case _:
                assert_never(event)


class _Jobs:
    def __init__(self, registry: Registry, pools: Iterable[str]) -> None:
        self._finished = registry.counter(
            "jobs_finished_total",
            "Jobs that a worker ended: succeeded, failed or cancelled; code is the error's, empty on success.",
            *("pool", "outcome", "code"),
        )
        self._retried = registry.counter("jobs_retried_total", "Failed runs to be tried again.", "pool", "code")
        self._wait = registry.histogram(
            "job_wait_seconds", "From ready to claimed, per job.", "pool", buckets=LONG_BUCKETS
        )
        self._run = registry.histogram(
            "job_run_seconds", "From claimed to finished, per job.", "pool", buckets=LONG_BUCKETS
        )
        self._released = registry.counter("jobs_released_total", "Jobs given back without an attempt.", "pool")
        self._stale = registry.counter("stale_finishes_total", "Results refused: their token was not live.", "pool")
        for pool in pools:
            for counter in (self._released, self._stale):
                counter.labels(pool)

    def __call__(self, event: JobEvent) -> None:
        match event:
            case BatchClaimed(pool=pool, waited_s=waited_s):
                for seconds in waited_s:
                    self._wait.labels(pool).observe(seconds)
            case JobFinished(pool=pool, outcome=outcome, code=code, seconds=seconds):
                self._finished.labels(pool, outcome, code).inc()
                self._run.labels(pool).observe(seconds)
            case JobRetried(pool=pool, code=code):
                self._retried.labels(pool, code).inc()
            case JobsReleased(pool=pool, count=count):
                self._released.labels(pool).inc(count)
            case LeaseExpired():
                pass  # the queue counts these, for any process may take a lease back: see queue_gauges
            case StaleFinish(pool=pool):
                self._stale.labels(pool).inc()
            case _:
                assert_never(event)


class _Progress:
    """When this worker last got on with its work. A process that never claims has no such series."""

    def __init__(self, registry: Registry, now_s: Callable[[], float]) -> None:
        self._last = registry.gauge(
            "last_progress_timestamp_seconds",
            "When the worker last claimed jobs or sampled a step, since the epoch.",
            "pool",
        )
        self._now_s = now_s
        self._pool = ""

    def __call__(self, event: Event) -> None:
        match event:
            case BatchClaimed(pool=pool):
                self._pool = pool
                self._last.labels(pool).set(self._now_s())
            case StepDone() | BatchSampled() if self._pool:
                self._last.labels(self._pool).set(self._now_s())
            case _:
                pass


class _Engine:
    def __init__(self, registry: Registry) -> None:
        self._stage = registry.histogram(
            "stage_seconds", "Stages of a batch: fetch, fuse, sample, upload and so on.", "stage", buckets=SHORT_BUCKETS
        )
        self._batch = registry.histogram("batch_images", "Images sampled in one forward batch.", buckets=IMAGE_BUCKETS)
        self._images = registry.counter("images_total", "Images sampled.")
        self._steps = registry.counter("steps_total", "Denoising steps of batches.")
        self._fuses = registry.counter("fuses_total", "Times that weights were rewritten for a LoRA set.")
        self._fuse = registry.histogram("fuse_seconds", "Rewriting the weights for a LoRA set.", buckets=SHORT_BUCKETS)
        self._load = registry.histogram("model_load_seconds", "Loading a checkpoint.", buckets=LONG_BUCKETS)

    def __call__(self, event: EngineEvent) -> None:
        match event:
            case ModelLoaded(seconds=seconds):
                self._load.observe(seconds)
            case Fused(seconds=seconds):
                self._fuses.inc()
                self._fuse.observe(seconds)
            case StageTimed(stage=stage, seconds=seconds):
                self._stage.labels(stage).observe(seconds)
            case BatchSampled(images=images):
                self._batch.observe(images)
                self._images.inc(images)
            case StepDone():
                self._steps.inc()
            case _:
                assert_never(event)


class _Cache:
    def __init__(self, registry: Registry) -> None:
        self._hits = registry.counter("cache_hits_total", "Files that the cache had: lora or model.", "kind")
        self._misses = registry.counter("cache_misses_total", "Files that the cache had to fetch.", "kind")
        self._evictions = registry.counter("cache_evictions_total", "Files that left the cache to make room.")
        self._evicted = registry.counter("cache_evicted_bytes_total", "Bytes that left the cache to make room.")
        self._used = registry.gauge("cache_used_bytes", "Bytes in the cache.")
        self._budget = registry.gauge("cache_budget_bytes", "Bytes that the cache may hold.")
        self._fetched = registry.counter("fetched_bytes_total", "Bytes fetched from the store.", "kind")
        self._fetch = registry.histogram(
            "fetch_seconds", "Fetching one file from the store.", "kind", buckets=SHORT_BUCKETS
        )
        for kind in ("lora", "model"):
            self._hits.labels(kind)
            self._misses.labels(kind)

    def __call__(self, event: CacheEvent) -> None:
        match event:
            case CacheUsed(kind=kind, hit=hit):
                (self._hits if hit else self._misses).labels(kind).inc()
            case CacheEvicted(size_bytes=size_bytes):
                self._evictions.inc()
                self._evicted.inc(size_bytes)
            case CacheSized(used_bytes=used_bytes, budget_bytes=budget_bytes):
                self._used.set(used_bytes)
                self._budget.set(budget_bytes)
            case FileFetched(kind=kind, size_bytes=size_bytes, seconds=seconds):
                self._fetched.labels(kind).inc(size_bytes)
                self._fetch.labels(kind).observe(seconds)
            case _:
                assert_never(event)
