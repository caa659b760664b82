"""LoRA files and models small enough for tests."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from core.job import LoraReport
from core.lora import LoraRef
from worker.lora.adapters.base import Adapter
from worker.lora.file import LoadedLora
from worker.lora.keys import ModuleKey

Tensors = Mapping[str, torch.Tensor]


def write(path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> Path:
    """Write a safetensors file, each tensor with memory of its own."""
    save_file(
        {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, path, dict(metadata or {})
    )
    return path


def ref_of(name: str, unet: float = 1.0, te: float = 1.0) -> LoraRef:
    """Refer to a LoRA whose digest follows from its name."""
    return LoraRef(hashlib.sha256(name.encode()).hexdigest(), unet, te, name)


def loaded(ref: LoraRef, adapters: Mapping[ModuleKey, Adapter]) -> LoadedLora:
    """Stand in for a file that was read."""
    return LoadedLora(ref, adapters, LoraReport(name=ref.name, digest=ref.digest, unet=ref.unet, te=ref.te))
