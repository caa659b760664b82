"""What a LoRA file changes in a live model, with every tensor of the file accounted for.

Each tensor is in exactly one place: *matched*, it is part of a module's weight change; *extra*, it is known to have no
place in this model; *unmatched*, nothing is known to do with it. A file that is not understood as a whole is refused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

import torch

from core.errors import (
    LoraError,
    LoraFileInvalid,
    LoraNotFinite,
    LoraShapeMismatch,
    LoraUnmatched,
    LoraUnsupported,
)
from core.job import LoraReport
from core.lora import LoraRef
from core.safetensors_header import Header, TensorInfo, base_hint, parse_header, trigger_words
from worker.lora.adapters import TYPES
from worker.lora.adapters.base import Adapter
from worker.lora.adapters.declared import Declarations
from worker.lora.adapters.refused import refuse_unsupported
from worker.lora.keys import ModuleIndex, ModuleKey, other_base

WEIGHT_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
)
UNEVEN_SCALING = 8.0
"""Largest alpha/rank over the smallest, above which a trainer's fault is likely."""


@dataclass(frozen=True, slots=True)
class LoadedLora:
    """A LoRA file as read for one model."""

    ref: LoraRef
    """Which file, at which scales."""
    adapters: Mapping[ModuleKey, Adapter]
    report: LoraReport


@dataclass(slots=True)
class _Parts:
    """The tensors of one module's change."""

    adapter_type: type[Adapter]
    stem: str
    """What the file calls the module."""
    keys: dict[str, str] = field(default_factory=dict)
    """Name of the tensor, by part."""


@dataclass(slots=True)
class _Accounts:
    """Where each tensor of a file went."""

    modules: dict[ModuleKey, _Parts] = field(default_factory=dict)
    extra: dict[str, str] = field(default_factory=dict)
    """Component that this model lacks, by tensor name."""
    unmatched: list[str] = field(default_factory=list)

    @property
    def matched(self) -> int:
        """Tensors that are part of a change."""
        return sum(len(parts.keys) for parts in self.modules.values())


def read(path: Path, ref: LoraRef, index: ModuleIndex, *, match_threshold: float = 1.0) -> LoadedLora:
    """Read the file of ``ref`` at ``path`` for the model whose modules are in ``index``.

    ``match_threshold`` is the least share of the file's tensors (extra ones aside) that must fit the model.

    Raises:
        LoraFileInvalid, LoraTooLarge: it is no sound safetensors file.
        LoraUnsupported: it is of another adapter type, or no LoRA at all.
        LoraUnmatched: too few of its names are names of this model's modules.
        LoraPairIncomplete, LoraShapeMismatch, LoraNotFinite: a module's tensors cannot be its change.
    """
    try:
        with path.open("rb") as file:
            header = parse_header(
                lambda start, length: _read_range(file, start, length), os.fstat(file.fileno()).st_size
            )
            refuse_unsupported(header.tensors)
            accounts = _account(header, index)
            _demand_match(accounts, header, match_threshold)
            adapters = _build(accounts, header, index, file)
    except LoraError as error:
        msg = f"LoRA {ref.name or ref.digest[:12]!r}: {error}"
        raise type(error)(msg) from error
    return LoadedLora(ref, MappingProxyType(adapters), _report(ref, header, accounts, adapters))


def _account(header: Header, index: ModuleIndex) -> _Accounts:
    accounts = _Accounts()
    for key in header.tensors:
        split = next(((kind, *found) for kind in TYPES if (found := kind.split(key))), None)
        module = index.find(split[1]) if split else None
        if split is None:
            accounts.unmatched.append(key)
        elif module is not None:
            _enter(accounts.modules.setdefault(module, _Parts(split[0], split[1])), *split, key)
        elif absent := index.absent_component(split[1]):
            accounts.extra[key] = absent
        else:
            accounts.unmatched.append(key)
    return accounts


def _enter(parts: _Parts, adapter_type: type[Adapter], stem: str, part: str, key: str) -> None:
    if parts.stem != stem or parts.adapter_type is not adapter_type or part in parts.keys:
        other = parts.keys.get(part, parts.stem)
        msg = f"{key!r} and {other!r} both change the same module; applying both would double the effect"
        raise LoraUnsupported(msg)
    parts.keys[part] = key


