"""What the training scripts share: folders, wall-clock schedule, moving average, bf16 with masters."""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers.models.upsampling import Upsample2D

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

HERE = Path(__file__).parent
MODEL = HERE / "model"
LORAS = HERE / "loras"
PICTURES = HERE / "pictures"
WORK = Path("var/shapes/work")
"""Scratch folder for full-precision parts and checkpoints; git ignores it."""


def arguments(description: str, minutes: float, seed: int) -> argparse.ArgumentParser:
    """Return a parser with the options that each training script has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--minutes", type=float, default=minutes, help="wall-clock time to train")
    parser.add_argument("--seed", type=int, default=seed)
    parser.add_argument("--work", type=Path, default=WORK, help="folder for parts and checkpoints")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint")
    return parser


class Clock:
    """Yields step numbers until the time is up; knows which fraction of the time has passed."""

    def __init__(self, minutes: float, elapsed: float = 0.0, log_every: float = 20.0) -> None:
        """``elapsed`` is what an earlier, resumed run has used, in seconds."""
        self.total = minutes * 60
        self.start = time.monotonic() - elapsed
        self.log_every = log_every
        self._last_log = 0.0

    @property
    def elapsed(self) -> float:
        """Seconds used so far."""
        return time.monotonic() - self.start

    def rate(self, step: int, peak: float, floor: float = 0.05, warm: int = 100) -> float:
        """Learning rate: linear warm-up over ``warm`` steps times a cosine to ``floor * peak``."""
        done = min(self.elapsed / self.total, 1.0)
        wave = 0.5 * (1 + math.cos(math.pi * done))
        return peak * min(1.0, (step + 1) / warm) * (floor + (1 - floor) * wave)

    def steps(self, first: int = 0) -> Iterator[int]:
        """Yield ``first``, ``first + 1``, ... until the minutes are over.

        The first step may include compilation; the clock starts after it.
        """
        used = self.elapsed
        yield first
        self.start = time.monotonic() - used
        step = first + 1
        while self.elapsed < self.total:
            yield step
            step += 1

    def log(self, step: int, **values: float) -> None:
        """Print a JSON line now and then."""
        if self.elapsed - self._last_log >= self.log_every:
            self._last_log = self.elapsed
            shown = {name: round(float(torch.as_tensor(value).detach()), 5) for name, value in values.items()}
            print(json.dumps({"step": step, "seconds": round(self.elapsed), **shown}), flush=True)


class Average:
    """Exponential moving average of parameters, in fp32; the decay warms up with the step."""

    def __init__(self, parameters: Iterable[torch.Tensor], decay: float) -> None:
        """Start the average at the present values."""
        self.shadow = [p.detach().float().clone() for p in parameters]
        self.decay = decay

    @torch.no_grad()
    def update(self, parameters: Iterable[torch.Tensor], step: int) -> None:
        """Move the average towards ``parameters``."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.shadow, [p.detach().float() for p in parameters], weight)

    @torch.no_grad()
    def copy_to(self, parameters: Iterable[torch.Tensor]) -> None:
        """Overwrite ``parameters`` with the average."""
        for target, value in zip(parameters, self.shadow, strict=True):
            target.copy_(value)


def save_atomically(state: object, path: Path) -> None:
    """Write a checkpoint so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


class MixedAdam:
    """AdamW on fp32 masters for a model whose own weights are bf16."""

    def __init__(self, parameters: Iterable[torch.Tensor], decay: float = 0.01, beta2: float = 0.99) -> None:
        """Copy the present weights into masters."""
        self.live = list(parameters)
        self.masters = [p.detach().float().clone().requires_grad_() for p in self.live]
        self.adam = torch.optim.AdamW(self.masters, lr=1e-3, betas=(0.9, beta2), weight_decay=decay, foreach=True)

    def step(self, rate: float) -> float:
        """Apply the gradients of the live weights at learning rate ``rate``; return their norm."""
        for master, live in zip(self.masters, self.live, strict=True):
            master.grad = None if live.grad is None else live.grad.float()
            live.grad = None
        norm = torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.adam.param_groups[0]["lr"] = rate
        self.adam.step()
        with torch.no_grad():
            torch._foreach_copy_(self.live, self.masters)
        return float(norm)

    def state(self) -> dict[str, object]:
        """Return what a checkpoint needs."""
        return {"masters": self.masters, "adam": self.adam.state_dict()}

    @torch.no_grad()
    def restore(self, state: dict) -> None:
        """Take masters, moments and live weights from a checkpoint."""
        for master, live, value in zip(self.masters, self.live, state["masters"], strict=True):
            master.copy_(value)
            live.copy_(value)
        self.adam.load_state_dict(state["adam"])


def _upsample(self: Upsample2D, hidden_states: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    """Double height and width of [n, c, h, w] by repetition, then convolve."""
    n, c, h, w = hidden_states.shape
    wide = hidden_states[:, :, :, None, :, None].expand(n, c, h, 2, w, 2).reshape(n, c, 2 * h, 2 * w)
    return self.conv(wide)


def compiled(function: Callable) -> Callable:
    """Compile ``function``, which runs a diffusers model, for training.

    The stock up-sampling loses its gradient when compiled (seen with torch 2.13 and diffusers
    0.42: everything before the last up-sampler got zeros), so an equal plain form replaces it.
    """
    Upsample2D.forward = _upsample
    return torch.compile(function)
