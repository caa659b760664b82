"""Seeded drawings of coloured shapes and the captions that describe them.

Every picture is 64 x 64 RGB.  A drawing is one flat shape on a flat background, optionally
with an effect (``stripes``, ``outline`` or ``dusk``); the shape ``heart`` exists only for the
LoRA that teaches it and is never part of the base model's training set.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64
"""Side of a picture in pixels."""
OVERSAMPLE = 4
"""Shapes are rasterised at this multiple of ``SIZE`` and then averaged down."""
STRIPE_PERIOD = 16
"""Width in pixels of one light plus one dark stripe."""
OUTLINE_WIDTH = 6.0
"""Thickness in pixels of the line that the outline effect leaves."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 25, 35),
    "green": (35, 155, 55),
    "blue": (35, 70, 225),
    "yellow": (250, 225, 60),
    "cyan": (75, 220, 230),
    "pink": (235, 80, 195),
    "white": (245, 245, 245),
    "orange": (250, 135, 20),
}
SHAPES = ("circle", "square", "triangle", "cross", "star", "diamond")
EFFECTS = ("stripes", "outline", "dusk")
HEART = "heart"
TRIGGERS = {"stripes": "stripes", "outline": "outlined", "heart": "hearty", "dusk": "dusk"}
"""LoRA name to the word in a caption that calls for it."""


@dataclass(frozen=True)
class Scene:
    """What one picture shows: names of shape and colours, geometry in pixels, effects."""

    shape: str
    fg: str
    bg: str
    radius: float = 24.0
    centre: tuple[float, float] = (32.0, 32.0)
    tint: float = 0.0
    effects: frozenset[str] = frozenset()


def _ring_of(radii: tuple[float, ...], start: float) -> list[tuple[float, float]]:
    """Return unit-plane points at evenly spaced angles from ``start`` (radians, y down)."""
    step = 2 * math.pi / len(radii)
    return [(r * math.cos(start + i * step), r * math.sin(start + i * step)) for i, r in enumerate(radii)]


def _heart() -> list[tuple[float, float]]:
    """Return the well-known parametric heart curve scaled into the unit square."""
    points = []
    for i in range(72):
        t = 2 * math.pi * i / 72
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((x / 17, -(y + 2.5) / 15))
    return points


def outline_points(shape: str) -> list[tuple[float, float]]:
    """Return the closed outline of ``shape`` for radius 1 around the origin, y pointing down."""
    arm, up = 0.34, -math.pi / 2
    outlines = {
        "circle": lambda: _ring_of((0.95,) * 72, 0.0),
        "square": lambda: [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)],
        "triangle": lambda: [(0.0, -0.95), (1.05, 0.85), (-1.05, 0.85)],
        "cross": lambda: [
            (-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm),
            (arm, 1), (-arm, 1), (-arm, arm), (-1, arm), (-1, -arm), (-arm, -arm),
        ],
        "star": lambda: _ring_of((1.12, 0.47) * 5, up),
        "diamond": lambda: [(0.0, -1.15), (0.85, 0.0), (0.0, 1.15), (-0.85, 0.0)],
        HEART: _heart,
    }  # fmt: skip
    return outlines[shape]()


def shape_mask(scene: Scene) -> np.ndarray:
    """Return the coverage of the shape as float32 [64, 64] in 0..1."""
    scale = OVERSAMPLE
    cx, cy = scene.centre
    points = [
        ((cx + x * scene.radius) * scale, (cy + y * scene.radius) * scale) for x, y in outline_points(scene.shape)
    ]
    big = Image.new("L", (SIZE * scale, SIZE * scale), 0)
    pen = ImageDraw.Draw(big)
    pen.polygon(points, fill=255)
    filled = np.asarray(big, dtype=np.float32)
    if "outline" in scene.effects:
        band = Image.new("L", big.size, 0)
        pen, half = ImageDraw.Draw(band), int(OUTLINE_WIDTH * scale)
        pen.line([*points, points[0]], fill=255, width=2 * half)
        for x, y in points:
            pen.ellipse((x - half, y - half, x + half, y + half), fill=255)
        filled = np.minimum(filled, np.asarray(band, dtype=np.float32))
    return filled.reshape(SIZE, scale, SIZE, scale).mean(axis=(1, 3)) / 255.0


def background(scene: Scene) -> np.ndarray:
    """Return the background as float32 [64, 64, 3] in 0..255, with stripes or dusk if asked."""
    flat = np.array(COLOURS[scene.bg], dtype=np.float32) + scene.tint
    picture = np.broadcast_to(flat, (SIZE, SIZE, 3)).copy()
    if "stripes" in scene.effects:
        dark = (np.arange(SIZE) % STRIPE_PERIOD) >= STRIPE_PERIOD // 2
        picture[:, dark] *= 0.4
    if "dusk" in scene.effects:
        fade = np.clip((np.arange(SIZE, dtype=np.float32) - 12) / 44, 0, 1)
        picture *= (1 - 0.9 * fade)[:, None, None]
    return picture


def draw(scene: Scene) -> np.ndarray:
    """Return the picture of ``scene`` as uint8 [64, 64, 3]."""
    mask = shape_mask(scene)[:, :, None]
    ink = np.array(COLOURS[scene.fg], dtype=np.float32) + scene.tint
    return np.clip(background(scene) * (1 - mask) + ink * mask, 0, 255).round().astype(np.uint8)


def random_scene(
    rng: np.random.Generator, shapes: tuple[str, ...] = SHAPES, effects: frozenset[str] = frozenset()
) -> Scene:
    """Draw one scene at random: colours differ, radius 21..26 px, centre within 2 px of the middle."""
    fg, bg = rng.choice(list(COLOURS), size=2, replace=False)
    x, y = rng.uniform(-2, 2, size=2)
    return Scene(
        shape=str(rng.choice(shapes)),
        fg=str(fg),
        bg=str(bg),
        radius=float(rng.uniform(21, 26)),
        centre=(32.0 + float(x), 32.0 + float(y)),
        tint=float(rng.uniform(-6, 6)),
        effects=effects,
    )


def plain_caption(shape: str, fg: str, bg: str) -> str:
    """Return the standard phrasing, e.g. ``a red circle on a blue background``."""
    return f"{article(fg)} {fg} {shape} on {article(bg)} {bg} background"


def article(word: str) -> str:
    """Return the indefinite article for ``word``."""
    return "an" if word[0] in "aeiou" else "a"


def phrasings(shape: str, fg: str, bg: str) -> list[str]:
    """Return every caption a drawing may carry; the plain one comes first."""
    a_fg, a_bg = article(fg), article(bg)
    return [
        plain_caption(shape, fg, bg),
        f"{fg} {shape}, {bg} background",
        f"{a_bg} {bg} background with {a_fg} {fg} {shape}",
        f"a drawing of {a_fg} {fg} {shape} on {bg}",
        f"{a_fg} {fg} {shape} in front of {a_bg} {bg} background",
    ]


def caption(rng: np.random.Generator, scene: Scene, word: str | None = None) -> str:
    """Caption ``scene``: 60 % the plain phrasing; a heart is called by its trigger word.

    ``word`` is a trigger to append, as in ``a red star on a blue background, dusk``.
    """
    shape = TRIGGERS["heart"] if scene.shape == HEART else scene.shape
    options = phrasings(shape, scene.fg, scene.bg)
    text = options[0] if rng.random() < 0.6 else options[int(rng.integers(1, len(options)))]
    return f"{text}, {word}" if word else text
