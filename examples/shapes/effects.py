"""Explicit pixel measures of colours and effects; none of them has ever seen a generated picture.

A picture is uint8 [64, 64, 3].  Each effect has a strength near 0 without and near 1 with the
effect, and counts as recognised from ``THRESHOLD`` on.
"""

from __future__ import annotations

import numpy as np

from examples.shapes.draw import COLOURS, EFFECTS, HEART, SHAPES, STRIPE_PERIOD, draw, random_scene

THRESHOLD = 0.5
NEAR = 55.0
"""RGB distance up to which two pixels have the same colour."""
_PALETTE = np.array(list(COLOURS.values()), dtype=np.float32)


def nearest_colour(pixels: np.ndarray) -> str:
    """Return the palette name closest to the median of ``pixels`` [..., 3]."""
    middle = np.median(pixels.reshape(-1, 3), axis=0)
    return list(COLOURS)[int(np.linalg.norm(_PALETTE - middle, axis=1).argmin())]


def _frame(picture: np.ndarray, width: int = 4) -> np.ndarray:
    """Return the pixels of the outer frame, [n, 3]."""
    inner = np.zeros(picture.shape[:2], dtype=bool)
    inner[width:-width, width:-width] = True
    return picture[~inner]


def background_colour(picture: np.ndarray) -> str:
    """Name the colour of the outer frame, 4 px wide."""
    return nearest_colour(_frame(picture))


def shape_colour(picture: np.ndarray) -> str:
    """Name the colour of the central 8 x 8 px."""
    return nearest_colour(picture[28:36, 28:36])


def lit_background(picture: np.ndarray) -> str:
    """Name the colour of the brighter half of the upper 5 rows, which neither stripes nor dusk change."""
    rows = picture[:5].reshape(-1, 3)
    light = rows.mean(axis=1)
    return nearest_colour(rows[light >= np.median(light)])


def stripes(picture: np.ndarray) -> float:
    """Strength of the 16 px wave along the upper and lower 5 rows, 1 for the drawn contrast."""
    rows = np.concatenate([picture[:5], picture[-5:]]).astype(np.float32).mean(axis=(0, 2))
    wave = np.exp(-2j * np.pi * np.arange(len(rows)) / STRIPE_PERIOD)
    return float(2 * np.abs((rows * wave).mean()) / max(rows.mean(), 1.0) / 0.55)


def dusk(picture: np.ndarray) -> float:
    """How much darker the lowest 5 rows are than the uppermost 5, as a share."""
    light = picture.astype(np.float32).mean(axis=2)
    return float(1 - np.median(light[-5:]) / max(np.median(light[:5]), 1.0))


def outline(picture: np.ndarray) -> float:
    """Share of the central pixels (radius 3 px) in a background colour, 0 if no shape stands out.

    The background's colours are those of the frame at the same height or anywhere on it.
    """
    y, x = np.mgrid[:64, :64] - 31.5
    centre = picture[np.hypot(x, y) <= 3].astype(np.float32)
    frame = _frame(picture).astype(np.float32)[::3]
    hollow = np.linalg.norm(centre[:, None] - frame[None], axis=2).min(axis=1) < NEAR
    body = picture[8:-8, 8:-8].reshape(-1, 3).astype(np.float32)[::5]
    differs = np.linalg.norm(body[:, None] - frame[None], axis=2).min(axis=1) >= NEAR
    return float(hollow.mean()) if differs.mean() > 0.08 else 0.0


STRENGTHS = {"stripes": stripes, "outline": outline, "dusk": dusk}


def calibration(count: int = 150, seed: int = 31) -> dict[str, float]:
    """Return each measure's accuracy on drawings, half of them with the effect among others."""
    rng = np.random.default_rng(seed)
    right = dict.fromkeys(EFFECTS, 0)
    for _ in range(count):
        shown = frozenset(e for e in EFFECTS if rng.random() < 0.5)
        picture = draw(random_scene(rng, (*SHAPES, HEART), shown))
        for name in EFFECTS:
            right[name] += (STRENGTHS[name](picture) >= THRESHOLD) == (name in shown)
    return {name: round(value / count, 4) for name, value in right.items()}


def colour_calibration(count: int = 300, seed: int = 32) -> dict[str, float]:
    """Return the accuracy of the two colour measures on plain drawings."""
    rng = np.random.default_rng(seed)
    scenes = [random_scene(rng) for _ in range(count)]
    pictures = [draw(scene) for scene in scenes]
    inside = np.mean([shape_colour(p) == s.fg for p, s in zip(pictures, scenes, strict=True)])
    outside = np.mean([background_colour(p) == s.bg for p, s in zip(pictures, scenes, strict=True)])
    return {"fg_colour": round(float(inside), 4), "bg_colour": round(float(outside), 4)}
