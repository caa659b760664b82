"""An API on in-memory twins, with what a test needs to look behind it."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi.testclient import TestClient

from api.access import Access
from api.app import create_app
from api.context import Context, Limits
from core.catalogue.memory import MemoryCatalogue
from core.catalogue.records import PUBLIC, LoraRecord, ModelFile, ModelRecord
from core.events import Event
from core.job import ImageResult, Job, JobResult, LoraReport
from core.ports import Catalogue, JobQueue, Lease, ObjectStore
from core.queue.memory import MemoryQueue
from core.store.memory import MemoryStore
from core.telemetry.metrics import Metrics

INK, CHALK, WASH = "1" * 64, "2" * 64, "3" * 64
TOKENS = "ann=ann-secret-token,bob=bob-secret-token"
ANN, BOB = {"Authorization": "Bearer ann-secret-token"}, {"Authorization": "Bearer bob-secret-token"}

SHAPES = ModelRecord(
    name="shapes",
    files=(ModelFile(path="unet/x.safetensors", key="models/x", digest="a" * 64, size_bytes=5),),
    steps=12,
    guidance=3.0,
    sampler="DPM++ 2M",
    width=64,
    height=64,
    max_pixels=256 * 256,
)


@dataclass
class SentTickets:
    """Remembers the pools that tickets went to."""

    pools: list[str] = field(default_factory=list)

    def send(self, pool: str) -> None:
        self.pools.append(pool)


@dataclass
class Parts:
    """The parts behind one API."""

    access: Access = field(default_factory=Access)
    limits: Limits = field(default_factory=Limits)
    queue: JobQueue = field(default_factory=MemoryQueue)
    store: ObjectStore = field(default_factory=MemoryStore)
    catalogue: Catalogue = field(default_factory=MemoryCatalogue)
    tickets: SentTickets = field(default_factory=SentTickets)
    events: list[Event] = field(default_factory=list)
    metrics: Metrics = field(default_factory=Metrics)

    @property
    def context(self) -> Context:
        return Context(
            queue=self.queue,
            store=self.store,
            catalogue=self.catalogue,
            tickets=self.tickets,
            metrics=self.metrics,
            observe=self.events.append,
            access=self.access,
            limits=self.limits,
            draw_seed=lambda: 1234,
        )

    def client(self, **more: Any) -> TestClient:
        return self.client_of(self.context, **more)

    @staticmethod
    def client_of(context: Context, **more: Any) -> TestClient:
        return TestClient(create_app(context), **more)

    @property
    def queued(self) -> int:
        return sum(stats.queued for stats in self.queue.stats())

    def take(self, job_id: str, tenant: str = "default") -> tuple[Job, Lease]:
        """Be the worker that claims a job."""
        job = self.queue.get(tenant, job_id)
        lease = self.queue.claim(job.pool, job.group, worker="w1", limit=1, request_id=f"r-{job_id}", lease_s=60)
        assert lease is not None
        assert [held.id for held in lease.jobs] == [job_id]
        return job, lease

    def draw(self, job_id: str, tenant: str = "default") -> None:
        """Be the worker that finishes a job with one image."""
        job, lease = self.take(job_id, tenant)
        key = f"results/{tenant}/{job_id}/{lease.fence}/0.png"
        self.store.put_bytes(key, b"PNG", "image/png")
        image = ImageResult(index=0, key=key, seed=job.spec.seed, width=64, height=64, size_bytes=3, sha256="c" * 64)
        reports = tuple(
            LoraReport(name=ref.name, digest=ref.digest, unet=ref.unet, te=ref.te, keys_matched=8)
            for ref in job.spec.loras
        )
        result = JobResult(images=(image,), loras=reports, stage_s={"sample": 0.5}, fused=True, worker="w1")
        self.queue.finish(lease.fence, job_id, result)


def with_catalogue(parts: Parts) -> Parts:
    """Enter one model and three LoRAs: one public, one of the open tenant and of ann each."""
    parts.catalogue.add_model(SHAPES)
    for name, owner, digest in (("ink", PUBLIC, INK), ("chalk", "default", CHALK), ("水彩", "ann", WASH)):
        key = f"{owner}/{name}.safetensors" if owner == PUBLIC else f"tenants/{owner}/{name}.safetensors"
        parts.catalogue.add_lora(
            LoraRecord(name=name, owner=owner, key=key, digest=digest, size_bytes=9, default_scale=0.7)
        )
    return parts


def safetensors(metadata: Mapping[str, str] | None = None, name: str = "lora_unet_x.alpha") -> bytes:
    """Write a safetensors file of one number."""
    header = {"__metadata__": dict(metadata or {}), name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"\0\0\x80?"


def chunks(data: bytes, size: int = 4096) -> Iterator[bytes]:
    """Cut a body up, so that it is sent without Content-Length."""
    for start in range(0, len(data), size):
        yield data[start : start + size]
