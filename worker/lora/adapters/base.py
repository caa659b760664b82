"""What every adapter type offers to the reader of files and to the fuser."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol, Self

import torch


@dataclass(frozen=True, slots=True)
class Declared:
    """What a file's metadata says of one module's scaling; a tensor in the file overrules it."""

    alpha: float | None = None
    rank_stabilised: bool = False
    """Whether the scaling is alpha/√rank (Kalajdzievski 2023, rsLoRA) instead of alpha/rank."""


class Adapter(Protocol):
    """A change of one module's weight, read from a file. Frozen."""

    kind: ClassVar[str]
    """Name of the type in reports."""

    @classmethod
    def split(cls, key: str) -> tuple[str, str] | None:
        """Split a tensor's name into the module's name and the part it is of this type; ``None`` if it is none."""
        ...

    @classmethod
    def build(cls, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...], declared: Declared) -> Self:
        """Make the adapter of a module whose weight has ``shape``.

        Raises:
            LoraPairIncomplete: a part that must be there is not.
            LoraShapeMismatch: the parts do not fit each other or the weight.
        """
        ...

    @property
    def scaling(self) -> float:
        """The file's own factor, such as alpha/rank. 0 means that the module changes nothing."""
        ...

    def delta(self, weight: torch.Tensor) -> torch.Tensor:
        """Weight change ``[out, K]`` at scale 1, scaling included, for the pristine ``weight [out, K]``; its dtype."""
        ...
