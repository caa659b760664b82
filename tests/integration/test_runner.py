"""A worker's runner on the in-memory twins, with an engine whose faults the test chooses."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

import pytest
from PIL import Image

from core.catalogue.memory import MemoryCatalogue
from core.catalogue.records import ModelFile, ModelRecord
from core.errors import EngineBroken, EngineFailed, EngineOutOfMemory, ObjectNotFound
from core.events import BatchSampled, Event, JobFinished, JobRetried, JobsReleased
from core.job import Job, JobSpec, JobState, NewJob, OnLoraError
from core.lora import LoraRef, LoraSet
from core.queue.memory import MemoryQueue
from core.store.memory import MemoryStore
from worker.cache.files import FileCache
from worker.device import Device
from worker.engine.base import ImagePrompt, NoopEngine, OnStep, Shape
from worker.lease import LeaseKeeper
from worker.runner import Runner, RunnerSettings

Fault = Callable[[Sequence[ImagePrompt], int], None]


class FaultyEngine(NoopEngine):
    """Draws colours; before each step it asks ``fault``, which may raise or do something to the world."""

    def __init__(self) -> None:
        self.fault: Fault = lambda images, step: None

    def sample(self, images: Sequence[ImagePrompt], shape: Shape, on_step: OnStep) -> list[Image.Image]:
        def step_and_fault(step: int, steps: int) -> None:
            self.fault(images, step)
            on_step(step, steps)

        return super().sample(images, shape, step_and_fault)


class EagerKeeper(LeaseKeeper):
    """A keeper that a test can make renew at once."""

    latest: EagerKeeper

    def __enter__(self) -> Self:
        EagerKeeper.latest = self
        return super().__enter__()

    def beat(self) -> None:
        self._cancelled = self._queue.heartbeat(self.lease.fence, lease_s=self._lease_s, progress={})


class World:
    """Everything around one runner."""

    def __init__(self, tmp_path: Path) -> None:
        self.events: list[Event] = []
        self.queue_ids: list[str] = []
        self.engine = FaultyEngine()
        self.store = MemoryStore()
        self.now_ms = 1_000_000
        self.queue = MemoryQueue(now_ms=lambda: self.now_ms)
        self.catalogue = MemoryCatalogue()
        self.store.put_bytes("models/m/config.json", b"{}", "application/json")
        self.model = ModelRecord(
            name="m",
            files=(
                ModelFile(
                    path="config.json",
                    key="models/m/config.json",
                    digest=hashlib.sha256(b"{}").hexdigest(),
                    size_bytes=2,
                ),
            ),
        )
        self.catalogue.add_model(self.model)
        cache = FileCache(tmp_path / "cache", 10_000, self.store, self.events.append)
        self.device = Device(cache, lambda folder: self.engine, self.events.append)
        self.runner = Runner(
            RunnerSettings("w", "default", 15, 60, 1e12, batch_max=4, retry_base_s=2, retry_max_s=60),
            queue=self.queue,
            store=self.store,
            catalogue=self.catalogue,
            device=self.device,
            observe=self.events.append,
            end_process=lambda: self.ended.append(True),
        )
        self.ended: list[bool] = []

    def lora(self, name: str) -> LoraRef:
        data = name.encode()
        self.store.put_bytes(f"loras/{name}", data, "application/octet-stream")
        return LoraRef(hashlib.sha256(data).hexdigest(), name=name, key=f"loras/{name}", size_bytes=len(data))

    def submit(
        self,
        *loras: LoraRef,
        tenant: str = "t",
        prompt: str = "p",
        images: int = 1,
        width: int = 8,
        on_lora_error: OnLoraError = "fail",
    ) -> str:
        number = len(self.queue_ids)
        spec = JobSpec("m", self.model.digest, prompt, "", LoraSet.of(loras), width, 8, 3, 7.0, "Euler", number, images)
        job = NewJob(f"job-{number}", tenant, "default", replace(spec, on_lora_error=on_lora_error))
        self.queue_ids.append(job.id)
        return self.queue.submit(job).job_id

    def work(self, draining: Callable[[], bool] = lambda: False) -> int:
        return self.runner.work(60, draining)

    def job(self, job_id: str) -> Job:
        return self.queue.get("t", job_id)

    def states(self) -> list[str]:
        return [self.job(job_id).state.value for job_id in self.queue_ids]

    def of(self, kind: type) -> list[Event]:
        return [event for event in self.events if isinstance(event, kind)]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr("worker.runner.PATIENCE_S", (0.0, 0.0))
    return World(tmp_path)


def test_jobs_of_one_group_share_forward_passes_and_each_gets_its_images(world: World) -> None:
    ids = [world.submit(images=2), world.submit(images=1), world.submit(images=3)]
    assert world.work() == 1
    assert world.states() == ["succeeded"] * 3
    assert [event.images for event in world.of(BatchSampled) if isinstance(event, BatchSampled)] == [4, 2]
    for job_id, images in zip(ids, (2, 1, 3), strict=True):
        job = world.job(job_id)
        assert job.result is not None
        assert [image.index for image in job.result.images] == list(range(images))
        for image in job.result.images:
            data = world.store.objects[image.key]
            assert image.sha256 == hashlib.sha256(data).hexdigest()
            assert image.seed == job.spec.seed + image.index
            assert f"/{job_id}/" in image.key
            assert job.result.batch in image.key


def test_other_shapes_of_a_group_are_sampled_apart(world: World) -> None:
    for width in (8, 16, 8):
        world.submit(width=width)
    assert world.work() == 1
    assert [event.images for event in world.of(BatchSampled) if isinstance(event, BatchSampled)] == [2, 1]


def test_groups_are_drained_before_the_next(world: World) -> None:
    a, b = world.lora("a"), world.lora("b")
    for lora in (a, b, a, b, a, b):
        world.submit(lora)
    assert world.work() == 2
    assert world.states() == ["succeeded"] * 6


def test_one_jobs_failure_is_charged_to_it_alone(world: World) -> None:
    def fault(images: Sequence[ImagePrompt], step: int) -> None:
        if any(image.prompt == "poison" for image in images):
            msg = "device-side assert"
            raise EngineFailed(msg)

    world.engine.fault = fault
    ids = [world.submit(prompt=prompt) for prompt in ("a", "b", "poison", "c")]
    world.work()
    assert world.states() == ["succeeded", "succeeded", "delayed", "succeeded"]
    poison = world.job(ids[2])
    assert poison.error is not None
    assert poison.error.code == "engine_failed"
    assert len(world.of(JobRetried)) == 1


def test_too_little_memory_for_a_batch_is_nobodys_failure(world: World) -> None:
    def fault(images: Sequence[ImagePrompt], step: int) -> None:
        if len(images) > 2:
            msg = "too many"
            raise EngineOutOfMemory(msg)

    world.engine.fault = fault
    ids = [world.submit() for _ in range(4)]
    world.work()
    assert world.states() == ["succeeded"] * 4
    results = [world.job(job_id).result for job_id in ids]
    assert [result.batch_size for result in results if result] == [2, 2, 2, 2]


def test_a_draining_worker_finishes_the_pass_in_hand_and_gives_the_rest_back(world: World) -> None:
    ids = [world.submit(images=3), world.submit(images=3)]
    began = []
    world.engine.fault = lambda images, step: began.append(step)
    world.work(draining=lambda: bool(began))
    assert world.states() == ["succeeded", "queued"]
    assert world.job(ids[1]).attempt == 0
    assert world.of(JobsReleased) == [JobsReleased("default", 1)]
    world.work()
    assert world.states() == ["succeeded", "succeeded"]


def test_a_worker_that_lost_its_lease_finishes_nothing(world: World) -> None:
    ids = [world.submit(), world.submit()]

    def fault(images: Sequence[ImagePrompt], step: int) -> None:
        if step == 2 and world.job(ids[0]).state is JobState.RUNNING:
            world.now_ms += 60_000
            world.queue.reap()

    world.engine.fault = fault
    world.runner.work(0.001, lambda: False)
    assert world.of(JobFinished) == []
    assert world.states() == ["queued", "queued"]
    assert world.job(ids[0]).suspect
    world.engine.fault = lambda images, step: None
    world.work()
    assert world.states() == ["succeeded", "succeeded"]


def test_a_store_that_fails_for_a_moment_costs_nothing(world: World) -> None:
    world.submit()
    world.engine.fault = lambda images, step: world.store.fail_next(2) if step == 3 else None
    world.work()
    assert world.states() == ["succeeded"]


def test_a_store_that_fails_for_longer_delays_the_job(world: World) -> None:
    job_id = world.submit()
    world.engine.fault = lambda images, step: world.store.fail_next(3) if step == 3 else None
    world.work()
    job = world.job(job_id)
    assert job.state is JobState.DELAYED
    assert job.error is not None
    assert job.error.code == "store_unavailable"
    world.engine.fault = lambda images, step: None
    world.now_ms += 60_000
    world.queue.promote()
    world.work()
    assert world.states() == ["succeeded"]


def test_a_missing_lora_fails_its_jobs_with_its_name(world: World) -> None:
    gone = world.lora("gone")
    world.store.delete(gone.key)
    ids = [world.submit(gone), world.submit()]
    world.work()
    assert world.states() == ["failed", "succeeded"]
    error = world.job(ids[0]).error
    assert error is not None
    assert error.code == "lora_object_missing"
    assert "'gone'" in error.message
    assert not error.retryable


def test_a_job_may_go_on_without_a_lora_but_says_so(world: World) -> None:
    gone, there = world.lora("gone"), world.lora("there")
    world.store.delete(gone.key)
    ids = [world.submit(gone, there, on_lora_error=policy) for policy in ("fail", "continue")]
    world.work()
    assert world.states() == ["failed", "succeeded"]
    result = world.job(ids[1]).result
    assert result is not None
    applied = {report.name: report.applied for report in result.loras}
    assert applied == {"gone": False, "there": True}


def test_a_changed_object_is_refused(world: World) -> None:
    lora = world.lora("ink")
    world.store.put_bytes(lora.key, b"INK", "application/octet-stream")
    world.submit(lora)
    world.work()
    error = world.job("job-0").error
    assert error is not None
    assert error.code == "lora_checksum_mismatch"


def test_a_missing_model_file_is_told_apart_from_a_lora(world: World) -> None:
    world.store.delete("models/m/config.json")
    with pytest.raises(ObjectNotFound):
        world.store.stat("models/m/config.json")
    world.submit()
    world.work()
    error = world.job("job-0").error
    assert error is not None
    assert error.code == "model_object_missing"


def test_a_cancelled_job_leaves_its_batch_mates_alone(world: World) -> None:
    ids = [world.submit(), world.submit()]

    def cancel(images: Sequence[ImagePrompt], step: int) -> None:
        if step == 1:
            world.queue.cancel("t", ids[0])
            EagerKeeper.latest.beat()

    world.engine.fault = cancel
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("worker.runner.LeaseKeeper", EagerKeeper)
        world.work()
    assert world.states() == ["cancelled", "succeeded"]


def test_a_tenants_name_for_a_lora_is_not_shown_to_another(world: World) -> None:
    # Given one file that two tenants have registered under names of their own
    theirs = world.lora("ink")
    world.store.put_bytes("loras/of-b", b"ink", "application/octet-stream")
    ours = replace(theirs, name="of-b", key="loras/of-b")
    a, b = world.submit(replace(theirs, name="secret-project")), world.submit(ours, tenant="b")
    world.work()
    # Expect both in one batch, each with its own name
    results = [world.queue.get(tenant, job_id).result for tenant, job_id in (("t", a), ("b", b))]
    assert results[0] is not None
    assert results[1] is not None
    assert results[0].batch == results[1].batch
    assert [report.name for report in results[0].loras] == ["secret-project"]
    assert [report.name for report in results[1].loras] == ["of-b"]


def test_an_object_that_one_tenant_deleted_does_not_fail_anothers_job(world: World) -> None:
    theirs = world.lora("ink")
    world.store.put_bytes("loras/of-b", b"ink", "application/octet-stream")
    world.submit(theirs)
    b = world.submit(replace(theirs, name="of-b", key="loras/of-b"), tenant="b")
    world.store.delete(theirs.key)
    world.work()
    assert world.queue.get("b", b).state is JobState.SUCCEEDED


def test_an_error_names_the_lora_as_its_job_does(world: World) -> None:
    gone = world.lora("ink")
    world.store.delete(gone.key)
    ids = [(tenant, world.submit(replace(gone, name=f"of-{tenant}"), tenant=tenant)) for tenant in ("t", "b")]
    world.work()
    for tenant, job_id in ids:
        error = world.queue.get(tenant, job_id).error
        assert error is not None
        assert f"'of-{tenant}'" in error.message


def test_a_broken_device_ends_the_process_and_gives_its_jobs_another_try(world: World) -> None:
    def fault(images: Sequence[ImagePrompt], step: int) -> None:
        msg = "an illegal memory access was encountered"
        raise EngineBroken(msg)

    world.engine.fault = fault
    for _ in range(3):
        world.submit()
    world.work()
    assert world.ended == [True]
    assert world.states() == ["delayed"] * 3


def test_the_failed_pass_is_forgotten_before_its_halves_are_tried(world: World) -> None:
    # Given a pass that holds something large when it fails
    held: list[weakref.ref[Image.Image]] = []
    alive: list[bool] = []

    def fault(images: Sequence[ImagePrompt], step: int) -> None:
        alive.extend(reference() is not None for reference in held)
        if len(images) > 1:
            large = Image.new("RGB", (64, 64))
            held.append(weakref.ref(large))
            msg = "too many"
            raise EngineOutOfMemory(msg)

    world.engine.fault = fault
    for _ in range(2):
        world.submit()
    world.work()
    assert world.states() == ["succeeded"] * 2
    assert alive
    assert not any(alive)
