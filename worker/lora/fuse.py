"""Fusing LoRAs into live weights: W = W0 + Σ scale·ΔW.

What is fused is a function of the base weights and of the LoRA set, never of history. Every fuse starts from a pristine
copy of W0, sums in wide floating point in canonical order, rounds once, and writes into the live tensor in place, so
that whatever holds its address stays valid. Nothing is ever subtracted.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from core.errors import LoraNotFinite
from core.lora import LoraSet
from worker.lora.adapters.base import Adapter
from worker.lora.adapters.lora import LowRank
from worker.lora.file import LoadedLora
from worker.lora.keys import ModuleIndex, ModuleKey

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, slots=True)
class FuseStats:
    """What one change of the fused set took."""

    modules: int
    """Modules whose weights were written."""
    seconds: float


@dataclass(frozen=True, slots=True)
class _Change:
    """One LoRA's part in one module."""

    adapter: Adapter
    scale: float


class Fuser:
    """The weights of a pipeline's components and the LoRA set that is fused into them.

    Pristine copies are made of a layer when a LoRA first touches it, and kept: on the weight's own device, or on
    ``pristine_device``. Between calls the weights are exactly those of the set that was applied last, whatever
    happened. Not safe for threads: weights change only between samplings.
    """

    def __init__(self, components: Mapping[str, nn.Module], *, pristine_device: str | None = None) -> None:
        """Take the live components by the names of ``worker.lora.keys``: ``unet``, ``te``, ``te2``."""
        self._weights = {
            ModuleKey(component, name): module.weight
            for component, root in components.items()
            for name, module in root.named_modules()
            if _can_change(module)
        }
        self._pristine: dict[ModuleKey, torch.Tensor] = {}
        self._pristine_device = pristine_device
        self._touched: frozenset[ModuleKey] = frozenset()
        self._fused = LoraSet().id
        self.index = ModuleIndex(
            {
                component: {
                    key.module: tuple(w.shape) for key, w in self._weights.items() if key.component == component
                }
                for component in components
            }
        )
        """The modules that LoRAs can change, for reading files."""

    @property
    def pristine_bytes(self) -> int:
        """Memory held by pristine copies. 0 until a LoRA is fused."""
        return sum(weight.nbytes for weight in self._pristine.values())

    def apply(self, loras: Sequence[LoadedLora]) -> FuseStats:
        """Make the weights those of this set, from whatever set they are of. Nothing is done if they are already.

        Raises:
            LoraNotFinite: a fused weight overflows. The weights are then pristine, as after any other failure.
        """
        started = time.perf_counter()
        wanted = LoraSet.of(lora.ref for lora in loras)
        if wanted.id == self._fused:
            return FuseStats(0, time.perf_counter() - started)
        changes = _by_module(wanted, {lora.ref.digest: lora for lora in loras})
        visited = sorted(self._touched | changes.keys())
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self._reset, frozenset(visited))
            self._write(visited, changes)
            on_failure.pop_all()
        self._touched, self._fused = frozenset(changes), wanted.id
        return FuseStats(len(visited), time.perf_counter() - started)

    def restore(self) -> FuseStats:
        """Give the base weights back, bit for bit."""
        return self.apply(())

    @torch.no_grad()
    def _write(self, visited: Sequence[ModuleKey], changes: Mapping[ModuleKey, Sequence[_Change]]) -> None:
        finite: dict[ModuleKey, torch.Tensor] = {}
        with _full_precision():
            for key in visited:
                weight, base = self._weights[key].data, self._pristine_of(key)
                if key not in changes:
                    weight.copy_(base)
                    continue
                weight.copy_(_fused_weight(base.to(weight.device), changes[key]))
                finite[key] = torch.isfinite(torch.stack(torch.aminmax(weight))).all()
        _demand_finite(finite)

    def _pristine_of(self, key: ModuleKey) -> torch.Tensor:
        """The base weight. A layer without a copy was never touched: it is its own base."""
        if key not in self._pristine:
            weight = self._weights[key].data
            self._pristine[key] = weight.to(self._pristine_device or weight.device, copy=True)
        return self._pristine[key]

    @torch.no_grad()
    def _reset(self, visited: frozenset[ModuleKey]) -> None:
        """Write the base weights back after a failure."""
        for key in visited & self._pristine.keys():
            self._weights[key].data.copy_(self._pristine[key])
        self._touched, self._fused = frozenset(), LoraSet().id


def _can_change(module: nn.Module) -> bool:
    if isinstance(module, _CONVOLUTIONS) and module.groups != 1:
        return False
    return isinstance(module, (nn.Linear, *_CONVOLUTIONS)) and module.weight.is_floating_point()


def _by_module(wanted: LoraSet, loras: Mapping[str, LoadedLora]) -> dict[ModuleKey, list[_Change]]:
    """Gather the changes that have an effect, by module, in the set's canonical order and at its scales."""
    changes: dict[ModuleKey, list[_Change]] = {}
    for ref in wanted:
        for key, adapter in loras[ref.digest].adapters.items():
            scale = ref.unet if key.component == "unet" else ref.te
            if scale * adapter.scaling:
                changes.setdefault(key, []).append(_Change(adapter, scale))
    return changes


def _fused_weight(base: torch.Tensor, changes: Sequence[_Change]) -> torch.Tensor:
    """W0 + Σ scale·ΔW in float32, or in float64 for float64 weights. All low-rank changes are one product."""
    wide = torch.float64 if base.dtype == torch.float64 else torch.float32
    flat = base.to(wide).flatten(1)
    total = flat
    factors = [c.adapter.factors(c.scale, flat) for c in changes if isinstance(c.adapter, LowRank)]
    if factors:
        total = torch.addmm(flat, torch.cat([up for up, _ in factors], dim=1), torch.cat([down for _, down in factors]))
    for change in changes:
        if not isinstance(change.adapter, LowRank):
            total = total + change.scale * change.adapter.delta(flat)
    return total.reshape(base.shape)


def _demand_finite(finite: Mapping[ModuleKey, torch.Tensor]) -> None:
    """Ask the device once, for all modules together."""
    if finite and not torch.stack([flag.cpu() for flag in finite.values()]).all():
        key = next(key for key, flag in finite.items() if not flag)
        msg = f"with these LoRAs the weight of {key.component} {key.module!r} overflows: use smaller scales"
        raise LoraNotFinite(msg)


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """Keep float32 products exact to float32 even where sampling allows TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
