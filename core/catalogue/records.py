"""Catalogue entries. Pure values; JSON by pydantic."""

from __future__ import annotations

import hashlib
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

PUBLIC = "public"
"""Owner of LoRAs that every tenant may use."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class LoraRecord(_Record):
    """A registered LoRA."""

    name: str
    owner: str
    """Tenant, or ``public``."""
    key: str
    """Object key in the store."""
    digest: Sha256
    """SHA-256 of the whole file."""
    size_bytes: int
    base: str = ""
    """What its metadata says it was trained on; empty if it says nothing."""
    trigger_words: tuple[str, ...] = ()
    default_scale: float = 1.0
    tensors: int = 0
    created_ms: int = 0


class ModelFile(_Record):
    """One file of a model."""

    path: str
    """Relative path within the model's folder, with forward slashes."""
    key: str
    digest: Sha256
    size_bytes: int


class ModelRecord(_Record):
    """A registered checkpoint in diffusers layout, with the defaults of jobs that name it."""

    name: str
    pool: str = "default"
    files: tuple[ModelFile, ...]
    steps: int = 20
    guidance: float = 7.0
    sampler: str = "DPM++ 2M"
    width: int = 512
    height: int = 512
    size_multiple: int = 8
    """Width and height must be multiples of this many pixels."""
    max_pixels: int = 2048 * 2048

    @property
    def digest(self) -> str:
        """SHA-256 over the paths and digests of all files: the model's content."""
        lines = sorted(f"{file.path}:{file.digest}" for file in self.files)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()
