"""A job's whole life in a worker, top to bottom: choose, claim, hold, sample, store, finish."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import random
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from PIL import Image

from core.errors import (
    EngineBroken,
    EngineFailed,
    EngineOutOfMemory,
    FuselineError,
    JobCancelled,
    LeaseLost,
    QueueUnavailable,
    StoreUnavailable,
)
from core.events import BatchClaimed, BatchSampled, JobFinished, JobRetried, JobsReleased, StageTimed, StepDone
from core.job import ImageResult, Job, JobError, JobResult, JobSpec, JobState, LoraReport
from core.ports import Catalogue, JobQueue, Lease, ObjectStore, Observer, WorkerInfo
from core.scheduling import choose
from worker.device import Device, Held
from worker.engine.base import ImagePrompt, Shape
from worker.engine.encode import infotext, png
from worker.lease import LeaseKeeper

_log = logging.getLogger(__name__)

T = TypeVar("T")

PATIENCE_S = (0.5, 1.0, 2.0, 4.0)
"""Pauses between tries to store an image or to tell the queue an outcome: work in hand is worth a short wait."""

CLAIM_TRIES = 8
"""How often a worker chooses again when others were faster."""


@dataclass(frozen=True, slots=True)
class RunnerSettings:
    """What an operator decides for one worker. Times in seconds."""

    worker: str
    pool: str
    lease_s: float
    stall_s: float
    slack: float
    batch_max: int
    retry_base_s: float
    retry_max_s: float


@dataclass(slots=True)
class _Batch:
    """The jobs of one lease while they run."""

    lease: Lease
    keeper: LeaseKeeper
    open: dict[str, Job]
    """Jobs without an outcome yet."""
    images: dict[str, list[ImageResult]] = field(default_factory=dict)
    stage_s: dict[str, float] = field(default_factory=dict)
    sampled_with: dict[str, int] = field(default_factory=dict)
    """Most images in one forward pass with this job's."""
    started: float = field(default_factory=time.monotonic)


_Row = tuple[Job, int]
"""One image to draw: its job and its index there."""


