"""LoRA (Hu et al. 2021, arXiv 2106.09685) on linear and convolution layers.

ΔW = scaling · flat(up) · flat(down), reshaped to the weight. A 1×1 convolution's factors may be stored with two or
four dimensions whatever the weight has; a k×k convolution keeps its kernel in ``down``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from core.errors import LoraPairIncomplete, LoraShapeMismatch
from worker.lora.adapters.base import Declared

_MATRIX_DIMENSIONS = 2
_KEY = re.compile(
    r"(?P<stem>.+?)(?:"
    r"\.lora_(?P<kohya>down|up)\.weight"
    r"|(?:\.lora|_lora|\.lora_linear_layer)\.(?P<diffusers>down|up)\.weight"
    r"|\.lora_(?P<peft>[AB])(?:\.[^.]+)?\.weight"
    r"|(?:\.lora|_lora|\.lora_linear_layer)?\.(?P<alpha>alpha)"
    r")"
)
_PEFT = {"A": "down", "B": "up"}


@dataclass(frozen=True, slots=True)
class LowRank:
    """A pair of factors, with the names that kohya's files give them."""

    lora_down: torch.Tensor
    """``[r, K]``, as stored."""
    lora_up: torch.Tensor
    """``[out, r]``, as stored."""
    alpha: float | None = None
    """``None`` means alpha = rank."""
    rank_stabilised: bool = False

    kind: ClassVar[str] = "lora"

    @classmethod
    def split(cls, key: str) -> tuple[str, str] | None:
        """Read the names of kohya, diffusers (three generations) and PEFT; parts are ``down``, ``up``, ``alpha``."""
        match = _KEY.fullmatch(key)
        if match is None:
            return None
        part = match["kohya"] or match["diffusers"] or match["alpha"] or _PEFT[match["peft"]]
        return match["stem"], part

    @classmethod
    def build(cls, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...], declared: Declared) -> Self:
        """Check the factors against each other and the weight, and flatten them."""
        missing = {"down", "up"} - set(parts)
        if missing:
            msg = f"the {' and '.join(sorted(missing))} factor is missing"
            raise LoraPairIncomplete(msg)
        down, up = parts["down"], parts["up"]
        _check_fit(tuple(down.shape), tuple(up.shape), shape)
        alpha = _alpha(parts["alpha"]) if "alpha" in parts else declared.alpha
        stabilised = declared.rank_stabilised and "alpha" not in parts
        return cls(down.flatten(1), up.flatten(1), alpha, stabilised)

    @property
    def rank(self) -> int:
        """Number of rows of ``lora_down``."""
        return self.lora_down.shape[0]

    @property
    def scaling(self) -> float:
        """alpha/r, or alpha/√r when rank-stabilised; 1 without alpha; 0 with alpha 0."""
        if self.alpha is None:
            return 1.0
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    def factors(self, scale: float, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Give (up ``[out, r]`` · scale · scaling, down ``[r, K]``) on the device and in the dtype of ``like``."""
        return self.lora_up.to(like) * (scale * self.scaling), self.lora_down.to(like)

    def delta(self, weight: torch.Tensor) -> torch.Tensor:
        """Multiply the factors out."""
        up, down = self.factors(1.0, weight)
        return up @ down


def _alpha(stored: torch.Tensor) -> float:
    if stored.numel() != 1:
        msg = f"alpha has the shape {list(stored.shape)} where one number belongs"
        raise LoraShapeMismatch(msg)
    return float(stored.reshape(-1)[0])


def _check_fit(down: tuple[int, ...], up: tuple[int, ...], weight: tuple[int, ...]) -> None:
    if min(len(down), len(up)) < _MATRIX_DIMENSIONS or 0 in down + up:
        msg = f"down {list(down)} and up {list(up)} are no matrices"
        raise LoraShapeMismatch(msg)
    if math.prod(up[2:]) != 1 or up[1] != down[0]:
        msg = f"down {list(down)} and up {list(up)} do not share a rank"
        raise LoraShapeMismatch(msg)
    kernel_fits = len(down) == _MATRIX_DIMENSIONS or _kernel(down) == _kernel(weight)
    if up[0] != weight[0] or math.prod(down[1:]) != math.prod(weight[1:]) or not kernel_fits:
        msg = f"the file's change is for a weight of shape {[up[0], *down[1:]]}, this model's is {list(weight)}"
        raise LoraShapeMismatch(msg)


def _kernel(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Give a convolution's kernel size; a 1×1 convolution is a linear layer and has none."""
    return shape[2:] if math.prod(shape[2:]) != 1 else ()
