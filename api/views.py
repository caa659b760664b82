"""What answers look like: what callers may see of jobs, LoRAs and models, and nothing else."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict

from api.problems import title_of
from core.catalogue.records import PUBLIC, LoraRecord, ModelRecord
from core.job import ImageResult, Job, JobError, JobResult, JobSpec, JobState, LoraReport, OnLoraError
from core.lora import LoraRef
from core.queue.rules import WORKER_LOST


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class ResolvedLora(_Answer):
    """A LoRA as the job uses it."""

    name: str
    digest: str
    """SHA-256 of the file."""
    unet: float
    te: float

    @classmethod
    def of(cls, ref: LoraRef) -> Self:
        """Show a reference, without its place in the store."""
        return cls(name=ref.name, digest=ref.digest, unet=ref.unet, te=ref.te)


class ResolvedJob(_Answer):
    """What a job draws, with all defaults filled in."""

    model: str
    model_digest: str
    prompt: str
    """Without its tags."""
    negative_prompt: str
    loras: list[ResolvedLora]
    width: int
    height: int
    steps: int
    guidance: float
    sampler: str
    seed: int
    images: int
    format: str
    on_lora_error: OnLoraError
    metadata: dict[str, str]

    @classmethod
    def of(cls, spec: JobSpec) -> Self:
        """Show a job's spec."""
        fields = {name: getattr(spec, name) for name in cls.model_fields if name not in {"loras", "metadata"}}
        loras = [ResolvedLora.of(ref) for ref in spec.loras]
        return cls(**fields, loras=loras, metadata=dict(spec.metadata))


class Accepted(_Answer):
    """The queue has the job. A replay of the same idempotency key gets the same answer."""

    id: str
    state: Literal["queued"] = "queued"
    request: ResolvedJob


class ImageView(_Answer):
    """One image of a finished job."""

    index: int
    url: str
    """Reads the image until ``url_expires``; made anew at each request."""
    url_expires: datetime
    seed: int
    width: int
    height: int
    size_bytes: int
    sha256: str

    @classmethod
    def of(cls, image: ImageResult, url: str, url_expires: datetime) -> Self:
        """Show an image, without its place in the store."""
        return cls(url=url, url_expires=url_expires, **image.model_dump(exclude={"key"}))


class ResultView(_Answer):
    """What a run left besides its images. Jobs of one batch share most of it."""

    loras: list[LoraReport]
    """What became of each LoRA: every key of its file is counted once."""
    stage_s: dict[str, float]
    """Seconds by stage, of the whole batch."""
    batch: str
    """Equal for jobs that a worker took together."""
    batch_size: int
    """Images that were sampled in one forward pass."""
    fused: bool
    """Whether weights were rewritten for the batch."""
    cache_hits: int
    cache_misses: int

    @classmethod
    def of(cls, result: JobResult) -> Self:
        """Show a result, without the lease's token and the worker's name."""
        fields = result.model_dump(exclude={"images", "loras", "batch", "worker"})
        batch = hashlib.sha256(result.batch.encode()).hexdigest()[:16]
        return cls(loras=list(result.loras), batch=batch, **fields)


class JobView(_Answer):
    """A job as it is now. Times are null until they come."""

    id: str
    state: JobState
    priority: int
    request: ResolvedJob
    created: datetime
    ready: datetime | None
    """Since when it may run; a retry sets it anew."""
    started: datetime | None
    finished: datetime | None
    retry_at: datetime | None
    """When a delayed job becomes ready again."""
    waited_s: float | None
    """From ready to started."""
    ran_s: float | None
    """From started to finished."""
    queue_position: int | None
    """How many ready jobs are older, while it is queued."""
    progress: float
    """0 to 1."""
    attempt: int
    max_attempts: int
    cancel_requested: bool
    overtaken_by: float
    """Cost of later jobs that ran first (steps × pixels × images)."""
    error: JobError | None
    """Why it failed, or failed last. Where the blame is the server's, the message is the same for all of its code."""
    images: list[ImageView]
    result: ResultView | None
    """What its run left, once it succeeded."""

    @classmethod
    def of(cls, job: Job, *, position: int | None, images: list[ImageView]) -> Self:
        """Show a job."""
        return cls(
            id=job.id,
            state=job.state,
            priority=job.priority,
            request=ResolvedJob.of(job.spec),
            created=_time(job.created_ms),
            ready=_time_or_none(job.ready_ms),
            started=_time_or_none(job.started_ms),
            finished=_time_or_none(job.finished_ms),
            retry_at=_time_or_none(job.due_ms) if job.state is JobState.DELAYED else None,
            waited_s=_seconds(job.ready_ms, job.started_ms),
            ran_s=_seconds(job.started_ms, job.finished_ms),
            queue_position=position,
            progress=1.0 if job.state is JobState.SUCCEEDED else job.progress,
            attempt=job.attempt,
            max_attempts=job.max_attempts,
            cancel_requested=job.cancel_requested,
            overtaken_by=job.overtaken_by,
            error=_shown(job.error) if job.error else None,
            images=images,
            result=ResultView.of(job.result) if job.result else None,
        )


class LoraView(_Answer):
    """A LoRA that jobs may name."""

    name: str
    public: bool
    """Whether every tenant may use it."""
    digest: str
    size_bytes: int
    base: str
    """What its metadata says it was trained on."""
    trigger_words: list[str]
    default_scale: float
    tensors: int
    created: datetime

    @classmethod
    def of(cls, record: LoraRecord) -> Self:
        """Show a record, without its place in the store."""
        return cls(
            public=record.owner == PUBLIC,
            trigger_words=list(record.trigger_words),
            created=_time(record.created_ms),
            **record.model_dump(include={"name", "digest", "size_bytes", "base", "default_scale", "tensors"}),
        )


class LoraList(_Answer):
    """The caller's own LoRAs and the public ones, by name."""

    loras: list[LoraView]


class ModelView(_Answer):
    """A model, with what jobs get that do not say otherwise."""

    name: str
    digest: str
    pool: str
    size_bytes: int
    steps: int
    guidance: float
    sampler: str
    width: int
    height: int
    size_multiple: int
    """Width and height must be multiples of it."""
    max_pixels: int
    """Most that width × height may be."""

    @classmethod
    def of(cls, record: ModelRecord) -> Self:
        """Show a record, without its files."""
        fields = record.model_dump(exclude={"files"})
        return cls(digest=record.digest, size_bytes=sum(file.size_bytes for file in record.files), **fields)


class ModelList(_Answer):
    """The registered models, by name."""

    models: list[ModelView]


class Health(_Answer):
    """Every part answers."""

    status: Literal["ok"] = "ok"


def _shown(error: JobError) -> JobError:
    """Show an error. A message about the server may name hosts and paths, so its code's title stands for it."""
    if error.blame == "client" or error == WORKER_LOST:
        return error
    return error.model_copy(update={"message": f"{title_of(error.code)}."})


def _time(epoch_ms: int) -> datetime:
    return datetime.fromtimestamp(epoch_ms / 1000, UTC)


def _time_or_none(epoch_ms: int) -> datetime | None:
    return _time(epoch_ms) if epoch_ms else None


def _seconds(start_ms: int, end_ms: int) -> float | None:
    return max(0, end_ms - start_ms) / 1000 if start_ms and end_ms else None
