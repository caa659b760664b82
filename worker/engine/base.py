"""What the runner needs of a model on a device."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from PIL import Image

if TYPE_CHECKING:
    from torch import nn

OnStep = Callable[[int, int], None]
"""Called after each denoising step with (steps done, steps in all). May raise to stop the run."""


@dataclass(frozen=True, slots=True)
class ImagePrompt:
    """One image of a batch: what to draw, from which noise."""

    prompt: str
    negative_prompt: str
    seed: int


@dataclass(frozen=True, slots=True)
class Shape:
    """What all images of one forward pass have in common."""

    width: int
    """Pixels."""
    height: int
    """Pixels."""
    steps: int
    guidance: float
    sampler: str


class Engine(Protocol):
    """A loaded model. One thread at a time."""

    @property
    def components(self) -> Mapping[str, nn.Module]:
        """The modules that LoRAs change: ``unet`` and ``te``."""
        ...

    def sample(self, images: Sequence[ImagePrompt], shape: Shape, on_step: OnStep) -> list[Image.Image]:
        """Draw a batch in one pass, in order.

        Each image comes from its own CPU generator, so that its noise depends on its seed alone. Raises
        ``EngineOutOfMemory``, ``EngineFailed``, and whatever ``on_step`` raises.
        """
        ...


class NoopEngine:
    """Draws plain colours at once: for load tests of everything around an engine."""

    components: Mapping[str, nn.Module] = {}

    def sample(self, images: Sequence[ImagePrompt], shape: Shape, on_step: OnStep) -> list[Image.Image]:
        """Fill each image with a colour that depends on its prompt and seed."""
        for step in range(shape.steps):
            on_step(step + 1, shape.steps)
        return [Image.new("RGB", (shape.width, shape.height), _colour(image)) for image in images]


def _colour(image: ImagePrompt) -> tuple[int, int, int]:
    digest = hashlib.sha256(f"{image.prompt}\0{image.negative_prompt}\0{image.seed}".encode()).digest()
    return digest[0], digest[1], digest[2]
