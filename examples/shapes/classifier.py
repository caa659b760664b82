"""A small network that names the shape in a picture; it has only ever seen drawings.

It is the independent judge of the generated pictures.  ``python -m examples.shapes.classifier``
trains it again in about a minute and writes ``classifier.safetensors`` (fp16).
"""

from __future__ import annotations

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from examples.shapes.common import HERE, Clock, arguments
from examples.shapes.draw import EFFECTS, HEART, SHAPES, draw, random_scene

NAMES = (*SHAPES, HEART)
FILE = HERE / "classifier.safetensors"


class ShapeNet(nn.Sequential):
    """Maps pictures float32 [n, 3, 64, 64] in -1..1 to scores [n, 7] over ``NAMES``."""

    def __init__(self) -> None:
        """Stack four strided convolutions and two linear layers."""
        layers: list[nn.Module] = []
        for before, after in ((3, 16), (16, 32), (32, 48), (48, 48)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        super().__init__(*layers, nn.Flatten(), nn.Dropout(0.1), nn.Linear(48 * 16, 48), nn.SiLU(), nn.Linear(48, 7))


def examples(rng: np.random.Generator, count: int, share_of_effects: float) -> tuple[np.ndarray, np.ndarray]:
    """Return uint8 [n, 64, 64, 3] drawings and int64 [n] classes; some drawings have effects."""
    pictures, classes = [], []
    for _ in range(count):
        effects = frozenset(e for e in EFFECTS if rng.random() < share_of_effects)
        scene = random_scene(rng, NAMES, effects)
        pictures.append(draw(scene))
        classes.append(NAMES.index(scene.shape))
    return np.stack(pictures), np.array(classes)


def to_input(pictures: np.ndarray) -> torch.Tensor:
    """Turn uint8 [n, 64, 64, 3] into the network's input."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def chances(model: ShapeNet, pictures: np.ndarray) -> np.ndarray:
    """Return probabilities float32 [n, 7] for uint8 [n, 64, 64, 3]."""
    parts = [model(to_input(part)).softmax(1) for part in np.array_split(pictures, max(1, len(pictures) // 256))]
    return torch.cat(parts).numpy()


def load() -> ShapeNet:
    """Load the bundled weights in fp32."""
    model = ShapeNet().eval()
    model.load_state_dict({name: value.float() for name, value in load_file(FILE).items()})
    return model


def accuracy(model: ShapeNet, seed: int, count: int, share_of_effects: float) -> float:
    """Return the share of fresh drawings whose shape is named rightly."""
    pictures, classes = examples(np.random.default_rng(seed), count, share_of_effects)
    return float((chances(model, pictures).argmax(1) == classes).mean())


def main() -> None:
    """Train with blur-free noise and shifts as augmentation, then print the held-out accuracy."""
    options = arguments(__doc__ or "", minutes=0.8, seed=11).parse_args()
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    pictures, classes = examples(rng, 8000, 0.25)
    inputs, wanted = to_input(pictures), torch.from_numpy(classes)
    model = ShapeNet()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.02)
    clock = Clock(options.minutes)
    for step in clock.steps():
        chosen = torch.randint(len(inputs), (64,))
        batch = inputs[chosen] + 0.15 * torch.rand(64, 1, 1, 1) * torch.randn(64, 3, 64, 64)
        shift = [int(v) for v in rng.integers(-2, 3, size=2)]
        loss = functional.cross_entropy(model(batch.roll(shift, dims=(2, 3))), wanted[chosen], label_smoothing=0.02)
        optimizer.param_groups[0]["lr"] = clock.rate(step, 2e-3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        clock.log(step, loss=loss)
    save_file({name: value.half() for name, value in model.state_dict().items()}, FILE)
    print("plain drawings", accuracy(load(), 12, 1000, 0.0), "with effects", accuracy(load(), 13, 1000, 0.25))


if __name__ == "__main__":
    main()
