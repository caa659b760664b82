"""Registers models and LoRAs from local folders: uploads the files, enters them into the catalogue."""

from __future__ import annotations

import hashlib
import mimetypes
from pathlib import Path
from typing import Any

from core.catalogue.records import ModelFile, ModelRecord
from core.ports import Catalogue, ObjectStore

MODEL_FILES = {".json", ".txt", ".safetensors"}
"""Endings of the files that a checkpoint in diffusers layout consists of."""


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