class Runner:
    """Takes batches of one pool and works them through, one at a time."""

    def __init__(
        self,
        settings: RunnerSettings,
        *,
        queue: JobQueue,
        store: ObjectStore,
        catalogue: Catalogue,
        device: Device,
        observe: Observer,
        end_process: Callable[[], object],
    ) -> None:
        self._settings = settings
        self._queue = queue
        self._store = store
        self._catalogue = catalogue
        self._device = device
        self._observe = observe
        self._end_process = end_process
        """Called when this process can do no more; its parent starts another."""
        self._fused: str | None = None
        """Group whose model and LoRA set the device holds."""

    def work(self, budget_s: float, draining: Callable[[], bool]) -> int:
        """Run batches until there is no work, the time budget is used, or the worker drains; count them."""
        until = time.monotonic() + budget_s
        batches = 0
        while time.monotonic() < until and not draining():
            lease = self._claim()
            if lease is None:
                break
            self._run(lease, draining)
            batches += 1
        return batches

    def _claim(self) -> Lease | None:
        for _ in range(CLAIM_TRIES):
            group = choose(self._queue.snapshot(self._settings.pool), fused=self._fused, slack=self._settings.slack)
            if group is None:
                return None
            lease = self._queue.claim(
                self._settings.pool,
                group,
                worker=self._settings.worker,
                limit=self._settings.batch_max,
                request_id=uuid.uuid4().hex,
                lease_s=self._settings.lease_s,
            )
            if lease is not None:
                waited_s = tuple(max(0, job.started_ms - job.ready_ms) / 1000 for job in lease.jobs)
                self._observe(
                    BatchClaimed(lease.pool, group, lease.fence, tuple(job.id for job in lease.jobs), waited_s)
                )
                return lease
        return None

    def _run(self, lease: Lease, draining: Callable[[], bool]) -> None:
        settings = self._settings
        keeper = LeaseKeeper(
            self._queue, lease, lease_s=settings.lease_s, stall_s=settings.stall_s, on_wedged=self._end_process
        )
        batch = _Batch(lease, keeper, open={job.id: job for job in lease.jobs})
        with keeper:
            try:
                held = self._hold(batch)
                self._report_to_registry(lease)
                for rows in _passes(lease.jobs, settings.batch_max):
                    if draining():
                        break
                    self._draw(batch, held, rows)
            except LeaseLost as lost:
                _log.warning("%s; its %d unfinished jobs are left to others", lost, len(batch.open))
                return
            except FuselineError as error:
                self._fail(batch, list(batch.open.values()), error)
                if isinstance(error, EngineBroken):
                    _log.critical("%s; this process ends and is replaced", error)
                    self._end_process()
            self._give_back(batch)

    def _hold(self, batch: _Batch) -> Held:
        """Bring the group's model and LoRA set onto the device; fail the jobs that must not go on without one."""
        spec = batch.lease.jobs[0].spec
        jobs = list(batch.open.values())
        self._fused = None
        model = self._catalogue.get_model_version(spec.model_digest)
        partial_ok = any(job.spec.on_lora_error == "continue" for job in jobs)
        sources = _sources(jobs)
        held = _patiently(StoreUnavailable, lambda: self._device.hold(model, spec.loras, sources, partial=partial_ok))
        batch.stage_s.update(held.stage_s)
        batch.keeper.advance()
        if held.problems:
            strict = [job for job in jobs if job.spec.on_lora_error == "fail"]
            self._fail(batch, strict, next(iter(held.problems.values())))
        else:
            self._fused = batch.lease.group
        return held

    def _draw(self, batch: _Batch, held: Held, rows: Sequence[_Row]) -> None:
        """Sample rows in one pass, then store them.

        A pass that fails is tried again in halves, so that one job's trouble is charged to that job alone.
        """
        self._end_cancelled(batch)
        rows = [row for row in rows if row[0].id in batch.open]
        if not rows:
            return
        try:
            pictures = self._sample(batch, held, rows)
        except JobCancelled:
            self._end_cancelled(batch)
            return
        except (EngineFailed, EngineOutOfMemory) as error:
            # a new error, for the caught one holds the failed pass' tensors by its traceback
            failure = type(error)(str(error))
        else:
            self._store_pass(batch, held, rows, pictures)
            return
        if len(rows) == 1:
            self._fail(batch, [rows[0][0]], failure)
            return
        middle = len(rows) // 2
        self._draw(batch, held, rows[:middle])
        self._draw(batch, held, rows[middle:])

    def _store_pass(self, batch: _Batch, held: Held, rows: Sequence[_Row], pictures: Sequence[Image.Image]) -> None:
        """Encode and store a pass' images, and finish the jobs that have all of theirs."""
        self._end_cancelled(batch)
        for (job, index), picture in zip(rows, pictures, strict=True):
            if job.id not in batch.open:
                continue
            text = infotext(job.spec, index, held.short_hashes)
            with self._timed(batch, "encode"):
                data = png(picture, text)
            self._store_image(batch, job, index, data)
            batch.sampled_with[job.id] = max(batch.sampled_with.get(job.id, 0), len(rows))
        for job in {job.id: job for job, _ in rows if job.id in batch.open}.values():
            if len(batch.images[job.id]) == job.spec.images:
                self._finish(batch, held, job)

    def _sample(self, batch: _Batch, held: Held, rows: Sequence[_Row]) -> list[Image.Image]:
        job_ids = tuple(dict.fromkeys(job.id for job, _ in rows))
        prompts = [ImagePrompt(job.spec.prompt, job.spec.negative_prompt, job.spec.seed + index) for job, index in rows]
        shape = _shape(rows[0][0].spec)

        def on_step(step: int, steps: int) -> None:
            batch.keeper.advance(job_ids, step / steps)
            batch.keeper.check(job_ids)
            self._observe(StepDone(batch.lease.fence, step, steps))

        with self._timed(batch, "sample") as clock:
            pictures = held.engine.sample(prompts, shape, on_step)
        self._observe(BatchSampled(job_ids, len(rows), shape.steps, clock()))
        return pictures

    def _store_image(self, batch: _Batch, job: Job, index: int, data: bytes) -> None:
        key = f"tenants/{job.tenant}/results/{job.id}/{batch.lease.fence}/{index}.png"
        with self._timed(batch, "upload"):
            _patiently(StoreUnavailable, lambda: self._store.put_bytes(key, data, "image/png"))
        batch.keeper.advance()
        batch.images.setdefault(job.id, []).append(
            ImageResult(
                index=index,
                key=key,
                seed=job.spec.seed + index,
                width=job.spec.width,
                height=job.spec.height,
                size_bytes=len(data),
                sha256=hashlib.sha256(data).hexdigest(),
            )
        )

    # --- outcomes -----------------------------------------------------------------------------------------------

    def _finish(self, batch: _Batch, held: Held, job: Job) -> None:
        result = JobResult(
            images=tuple(sorted(batch.images[job.id], key=lambda image: image.index)),
            loras=tuple(_named_report(report, job.spec) for report in held.reports),
            stage_s=dict(batch.stage_s),
            batch=batch.lease.fence,
            batch_size=batch.sampled_with[job.id],
            fused=held.fused,
            cache_hits=held.cache_hits,
            cache_misses=held.cache_misses,
            worker=self._settings.worker,
        )
        _patiently(QueueUnavailable, lambda: self._queue.finish(batch.lease.fence, job.id, result))
        self._ended(batch, job, JobState.SUCCEEDED)

    def _fail(self, batch: _Batch, jobs: Sequence[Job], error: FuselineError) -> None:
        for job in jobs:
            if batch.keeper.is_cancelled(job.id):
                continue
            retry_in_s = self._backoff_s(job.attempt) if error.retryable else None
            message = _named(str(error), job.spec)
            if error.blame == "server":
                _log.warning("job %s: %s: %s", job.id, error.code, message)
            told = JobError(code=error.code, message=message, retryable=error.retryable, blame=error.blame)
            call = partial(self._queue.fail, batch.lease.fence, job.id, told, retry_in_s=retry_in_s)
            state = _patiently(QueueUnavailable, call)
            if state is JobState.DELAYED:
                del batch.open[job.id]
                self._observe(JobRetried(job.id, job.pool, error.code, retry_in_s or 0.0))
            else:
                self._ended(batch, job, state, error.code)
        self._end_cancelled(batch)

    def _end_cancelled(self, batch: _Batch) -> None:
        for job in [job for job in batch.open.values() if batch.keeper.is_cancelled(job.id)]:
            _patiently(QueueUnavailable, partial(self._queue.finish_cancelled, batch.lease.fence, job.id))
            self._ended(batch, job, JobState.CANCELLED, JobCancelled.code)

    def _give_back(self, batch: _Batch) -> None:
        if batch.open:
            _patiently(QueueUnavailable, lambda: self._queue.release(batch.lease.fence, tuple(batch.open)))
            self._observe(JobsReleased(batch.lease.pool, len(batch.open)))

    def _ended(self, batch: _Batch, job: Job, state: JobState, code: str = "") -> None:
        del batch.open[job.id]
        self._observe(JobFinished(job.id, job.pool, state.value, code, time.monotonic() - batch.started))

    def _backoff_s(self, attempt: int) -> float:
        """Exponential backoff with full jitter (Brooker, AWS architecture blog 2015), never under half."""
        longest = min(self._settings.retry_max_s, self._settings.retry_base_s * 2.0 ** (attempt - 1))
        return longest * random.uniform(0.5, 1.0)  # noqa: S311 - jitter, not a secret

    def _report_to_registry(self, lease: Lease) -> None:
        info = WorkerInfo(
            self._settings.worker, lease.pool, busy=True, fused=self._fused or "", model=self._device.model or ""
        )
        with contextlib.suppress(QueueUnavailable):  # the parent renews the entry anyway
            self._queue.see_worker(info, ttl_s=self._settings.lease_s)

    @contextlib.contextmanager
    def _timed(self, batch: _Batch, stage: str) -> Iterator[Callable[[], float]]:
        started = time.monotonic()
        taken: list[float] = []
        try:
            yield lambda: taken[0]
        finally:
            taken.append(time.monotonic() - started)
            batch.stage_s[stage] = batch.stage_s.get(stage, 0.0) + taken[0]
            self._observe(StageTimed(stage, taken[0]))