def _demand_match(accounts: _Accounts, header: Header, threshold: float) -> None:
    matched, unmatched = accounts.matched, len(accounts.unmatched)
    if matched and matched >= threshold * (matched + unmatched):
        return
    first = ", ".join(repr(key) for key in (accounts.unmatched or list(accounts.extra))[:3])
    base = base_hint(header.metadata) or other_base(accounts.unmatched or accounts.extra)
    hint = f"; it seems to be made for {base}" if base else ""
    msg = (
        f"{matched} tensors fit this model, {unmatched} do not, {len(accounts.extra)} are for parts it lacks"
        f"{hint}; without a place: {first}"
    )
    raise LoraUnmatched(msg)


def _build(accounts: _Accounts, header: Header, index: ModuleIndex, file: BinaryIO) -> dict[ModuleKey, Adapter]:
    declarations = Declarations(header.metadata)
    adapters: dict[ModuleKey, Adapter] = {}
    for module, parts in sorted(accounts.modules.items()):
        tensors = {part: _tensor(file, key, header.tensors[key]) for part, key in parts.keys.items()}
        declared = declarations.of(module.component, parts.stem)
        try:
            adapters[module] = parts.adapter_type.build(tensors, index.shape(module), declared)
        except LoraError as error:
            made_for = base_hint(header.metadata) or "another base model"
            hint = f"; it may be made for {made_for}" if isinstance(error, LoraShapeMismatch) else ""
            msg = f"{parts.stem!r}: {error}{hint}"
            raise type(error)(msg) from error
    return adapters


def _tensor(file: BinaryIO, key: str, info: TensorInfo) -> torch.Tensor:
    """Read one tensor into memory of its own: in the file it may lie at any address."""
    dtype = WEIGHT_DTYPES.get(info.dtype) or (_INTEGERS.get(info.dtype) if key.endswith("alpha") else None)
    if dtype is None:
        msg = f"{key!r} is stored as {info.dtype}; weights are read from {', '.join(WEIGHT_DTYPES)}"
        raise LoraUnsupported(msg)
    if info.start == info.end:
        return torch.empty(info.shape, dtype=dtype)
    data = bytearray(_read_range(file, info.start, info.end - info.start))
    if len(data) < info.end - info.start:
        msg = f"the file ended within {key!r}"
        raise LoraFileInvalid(msg)
    tensor = torch.frombuffer(data, dtype=dtype).reshape(info.shape)
    if not torch.isfinite(tensor).all():
        msg = f"{key!r} holds NaN or infinite values"
        raise LoraNotFinite(msg)
    return tensor


_INTEGERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}


def _read_range(file: BinaryIO, start: int, length: int) -> bytes:
    file.seek(start)
    return file.read(length)


def _report(ref: LoraRef, header: Header, accounts: _Accounts, adapters: Mapping[ModuleKey, Adapter]) -> LoraReport:
    return LoraReport(
        name=ref.name,
        digest=ref.digest,
        unet=ref.unet,
        te=ref.te,
        type=", ".join(sorted({adapter.kind for adapter in adapters.values()})),
        keys_matched=accounts.matched,
        keys_extra=len(accounts.extra),
        keys_unmatched=len(accounts.unmatched),
        modules=len(adapters),
        trigger_words=trigger_words(header.metadata),
        warnings=tuple(_warnings(accounts, adapters)),
    )


def _warnings(accounts: _Accounts, adapters: Mapping[ModuleKey, Adapter]) -> list[str]:
    warnings = []
    if accounts.extra:
        lacking = ", ".join(sorted(set(accounts.extra.values())))
        warnings.append(f"{len(accounts.extra)} tensors are for text encoders that this model lacks ({lacking})")
    if accounts.unmatched:
        warnings.append(f"{len(accounts.unmatched)} tensors fit no module, the first {accounts.unmatched[0]!r}")
    scalings = [abs(adapter.scaling) for adapter in adapters.values()]
    living = [scaling for scaling in scalings if scaling]
    if len(living) < len(scalings):
        warnings.append(f"{len(scalings) - len(living)} modules have alpha 0 and change nothing")
    if living and max(living) > UNEVEN_SCALING * min(living):
        warnings.append(f"alpha/rank differs from {min(living):.3g} to {max(living):.3g} between modules")
    if any(parts.stem.startswith("base_model.model.") for parts in accounts.modules.values()) and set(scalings) == {
        1.0
    }:
        warnings.append("PEFT keeps alpha in adapter_config.json, which is not read: the scaling is taken as 1")
    return warnings
