"""Metrics: every event is counted, labels stay bounded, the reference is what the code says."""

from __future__ import annotations

import typing
import urllib.request
from collections.abc import Iterator, Sequence

import pytest
from prometheus_client.parser import text_string_to_metric_families

from core.errors import QueueUnavailable
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
from core.telemetry.metrics import Metrics, metric_infos
from core.telemetry.reference import reference_markdown
from tests.conftest import ROOT

GROUP = "0" * 32

BOUNDED_LABELS = frozenset(
    ("pool", "outcome", "code", "reason", "state", "stage", "kind", "method", "route", "status"),
)

EFFECTS: list[tuple[Event, dict[str, float]]] = [
    (JobSubmitted("j", "p", GROUP), {'fuseline_submitted_total{pool="p"}': 1}),
    (SubmitRejected("queue_full"), {'fuseline_submit_rejected_total{reason="queue_full"}': 1}),
    (
        BatchClaimed("p", GROUP, "1-a", ("j", "k"), (0.5, 2.0)),
        {
            'fuseline_job_wait_seconds_count{pool="p"}': 2,
            'fuseline_job_wait_seconds_sum{pool="p"}': 2.5,
            'fuseline_last_progress_timestamp_seconds{pool="p"}': 1_000,
        },
    ),
    (CacheUsed("lora", hit=True, size_bytes=5), {'fuseline_cache_hits_total{kind="lora"}': 1}),
    (CacheUsed("model", hit=False, size_bytes=5), {'fuseline_cache_misses_total{kind="model"}': 1}),
    (CacheEvicted(7), {"fuseline_cache_evictions_total": 1, "fuseline_cache_evicted_bytes_total": 7}),
    (CacheSized(3, 10), {"fuseline_cache_used_bytes": 3, "fuseline_cache_budget_bytes": 10}),
    (
        FileFetched("lora", 9, 0.5),
        {'fuseline_fetched_bytes_total{kind="lora"}': 9, 'fuseline_fetch_seconds_sum{kind="lora"}': 0.5},
    ),
    (ModelLoaded("tiny", 4.0), {"fuseline_model_load_seconds_sum": 4.0}),
    (Fused(GROUP, 2, 56, 0.25), {"fuseline_fuses_total": 1, "fuseline_fuse_seconds_sum": 0.25}),
    (StageTimed("upload", 0.5), {'fuseline_stage_seconds_sum{stage="upload"}': 0.5}),
    (BatchSampled(("j",), 4, 12, 2.0), {"fuseline_images_total": 4, 'fuseline_batch_images_bucket{le="4.0"}': 1}),
    (StepDone("1-a", 1, 12), {"fuseline_steps_total": 1}),
    (
        JobFinished("j", "p", "failed", "lora_not_finite", 1.5),
        {
            'fuseline_jobs_finished_total{code="lora_not_finite",outcome="failed",pool="p"}': 1,
            'fuseline_job_run_seconds_sum{pool="p"}': 1.5,
        },
    ),
    (
        JobRetried("j", "p", "store_unavailable", 2.0),
        {'fuseline_jobs_retried_total{code="store_unavailable",pool="p"}': 1},
    ),
    (JobsReleased("p", 3), {'fuseline_jobs_released_total{pool="p"}': 3}),
    (LeaseExpired("p", 2), {}),
    (StaleFinish("j", "p"), {'fuseline_stale_finishes_total{pool="p"}': 1}),
]


@pytest.fixture
def metrics() -> Iterator[Metrics]:
    made = Metrics(now_s=lambda: 1_000.0)
    yield made
    made.close()


def samples(metrics: Metrics) -> dict[str, float]:
    """Give every ``fuseline_`` sample by name and sorted labels."""
    text = metrics.exposition()[0].decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f'{key}="{value}"' for key, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return {name: value for name, value in found.items() if name.startswith("fuseline_")}


@pytest.mark.parametrize(("event", "expected"), EFFECTS, ids=[type(event).__name__ for event, _ in EFFECTS])
def test_an_event_changes_its_metrics_and_no_others(metrics: Metrics, event: Event, expected: dict[str, float]) -> None:
    before = samples(metrics)
    metrics(event)
    after = samples(metrics)
    assert {name: after[name] for name in expected} == expected
    changed = {name for name, value in after.items() if before.get(name, 0.0) != value}
    assert {_family(name) for name in changed} == {_family(name) for name in expected}


def _family(series: str) -> str:
    name = series.split("{", maxsplit=1)[0]
    for suffix in ("_bucket", "_sum", "_count"):
        name = name.removesuffix(suffix)
    return name


def test_the_table_above_holds_every_event() -> None:
    assert {type(event) for event, _ in EFFECTS} == set(typing.get_args(Event))


def test_every_metric_is_reached_by_an_event_a_request_or_a_scrape_of_the_queue(metrics: Metrics) -> None:
    # If everything happens once
    for event, _ in EFFECTS:
        metrics(event)
    metrics.http_request(method="GET", route="/healthz", status=200, seconds=0.01)
    metrics.watch_queue(lambda: [PoolStats("p", 1, 1, 1, 1, 1, 1.0, 1, 1, 1)])
    # Expect a value other than 0 in each metric of the reference
    moved = {_family(name) for name, value in samples(metrics).items() if value}
    assert {_family(info.name) for info in metric_infos()} == moved


