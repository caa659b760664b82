"""What one device holds: a model, and the LoRA set that is fused into its weights."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from core.catalogue.records import ModelRecord
from core.errors import (
    ChecksumMismatch,
    EngineOutOfMemory,
    FuselineError,
    LoraChecksumMismatch,
    LoraError,
    LoraObjectMissing,
    ModelInvalid,
    ModelObjectMissing,
    ObjectNotFound,
)
from core.events import Fused, ModelLoaded, StageTimed
from core.job import LoraReport
from core.lora import LoraRef, LoraSet
from core.ports import Observer
from worker.cache.files import FileCache, Need
from worker.engine.base import Engine
from worker.lora.file import LoadedLora, read
from worker.lora.fuse import Fuser

SHORT_HASH_DIGITS = 12
_LENGTH_BYTES = 8
"""A safetensors file begins with the length of its header, little-endian."""

EngineLoader = Callable[[Path], Engine]
"""Loads a checkpoint from a folder."""


@dataclass(frozen=True, slots=True)
class Held:
    """The device, ready to draw with one model and one LoRA set."""

    engine: Engine
    reports: tuple[LoraReport, ...]
    """One per LoRA of the set, also for those that could not be applied."""
    problems: Mapping[str, LoraError]
    """Digest of each LoRA that could not be applied, and why."""
    short_hashes: Mapping[str, str]
    """LoRA digest → first 12 hex digits of its AutoV3 hash."""
    fused: bool
    """Whether weights were rewritten to get here."""
    cache_hits: int = 0
    cache_misses: int = 0
    stage_s: Mapping[str, float] = field(default_factory=dict)


class Device:
    """One device of this process. ``hold`` is the only way to change what it holds."""

    def __init__(self, cache: FileCache, load_engine: EngineLoader, observe: Observer) -> None:
        self._cache = cache
        self._load_engine = load_engine
        self._observe = observe
        self._model: str | None = None
        self._engine: Engine | None = None
        self._fuser: Fuser | None = None
        self._short_hashes: dict[str, str] = {}
        self._held: Held | None = None
        self._set: str | None = None
        self._stage_s: dict[str, float] = {}

    @property
    def model(self) -> str | None:
        """Digest of the model that is loaded."""
        return self._model

    def hold(self, model: ModelRecord, loras: LoraSet, sources: Mapping[str, Sequence[str]], *, partial: bool) -> Held:
        """Bring a model and a LoRA set onto the device.

        ``sources``: LoRA digest → object keys that hold that content; the first that works is used. Reports and
        messages name a LoRA by the first 12 digits of its digest: whose name it bears is the caller's to say.

        With ``partial``, LoRAs that cannot be applied are left out and told in ``problems``; without it the first
        such error is raised, and the weights are those of the base model or of the set before. Raises ``LoraError``,
        ``ModelError``, ``StoreError``, ``CacheTooSmall``.
        """
        self._stage_s = {}
        engine = self._load(model)
        if self._held is not None and self._set == loras.id and (partial or not self._held.problems):
            return _again(self._held)
        self._held = self._set = None
        anonymous = LoraSet(tuple(replace(ref, name="") for ref in loras))
        try:
            held = self._apply(engine, anonymous, sources, partial=partial)
        except torch.OutOfMemoryError as error:
            msg = f"{len(loras)} LoRAs do not fit into the device's memory beside the model"
            raise EngineOutOfMemory(msg) from error
        self._held, self._set = held, loras.id
        return held

    def _load(self, model: ModelRecord) -> Engine:
        if self._engine is not None and self._model == model.digest:
            return self._engine
        self._model = self._engine = self._fuser = self._held = self._set = None
        needs = [Need(file.key, file.digest, file.size_bytes, "model") for file in model.files]
        with self._timed("model"), _model_errors(model), self._cache.files(needs) as paths:
            started = time.monotonic()
            with tempfile.TemporaryDirectory(prefix="model-") as folder:
                for file in model.files:
                    link = _inside(Path(folder), file.path)
                    link.parent.mkdir(parents=True, exist_ok=True)
                    link.symlink_to(paths[file.digest].resolve())
                engine = self._load_engine(Path(folder))
            self._observe(ModelLoaded(model=model.name, seconds=time.monotonic() - started))
        if engine.components:
            self._fuser = Fuser(engine.components)
        self._model, self._engine = model.digest, engine
        return engine

    def _apply(self, engine: Engine, loras: LoraSet, sources: Mapping[str, Sequence[str]], *, partial: bool) -> Held:
        problems: dict[str, LoraError] = {}
        hits: list[bool] = []
        with contextlib.ExitStack() as pinned:
            with self._timed("fetch"):
                paths = self._fetch(loras, sources, pinned, problems, hits)
            with self._timed("fuse"):
                loaded = self._read(loras, paths, problems)
                if problems and not partial:
                    raise next(iter(problems.values()))
                fused = self._fuse(loras, loaded)
            hashes = {digest: self._short_hash(digest, path) for digest, path in paths.items() if digest in loaded}
        reports = tuple(
            loaded[ref.digest].report if ref.digest in loaded else _refused(ref, problems.get(ref.digest))
            for ref in loras
        )
        return Held(
            engine=engine,
            reports=reports,
            problems=problems,
            short_hashes=hashes,
            fused=fused,
            cache_hits=sum(hits),
            cache_misses=len(hits) - sum(hits),
            stage_s=dict(self._stage_s),
        )

    def _fetch(
        self,
        loras: LoraSet,
        sources: Mapping[str, Sequence[str]],
        pinned: contextlib.ExitStack,
        problems: dict[str, LoraError],
        hits: list[bool],
    ) -> dict[str, Path]:
        needs = [Need(sources[ref.digest][0], ref.digest, ref.size_bytes, "lora") for ref in loras]
        hits.extend(self._cache.holds(need) for need in needs)
        try:
            return dict(pinned.enter_context(self._cache.files(needs)))
        except (ObjectNotFound, ChecksumMismatch):
            return self._fetch_singly(loras, sources, pinned, problems)

    def _fetch_singly(
        self,
        loras: LoraSet,
        sources: Mapping[str, Sequence[str]],
        pinned: contextlib.ExitStack,
        problems: dict[str, LoraError],
    ) -> dict[str, Path]:
        paths: dict[str, Path] = {}
        for ref in loras:
            for key in sources[ref.digest]:
                need = Need(key, ref.digest, ref.size_bytes, "lora")
                try:
                    paths.update(pinned.enter_context(self._cache.files([need])))
                    problems.pop(ref.digest, None)
                    break
                except ObjectNotFound:
                    msg = f"LoRA {ref.digest[:12]!r}: its object is gone from the store; upload and register it again"
                    problems[ref.digest] = LoraObjectMissing(msg)
                except ChecksumMismatch:
                    msg = f"LoRA {ref.digest[:12]!r}: its object changed after it was registered; register it again"
                    problems[ref.digest] = LoraChecksumMismatch(msg)
        return paths

    def _read(self, loras: LoraSet, paths: Mapping[str, Path], problems: dict[str, LoraError]) -> dict[str, LoadedLora]:
        loaded: dict[str, LoadedLora] = {}
        if self._fuser is None:
            return loaded
        for ref in loras:
            if ref.digest not in paths:
                continue
            try:
                loaded[ref.digest] = read(paths[ref.digest], ref, self._fuser.index)
            except LoraError as error:
                problems[ref.digest] = error
        return loaded

    def _fuse(self, loras: LoraSet, loaded: Mapping[str, LoadedLora]) -> bool:
        if self._fuser is None:
            return False
        stats = self._fuser.apply([loaded[ref.digest] for ref in loras if ref.digest in loaded])
        if stats.modules:
            self._observe(Fused(group=loras.id, loras=len(loaded), modules=stats.modules, seconds=stats.seconds))
        return stats.modules > 0

    def _short_hash(self, digest: str, path: Path) -> str:
        """First 12 hex digits of the SHA-256 of all bytes behind the safetensors header: what A1111 calls a LoRA."""
        if digest not in self._short_hashes:
            with path.open("rb") as file:
                file.seek(_LENGTH_BYTES + int.from_bytes(file.read(_LENGTH_BYTES), "little"))
                self._short_hashes[digest] = hashlib.file_digest(file, "sha256").hexdigest()[:SHORT_HASH_DIGITS]
        return self._short_hashes[digest]

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - started
            self._stage_s[stage] = seconds
            self._observe(StageTimed(stage=stage, seconds=seconds))


def _again(held: Held) -> Held:
    return Held(held.engine, held.reports, held.problems, held.short_hashes, fused=False)


def _refused(ref: LoraRef, error: FuselineError | None) -> LoraReport:
    warnings = (f"{error.code}: {error}",) if error else ()
    return LoraReport(
        name=ref.name, digest=ref.digest, unet=ref.unet, te=ref.te, warnings=warnings, applied=error is None
    )


@contextlib.contextmanager
def _model_errors(model: ModelRecord) -> Iterator[None]:
    try:
        yield
    except ObjectNotFound as error:
        msg = f"model {model.name!r}: {error}; register the model again"
        raise ModelObjectMissing(msg) from error
    except ChecksumMismatch as error:
        msg = f"model {model.name!r}: {error}; register the model again"
        raise ModelInvalid(msg) from error


def _inside(folder: Path, relative: str) -> Path:
    path = folder / relative
    if Path(relative).is_absolute() or ".." in Path(relative).parts:
        msg = f"model file path {relative!r} leaves the model's folder"
        raise ModelInvalid(msg)
    return path
