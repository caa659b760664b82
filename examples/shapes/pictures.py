"""Draws the labelled sheets in ``pictures/``: base prompts, LoRAs at several scales, stacks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from examples.shapes.common import LORAS, PICTURES
from examples.shapes.draw import COLOURS, HEART, SHAPES
from examples.shapes.measure import GUIDANCE, STEPS, Painter, Wish

if TYPE_CHECKING:
    from pathlib import Path

CELL, LABEL = 64, 12
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)
EXAMPLES = (
    Wish("circle", "red", "blue", 1),
    Wish("star", "yellow", "green", 2),
    Wish("square", "white", "orange", 3),
    Wish("cross", "pink", "cyan", 4),
)


def sheet(rows: list[np.ndarray], labels: list[list[str]], path: Path) -> None:
    """Write rows of pictures (uint8 [n, 64, 64, 3]) with a label above each cell."""
    columns = max(len(row) for row in rows)
    canvas = Image.new("RGB", (columns * (CELL + 4), len(rows) * (CELL + LABEL + 2)), "white")
    pen = ImageDraw.Draw(canvas)
    for y, (row, texts) in enumerate(zip(rows, labels, strict=True)):
        for x, (picture, text) in enumerate(zip(row, texts, strict=True)):
            corner = (x * (CELL + 4) + 2, y * (CELL + LABEL + 2))
            pen.text(corner, text, fill="black", font_size=9)
            canvas.paste(Image.fromarray(picture), (corner[0], corner[1] + LABEL))
    path.parent.mkdir(exist_ok=True)
    canvas.quantize(200).save(path, optimize=True)


def base_sheet(painter: Painter) -> None:
    """One row per shape, eight colour pairs; the label is ``foreground/background``."""
    names, rows, labels = list(COLOURS), [], []
    for y, shape in enumerate(SHAPES):
        pairs = [(fg, names[(x + 1 + (y + x) % 7) % 8]) for x, fg in enumerate(names)]
        wanted = [Wish(shape, fg, bg, 100 * y + x) for x, (fg, bg) in enumerate(pairs)]
        rows.append(painter.with_loras(wanted, {}, ()))
        labels.append([f"{fg}/{bg}" for fg, bg in pairs])
    sheet(rows, labels, PICTURES / "base.png")


def lora_sheet(painter: Painter, names: list[str]) -> None:
    """Two rows per LoRA, one column per scale."""
    rows, labels = [], []
    for name in names:
        for wish in EXAMPLES[:2]:
            drawn = [painter.with_loras([wish], {name: scale}, (name,))[0] for scale in SCALES]
            rows.append(np.stack(drawn))
            labels.append([f"{name} {scale:g}" for scale in SCALES])
    sheet(rows, labels, PICTURES / "loras.png")


def stack_sheet(painter: Painter, names: list[str]) -> None:
    """One row per pair of LoRAs, each at scale 1."""
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    rows = [painter.with_loras(list(EXAMPLES), dict.fromkeys(pair, 1.0), pair) for pair in pairs]
    labels = [[f"{a}+{b}"] * len(EXAMPLES) for a, b in pairs]
    sheet(rows, labels, PICTURES / "stacks.png")


def main() -> None:
    """Write the sheets for the base and for every LoRA there is."""
    painter = Painter(STEPS, GUIDANCE)
    names = [name for name in ("stripes", "outline", HEART, "dusk") if (LORAS / f"{name}.safetensors").exists()]
    base_sheet(painter)
    if names:
        lora_sheet(painter, names)
        stack_sheet(painter, names)


if __name__ == "__main__":
    main()
