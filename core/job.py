"""A job: what is asked for, what became of it, and which states may follow which."""

from __future__ import annotations

import enum
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict

from core.lora import LoraSet

OnLoraError = Literal["fail", "continue"]


class JobState(enum.StrEnum):
    """Where a job is in its life."""

    QUEUED = "queued"
    """Ready, in its group's line."""
    DELAYED = "delayed"
    """Waits for its retry's due time."""
    RUNNING = "running"
    """Leased to a worker."""
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        """Whether nothing can follow."""
        return not TRANSITIONS[self]


TRANSITIONS: Mapping[JobState, frozenset[JobState]] = MappingProxyType(
    {
        JobState.QUEUED: frozenset({JobState.RUNNING, JobState.CANCELLED}),
        JobState.DELAYED: frozenset({JobState.QUEUED, JobState.CANCELLED}),
        JobState.RUNNING: frozenset(
            {JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.DELAYED, JobState.QUEUED}
        ),
        JobState.SUCCEEDED: frozenset(),
        JobState.FAILED: frozenset(),
        JobState.CANCELLED: frozenset(),
    }
)


@dataclass(frozen=True, slots=True)
class JobSpec:
    """What one job draws, with nothing left to decide: its images do not depend on when or where it runs."""

    model: str
    """Name of the model, for people."""
    model_digest: str
    """Content of the model: what identifies it."""
    prompt: str
    """The prompt without its tags."""
    negative_prompt: str
    loras: LoraSet
    width: int
    """Pixels."""
    height: int
    """Pixels."""
    steps: int
    guidance: float
    """Classifier-free guidance scale (Ho and Salimans 2022, written as in Imagen: 1 = no guidance)."""
    sampler: str
    seed: int
    """Seed of the first image; image i uses seed + i."""
    images: int
    format: Literal["png"] = "png"
    on_lora_error: OnLoraError = "fail"
    metadata: Mapping[str, str] = field(default_factory=dict)
    """The caller's own labels, given back unchanged."""

    @property
    def cost(self) -> int:
        """Steps × pixels × images: the unit in which fairness and overtaking are counted."""
        return self.steps * self.width * self.height * self.images

    @property
    def group(self) -> str:
        """32 hex digits: jobs of one group need the same model with the same LoRAs at the same scales."""
        return hashlib.sha256(f"{self.model_digest}:{self.loras.id}".encode()).hexdigest()[:32]

    def to_json(self) -> str:
        """Give the job's payload as stored in the queue."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        fields["loras"] = self.loras.to_json()
        fields["metadata"] = dict(self.metadata)
        return json.dumps(fields, ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read what ``to_json`` gave. Fields of a later release are ignored."""
        raw: dict[str, Any] = json.loads(text)
        fields = {name: raw[name] for name in cls.__slots__ if name in raw}
        fields["loras"] = LoraSet.from_json(fields["loras"])
        return cls(**fields)


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class ImageResult(_Record):
    """One stored image."""

    index: int
    key: str
    """Object key in the store."""
    seed: int
    width: int
    height: int
    size_bytes: int
    sha256: str


class LoraReport(_Record):
    """What became of one LoRA of the job: every key of its file is in exactly one of the three counts."""

    name: str
    digest: str
    unet: float
    te: float
    type: str = ""
    """Adapter type, such as ``lora``."""
    keys_matched: int = 0
    keys_extra: int = 0
    """Known keys that change no weight."""
    keys_unmatched: int = 0
    modules: int = 0
    """Modules whose weights it changes."""
    trigger_words: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    applied: bool = True


class JobResult(_Record):
    """What a finished job leaves: its manifest."""

    images: tuple[ImageResult, ...] = ()
    loras: tuple[LoraReport, ...] = ()
    stage_s: Mapping[str, float] = {}
    """Seconds by stage: fetch, fuse, encode_prompt, sample, decode, encode, upload. Shared by a batch's jobs."""
    batch: str = ""
    """Token of the lease under which it ran: equal for jobs that were claimed together."""
    batch_size: int = 1
    """Images that were sampled in one forward pass with this job's."""
    fused: bool = False
    """Whether weights were rewritten for this job's batch."""
    cache_hits: int = 0
    cache_misses: int = 0
    worker: str = ""


class JobError(_Record):
    """Why a job failed, or failed last."""

    code: str
    message: str
    retryable: bool = False
    blame: Literal["client", "server"] = "server"


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job as submit hands it to the queue."""

    id: str
    tenant: str
    pool: str
    spec: JobSpec
    priority: int = 0
    """Higher runs earlier, as bounded credit: -10 to 10."""
    max_attempts: int = 5
    idempotency_key: str | None = None
    body_hash: str = ""
    """Hash of the request's body, compared when the idempotency key comes again."""


@dataclass(frozen=True, slots=True)
class Job:
    """A job as the queue holds it. Times are milliseconds since the epoch, by Redis' clock; 0 = not yet."""

    id: str
    tenant: str
    pool: str
    group: str
    spec: JobSpec
    state: JobState
    priority: int = 0
    tag: float = 0.0
    """Start-time fair queueing tag, in cost units."""
    seq: int = 0
    """Order of submission."""
    attempt: int = 0
    """Runs that were started and counted."""
    crashes: int = 0
    """Runs that ended with a lost lease while the job ran alone."""
    max_attempts: int = 5
    suspect: bool = False
    """Its last lease was lost: runs alone."""
    fence: str = ""
    """Token of the live lease; empty unless running."""
    worker: str = ""
    cancel_requested: bool = False
    overtaken_by: float = 0.0
    """Cost of later jobs that were claimed while this one was ready."""
    progress: float = 0.0
    """0 to 1 while running."""
    created_ms: int = 0
    ready_ms: int = 0
    started_ms: int = 0
    finished_ms: int = 0
    due_ms: int = 0
    error: JobError | None = None
    result: JobResult | None = None
