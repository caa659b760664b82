"""What the service needs from the outside, as protocols. Each has an in-memory twin and one contract suite."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from core.catalogue.records import LoraRecord, ModelRecord
from core.events import Event
from core.job import Job, JobError, JobResult, JobState, NewJob
from core.scheduling import Snapshot


class Clock(Protocol):
    """Wall-clock time."""

    def now_ms(self) -> int:
        """Milliseconds since the epoch."""
        ...


class Observer(Protocol):
    """Listens to events. Must not raise and must return at once."""

    def __call__(self, event: Event, /) -> None:
        """Take one event."""
        ...


# --- the queue --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Submitted:
    """Answer of a submit."""

    job_id: str
    replayed: bool
    """Whether the idempotency key named a job that existed already."""


@dataclass(frozen=True, slots=True)
class Lease:
    """Jobs of one group, held by one worker until ``expires_ms`` unless renewed."""

    fence: str
    """Token: a counter and a random part. Every later call must bring it."""
    pool: str
    group: str
    jobs: tuple[Job, ...]
    expires_ms: int


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """One line of the worker registry. ``None`` in what ``see_worker`` is given leaves that field as it was."""

    id: str
    pool: str
    busy: bool = False
    fused: str | None = None
    """Group whose weights are fused; the worker's child tells it."""
    model: str | None = None
    """Digest of the model that is loaded."""
    seen_ms: int = 0


@dataclass(frozen=True, slots=True)
class PoolStats:
    """Counters of one pool, for metrics."""

    pool: str
    queued: int
    delayed: int
    running: int
    groups: int
    leases: int
    oldest_ready_s: float
    """Age of the job at the head of the pool's ready line; 0 when none is ready."""
    tickets: int = 0
    leases_expired: int = 0
    """Leases that were ever taken back, by whatever process did it."""
    dead_letters: int = 0
    """Jobs that ever failed for good."""


@dataclass(frozen=True, slots=True)
class Reaped:
    """One lease that upkeep took back."""

    fence: str
    pool: str
    requeued: tuple[str, ...]
    failed: tuple[str, ...]
    """Jobs that crashed alone too often and are now dead."""


class JobQueue(Protocol):
    """The queue of jobs, grouped by LoRA set.

    Every call may raise ``QueueUnavailable``. Calls with a ``fence`` raise ``LeaseLost`` when that token is no
    longer the live one of the job; they then change nothing.
    """

    def submit(self, job: NewJob) -> Submitted:
        """Take a job. Raises ``IdempotencyConflict``, ``QueueFull``."""
        ...

    def get(self, tenant: str, job_id: str) -> Job:
        """Read a job of that tenant. Raises ``JobNotFound``."""
        ...

    def position(self, job: Job) -> int | None:
        """How many ready jobs of its pool are older, or ``None`` when it is not ready."""
        ...

    def cancel(self, tenant: str, job_id: str) -> Job:
        """Cancel at once if it waits, ask its worker if it runs, leave it if it is over. Raises ``JobNotFound``."""
        ...

    def snapshot(self, pool: str) -> Snapshot:
        """Show the groups of the oldest ready jobs."""
        ...

    def claim(self, pool: str, group: str, *, worker: str, limit: int, request_id: str, lease_s: float) -> Lease | None:
        """Lease up to ``limit`` jobs of a group, oldest first.

        ``None`` when the group has no ready job or may not be taken now (the bound on overtaking). A suspect job
        is leased alone. The same ``request_id`` again gives the same lease while it is live.
        """
        ...

    def heartbeat(self, fence: str, *, lease_s: float, progress: Mapping[str, float]) -> frozenset[str]:
        """Renew a lease, store progress (0 to 1 by job id), and learn which of its jobs are to be cancelled."""
        ...

    def finish(self, fence: str, job_id: str, result: JobResult) -> None:
        """End a job as succeeded."""
        ...

    def fail(self, fence: str, job_id: str, error: JobError, *, retry_in_s: float | None) -> JobState:
        """End a run as failed: retried after a delay while attempts are left and ``retry_in_s`` is given."""
        ...

    def finish_cancelled(self, fence: str, job_id: str) -> None:
        """End a job as cancelled, as its owner asked."""
        ...

    def release(self, fence: str, job_ids: Sequence[str]) -> None:
        """Give jobs back to the head of their line without counting an attempt."""
        ...

    def reap(self, *, limit: int = 100) -> tuple[Reaped, ...]:
        """Take back leases that have expired. Any number of callers is harmless."""
        ...

    def promote(self, *, limit: int = 100) -> int:
        """Put delayed jobs that are due back in line; say how many."""
        ...

    def see_worker(self, info: WorkerInfo, *, ttl_s: float) -> None:
        """Enter or renew a worker in the registry."""
        ...

    def forget_worker(self, worker: str) -> None:
        """Take a worker out of the registry."""
        ...

    def workers(self) -> tuple[WorkerInfo, ...]:
        """List the workers whose entry has not lapsed."""
        ...

    def stats(self) -> tuple[PoolStats, ...]:
        """Count, by pool. O(pools)."""
        ...

    def ping(self) -> None:
        """Raise ``QueueUnavailable`` unless the queue answers."""
        ...


# --- objects ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ObjectStat:
    """What the store says of an object."""

    key: str
    size_bytes: int


class ObjectStore(Protocol):
    """Objects under keys such as ``tenants/a/loras/x.safetensors``.

    Every call may raise ``StoreUnavailable`` (try again), ``StoreDenied`` and ``InvalidKey``; calls that read raise
    ``ObjectNotFound``.
    """

    def stat(self, key: str) -> ObjectStat:
        """Ask for an object's size."""
        ...

    def get_file(self, key: str, path: Path) -> None:
        """Download an object into a new file; large ones in parallel parts."""
        ...

    def get_bytes(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        """Read an object or a part of it."""
        ...

    def put_file(self, key: str, path: Path, content_type: str) -> None:
        """Upload a file; large ones in parts. Readers see all of it or nothing."""
        ...

    def put_bytes(self, key: str, data: bytes, content_type: str) -> None:
        """Upload bytes. Readers see all of them or nothing."""
        ...

    def list(self, prefix: str) -> Iterator[ObjectStat]:
        """List the objects whose key begins with a prefix, in key order."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object; none of that key is no error."""
        ...

    def url(self, key: str, *, expires_s: int) -> str:
        """Make a URL that reads the object until it expires."""
        ...


# --- the catalogue ----------------------------------------------------------------------------------------------


class Catalogue(Protocol):
    """LoRAs and models that jobs may name. A tenant sees its own LoRAs and the public ones."""

    def add_lora(self, record: LoraRecord) -> None:
        """Enter a LoRA. Raises ``NameTaken`` if the owner has another one of that name."""
        ...

    def get_lora(self, tenant: str, name: str) -> LoraRecord:
        """Find a LoRA by name among the tenant's own, then the public ones. Raises ``UnknownLora``."""
        ...

    def list_loras(self, tenant: str) -> Iterable[LoraRecord]:
        """List the LoRAs that a tenant may use, by name."""
        ...

    def add_model(self, record: ModelRecord) -> None:
        """Enter or replace a model."""
        ...

    def get_model(self, name: str) -> ModelRecord:
        """Find a model by name. Raises ``UnknownModel``."""
        ...

    def get_model_version(self, digest: str) -> ModelRecord:
        """Find a model by its content, also after its name was given to another. Raises ``UnknownModel``."""
        ...

    def list_models(self) -> Iterable[ModelRecord]:
        """List the models, by name."""
        ...