def test_progress_counts_only_for_a_worker_that_claimed(metrics: Metrics) -> None:
    # Given a process that has claimed nothing, such as the API
    metrics(StepDone("1-a", 1, 12))
    metrics(JobFinished("j", "p", "failed", "engine_failed", 0.0))
    # Expect no progress series that would read as 1970
    assert not [name for name in samples(metrics) if name.startswith("fuseline_last_progress")]


def test_a_step_moves_the_progress_of_the_pool_that_was_claimed_from() -> None:
    now = [1_000.0]
    metrics = Metrics(now_s=lambda: now[0])
    metrics(BatchClaimed("p", GROUP, "1-a", ("j",), (0.0,)))
    now[0] = 1_060.0
    metrics(StepDone("1-a", 1, 12))
    assert samples(metrics)['fuseline_last_progress_timestamp_seconds{pool="p"}'] == 1_060.0


def test_counters_of_known_pools_start_at_zero() -> None:
    # Given a known pool; a first increase from nothing would be invisible to increase()
    found = samples(Metrics(pools=["p"]))
    assert found['fuseline_stale_finishes_total{pool="p"}'] == 0.0


def test_requests_are_counted_by_route_and_an_invented_method_makes_no_new_series(metrics: Metrics) -> None:
    metrics.http_request(method="POST", route="/v1/jobs", status=202, seconds=0.02)
    metrics.http_request(method="BREW", route="unmatched", status=405, seconds=0.01)
    metrics.http_request(method="XYZZY", route="unmatched", status=405, seconds=0.01)
    found = samples(metrics)
    name = "fuseline_http_request_duration_seconds_count"
    assert found[f'{name}{{method="POST",route="/v1/jobs",status="202"}}'] == 1
    assert found[f'{name}{{method="other",route="unmatched",status="405"}}'] == 2


def test_the_queue_is_asked_at_each_scrape_and_not_before(metrics: Metrics) -> None:
    answers = [
        [
            PoolStats(
                "p",
                queued=4,
                delayed=1,
                running=2,
                groups=3,
                leases=2,
                oldest_ready_s=9.5,
                tickets=6,
                leases_expired=7,
                dead_letters=8,
            )
        ],
        [PoolStats("p", queued=0, delayed=0, running=0, groups=0, leases=0, oldest_ready_s=0.0)],
    ]
    metrics.watch_queue(lambda: answers.pop(0))
    first, second = samples(metrics), samples(metrics)
    assert first["fuseline_queue_up"] == 1
    assert first['fuseline_queue_jobs{pool="p",state="queued"}'] == 4
    assert first['fuseline_queue_jobs{pool="p",state="delayed"}'] == 1
    assert first['fuseline_queue_jobs{pool="p",state="running"}'] == 2
    assert first['fuseline_queue_groups{pool="p"}'] == 3
    assert first['fuseline_queue_leases{pool="p"}'] == 2
    assert first['fuseline_queue_tickets{pool="p"}'] == 6
    assert first['fuseline_leases_expired_total{pool="p"}'] == 7
    assert first['fuseline_dead_letters_total{pool="p"}'] == 8
    assert first['fuseline_queue_oldest_ready_age_seconds{pool="p"}'] == 9.5
    assert second['fuseline_queue_jobs{pool="p",state="queued"}'] == 0
    assert not answers


def test_a_scrape_answers_while_the_queue_is_down(metrics: Metrics) -> None:
    def stats() -> Sequence[PoolStats]:
        msg = "Redis did not answer within 0.8 s"
        raise QueueUnavailable(msg)

    metrics(JobSubmitted("j", "p", GROUP))
    metrics.watch_queue(stats)
    found = samples(metrics)
    assert found["fuseline_queue_up"] == 0
    assert found['fuseline_submitted_total{pool="p"}'] == 1
    assert not [name for name in found if name.startswith("fuseline_queue_jobs")]


def test_two_instances_share_nothing() -> None:
    one, two = Metrics(), Metrics()
    one(CacheEvicted(1))
    assert samples(one)["fuseline_cache_evictions_total"] == 1
    assert samples(two)["fuseline_cache_evictions_total"] == 0


def test_a_worker_serves_its_own_port_until_it_is_closed(metrics: Metrics) -> None:
    metrics(Fused(GROUP, 1, 56, 0.1))
    port = metrics.serve(0)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        assert b"fuseline_fuses_total 1.0" in answer.read()
    metrics.close()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5)


def test_names_and_labels_keep_the_conventions() -> None:
    for info in metric_infos():
        assert info.name.startswith("fuseline_")
        assert info.name.endswith("_total") == (info.type == "counter"), info.name
        assert not info.name.endswith(("_ms", "_mb", "_created")), info.name
        assert info.help.endswith("."), info.name
        assert set(info.labels) <= {
            "pool",
            "outcome",
            "code",
            "stage",
            "kind",
            "reason",
            "state",
            "method",
            "route",
        } | {"status"}, info.name


def test_the_created_series_are_left_out(metrics: Metrics) -> None:
    metrics(Fused(GROUP, 1, 56, 0.1))
    assert "_created" not in metrics.exposition()[0].decode()


def test_docs_metrics_md_is_what_the_code_says() -> None:
    written = (ROOT / "docs" / "metrics.md").read_text()
    assert written == reference_markdown(), "run: python -m core.telemetry.reference > docs/metrics.md"
