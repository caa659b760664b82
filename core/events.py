"""What happens to jobs, as frozen records. Metrics, logs and tests listen to these; nothing else reports.

Durations are seconds, sizes bytes. An event names things that happened, in the past tense.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class JobSubmitted:
    """The queue took a job."""

    job_id: str
    pool: str
    group: str


@dataclass(frozen=True, slots=True)
class SubmitRejected:
    """A submit was refused before it became a job."""

    reason: str
    """Error code."""


@dataclass(frozen=True, slots=True)
class BatchClaimed:
    """A worker leased jobs of one group."""

    pool: str
    group: str
    fence: str
    job_ids: tuple[str, ...]
    waited_s: tuple[float, ...]
    """Per job: from ready to claimed."""


@dataclass(frozen=True, slots=True)
class CacheUsed:
    """A file was asked of the cache."""

    kind: str
    """``lora`` or ``model``."""
    hit: bool
    size_bytes: int


@dataclass(frozen=True, slots=True)
class CacheEvicted:
    """A file left the cache to make room."""

    size_bytes: int


@dataclass(frozen=True, slots=True)
class CacheSized:
    """The cache's total changed."""

    used_bytes: int
    budget_bytes: int


@dataclass(frozen=True, slots=True)
class FileFetched:
    """A file came from the store."""

    kind: str
    size_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class ModelLoaded:
    """A checkpoint was loaded onto the device."""

    model: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Fused:
    """Weights were rewritten for a LoRA set."""

    group: str
    loras: int
    modules: int
    seconds: float


@dataclass(frozen=True, slots=True)
class StageTimed:
    """A stage of a batch took so long."""

    stage: str
    seconds: float


@dataclass(frozen=True, slots=True)
class BatchSampled:
    """One forward batch was sampled."""

    job_ids: tuple[str, ...]
    images: int
    steps: int
    seconds: float


@dataclass(frozen=True, slots=True)
class StepDone:
    """One denoising step of a batch is done."""

    fence: str
    step: int
    steps: int


@dataclass(frozen=True, slots=True)
class JobFinished:
    """A job reached a terminal state through a worker."""

    job_id: str
    pool: str
    outcome: str
    """``succeeded``, ``failed`` or ``cancelled``."""
    code: str
    """Error code, empty when it succeeded."""
    seconds: float
    """From claimed to finished."""


@dataclass(frozen=True, slots=True)
class JobRetried:
    """A failed run will be tried again."""

    job_id: str
    pool: str
    code: str
    delay_s: float


@dataclass(frozen=True, slots=True)
class JobsReleased:
    """Jobs were given back without an attempt."""

    pool: str
    count: int


@dataclass(frozen=True, slots=True)
class LeaseExpired:
    """Upkeep took the jobs of a lease that was not renewed."""

    pool: str
    jobs: int


@dataclass(frozen=True, slots=True)
class StaleFinish:
    """A result came with a token that was no longer live and was refused."""

    job_id: str
    pool: str


Event = (
    JobSubmitted
    | SubmitRejected
    | BatchClaimed
    | CacheUsed
    | CacheEvicted
    | CacheSized
    | FileFetched
    | ModelLoaded
    | Fused
    | StageTimed
    | BatchSampled
    | StepDone
    | JobFinished
    | JobRetried
    | JobsReleased
    | LeaseExpired
    | StaleFinish
)
