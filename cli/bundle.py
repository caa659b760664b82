"""Registers models and LoRAs from local folders: uploads the files, enters them into the catalogue."""

from __future__ import annotations

import contextlib
import hashlib
import mimetypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import redis

from cli.stack import Stack
from core.catalogue.records import ModelFile, ModelRecord
from core.catalogue.redis import RedisCatalogue
from core.errors import LoraError, NameTaken, QueueUnavailable
from core.ports import Catalogue, ObjectStore
from core.store.open import open_store

SHAPES = Path(__file__).resolve().parent.parent / "examples" / "shapes"
"""The bundle that comes with the project: a tiny model of drawn shapes and its LoRAs."""

MODEL = "shapes"
"""Name under which a bundle's model is registered."""

MODEL_FILES = {".json", ".txt", ".safetensors"}
"""Endings of the files that a checkpoint in diffusers layout consists of."""

_DEFAULTS = {"steps": 12, "guidance": 3.0, "sampler": "DPM++ 2M", "width": 64, "height": 64, "max_pixels": 256 * 256}


def register_model(store: ObjectStore, catalogue: Catalogue, folder: Path, name: str, **defaults: Any) -> ModelRecord:
    """Upload a checkpoint folder in diffusers layout and enter it. ``defaults``: fields of ``ModelRecord``."""
    files = []
    for path in sorted(path for path in folder.rglob("*") if path.suffix in MODEL_FILES):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        relative = path.relative_to(folder).as_posix()
        key = f"models/{name}/{digest[:16]}/{relative}"
        store.put_file(key, path, mimetypes.guess_type(path.name)[0] or "application/octet-stream")
        files.append(ModelFile(path=relative, key=key, digest=digest, size_bytes=path.stat().st_size))
    record = ModelRecord(name=name, files=tuple(files), **defaults)
    catalogue.add_model(record)
    return record


def lora_files(bundle: Path) -> list[Path]:
    """List a bundle's LoRA files; each is registered under its stem."""
    return sorted((bundle / "loras").glob("*.safetensors"))


def register_lora(stack: Stack, store: ObjectStore, path: Path) -> None:
    """Upload a LoRA file and register it at a running stack's API under its stem.

    Raises ``NameTaken`` if another file has that name, ``LoraError`` if the API refuses it, ``QueueUnavailable`` if
    the API does not answer.
    """
    name, digest = path.stem, hashlib.sha256(path.read_bytes()).hexdigest()
    # another file gets another key: whoever reads the catalogue's key finds the bytes that were registered
    key = f"public/loras/{name}/{digest[:16]}.safetensors"
    store.put_file(key, path, "application/octet-stream")
    try:
        answer = httpx.post(f"{stack.api_url}/v1/loras", json={"name": name, "key": key}, timeout=30)
    except httpx.HTTPError as error:
        msg = f"the API did not answer when the LoRA {name!r} was registered ({error}); see {stack.log('api')}"
        raise QueueUnavailable(msg) from error
    if answer.status_code == httpx.codes.CONFLICT:
        msg = f"{path} changed since it was registered as LoRA {name!r}; delete {stack.directory} to begin anew"
        raise NameTaken(msg)
    if not answer.is_success:
        msg = f"the API refused the LoRA {name!r} with {answer.status_code}: {answer.text}"
        raise LoraError(msg)


@contextlib.contextmanager
def running(stack: Stack, bundle: Path = SHAPES, store: ObjectStore | None = None) -> Iterator[Stack]:
    """Run a stack that knows a bundle's model and LoRAs, for the length of a ``with`` block.

    ``store`` is the stack's store; by default its local directory. Raises ``DirectoryInUse``, ``NameTaken`` if the
    directory was kept and a LoRA's file changed since, and what starting and registering raise.
    """
    with stack.held():
        # opened only now: a fresh stack empties the directory when it is held
        store = store or open_store(stack.store_url)
        try:
            stack.start_valkey()
            with redis.Redis.from_url(stack.valkey.url) as client:
                register_model(store, RedisCatalogue(client), bundle / "model", MODEL, **_DEFAULTS)
            stack.start()
            for path in lora_files(bundle):
                register_lora(stack, store, path)
            yield stack
        finally:
            stack.stop()