def _patiently(trouble: type[FuselineError], call: Callable[[], T]) -> T:
    """Make a call that may be repeated, again after short pauses while it meets this trouble."""
    for pause_s in PATIENCE_S:
        try:
            return call()
        except trouble as error:
            _log.warning("next try in %.1f s: %s", pause_s, error)
            time.sleep(pause_s)
    return call()


def _sources(jobs: Sequence[Job]) -> dict[str, list[str]]:
    """Object keys of each LoRA's content. Jobs of one group may know it by other names, of other tenants."""
    sources: dict[str, list[str]] = {}
    for ref in (ref for job in jobs for ref in job.spec.loras):
        keys = sources.setdefault(ref.digest, [])
        if ref.key not in keys:
            keys.append(ref.key)
    return sources


def _named(text: str, spec: JobSpec) -> str:
    """Put the job's own names of its LoRAs where the device wrote digests."""
    for ref in spec.loras:
        text = text.replace(repr(ref.digest[:12]), repr(ref.name))
    return text


def _named_report(report: LoraReport, spec: JobSpec) -> LoraReport:
    names = {ref.digest: ref.name for ref in spec.loras}
    warnings = tuple(_named(warning, spec) for warning in report.warnings)
    return report.model_copy(update={"name": names[report.digest], "warnings": warnings})


def _shape(spec: JobSpec) -> Shape:
    return Shape(spec.width, spec.height, spec.steps, spec.guidance, spec.sampler)


def _passes(jobs: Sequence[Job], most: int) -> Iterator[list[_Row]]:
    """Split a lease's jobs into forward passes: rows of equal shape, at most ``most`` at once."""
    by_shape: dict[Shape, list[_Row]] = {}
    for job in jobs:
        rows = by_shape.setdefault(_shape(job.spec), [])
        rows.extend((job, index) for index in range(job.spec.images))
    for rows in by_shape.values():
        for first in range(0, len(rows), most):
            yield rows[first : first + most]
