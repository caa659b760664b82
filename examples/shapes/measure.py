"""The quality check: what share of generated pictures shows what the prompt asks for.

Colours and effects are read from pixels (``effects.py``), shapes by a network trained on drawings
only (``classifier.py``).  The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from examples.shapes import classifier, effects
from examples.shapes.common import LORAS, MODEL
from examples.shapes.draw import COLOURS, HEART, SHAPES, TRIGGERS, plain_caption
from examples.shapes.lora import Merger

if TYPE_CHECKING:
    from collections.abc import Callable

STEPS = 12
GUIDANCE = 3.0
BATCH = 16
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)
STACKS = tuple(itertools.combinations(TRIGGERS, 2))


@dataclass(frozen=True)
class Wish:
    """What a prompt asks for, and the seed of its picture."""

    shape: str
    fg: str
    bg: str
    seed: int

    def prompt(self, loras: tuple[str, ...] = ()) -> str:
        """Return the caption with the trigger words of ``loras``."""
        shape = TRIGGERS[HEART] if HEART in loras else self.shape
        words = [TRIGGERS[name] for name in loras if name != HEART]
        return ", ".join([plain_caption(shape, self.fg, self.bg), *words])


def wishes(count: int, seed: int) -> list[Wish]:
    """Return distinct combinations of shape and colours in random order, each with its own seed."""
    pairs = itertools.product(SHAPES, COLOURS, COLOURS)
    options = [(shape, fg, bg) for shape, fg, bg in pairs if fg != bg]
    order = np.random.default_rng(seed).permutation(len(options))
    repeated = itertools.islice(itertools.cycle(order), count)
    return [Wish(*options[int(i)], seed=1000 * seed + n) for n, i in enumerate(repeated)]


class Painter:
    """Draws with the bundled model through diffusers, in fp32 on the processor."""

    def __init__(self, steps: int, guidance: float, folder: Path = MODEL) -> None:
        """Load the pipeline from ``folder``."""
        warnings.filterwarnings("ignore")
        self.pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32, safety_checker=None)
        self.pipeline.set_progress_bar_config(disable=True)
        self.merger = Merger(self.pipeline)
        self.steps, self.guidance = steps, guidance

    def paint(self, prompts: list[str], seeds: list[int]) -> np.ndarray:
        """Return uint8 [n, 64, 64, 3]; a picture depends on its own seed alone."""
        parts = []
        for at in range(0, len(prompts), BATCH):
            noise = [torch.Generator().manual_seed(seed) for seed in seeds[at : at + BATCH]]
            drawn = self.pipeline(
                prompts[at : at + BATCH],
                height=64,
                width=64,
                num_inference_steps=self.steps,
                guidance_scale=self.guidance,
                generator=noise,
                output_type="np",
            ).images
            parts.append((drawn * 255).round().astype(np.uint8))
        return np.concatenate(parts)

    def with_loras(self, wanted: list[Wish], scales: dict[str, float], words: tuple[str, ...]) -> np.ndarray:
        """Paint ``wanted`` with LoRAs at their scales and the trigger words of ``words``."""
        self.merger.apply({LORAS / f"{name}.safetensors": scale for name, scale in scales.items()})
        pictures = self.paint([wish.prompt(words) for wish in wanted], [wish.seed for wish in wanted])
        self.merger.apply({})
        return pictures


def check_base(painter: Painter, judge: classifier.ShapeNet, wanted: list[Wish]) -> dict[str, float]:
    """Return the shares of right colours, backgrounds and shapes."""
    pictures = painter.with_loras(wanted, {}, ())
    named = shapes_in(judge, pictures)
    rows = list(zip(wanted, pictures, named, strict=True))
    for name in SHAPES:
        hits = [shape == name for wish, _, shape in rows if wish.shape == name]
        print(f"  shape {name:9s} {np.mean(hits):.3f} of {len(hits)}")
    return {
        "fg_colour": share([effects.shape_colour(p) == w.fg for w, p, _ in rows]),
        "bg_colour": share([effects.background_colour(p) == w.bg for w, p, _ in rows]),
        "shape": share([shape == w.shape for w, _, shape in rows]),
    }


def share(hits: list[bool] | list[float] | np.ndarray) -> float:
    """Return the mean, rounded for the report."""
    return round(float(np.mean(hits)), 4)


def shapes_in(judge: classifier.ShapeNet, pictures: np.ndarray) -> list[str]:
    """Name the shape in each picture."""
    return [classifier.NAMES[i] for i in classifier.chances(judge, pictures).argmax(1)]


def strength_of(name: str, judge: classifier.ShapeNet) -> Callable[[np.ndarray], list[float]]:
    """Return the function from pictures to the strengths of LoRA ``name`` in them."""
    if name == HEART:
        return lambda pictures: classifier.chances(judge, pictures)[:, classifier.NAMES.index(HEART)].tolist()
    return lambda pictures: [effects.STRENGTHS[name](picture) for picture in pictures]


def check_lora(painter: Painter, judge: classifier.ShapeNet, name: str, wanted: list[Wish]) -> dict[str, object]:
    """Return how often and how strongly ``name`` shows at each scale, and what zero does.

    ``change_by_scale`` is the mean difference from the base's picture in levels of 0..255.
    """
    strength, base = strength_of(name, judge), painter.with_loras(wanted, {}, (name,))
    recognised, strengths, changes, drawn = {}, {}, {}, {}
    for scale in SCALES:
        drawn[scale] = painter.with_loras(wanted, {name: scale}, (name,))
        values = strength(drawn[scale])
        recognised[f"{scale:g}"] = share([value >= effects.THRESHOLD for value in values])
        strengths[f"{scale:g}"] = share(values)
        changes[f"{scale:g}"] = share(np.abs(drawn[scale].astype(float) - base))
    named = shapes_in(judge, drawn[1.0])
    shapes = [HEART if name == HEART else wish.shape for wish in wanted]
    silent = strength(painter.with_loras(wanted, {name: 1.0}, ()))
    print(f"  {name:8s} recognised {recognised}, mean strength {strengths}")
    return {
        "recognised": recognised["1"],
        "by_scale": recognised,
        "strength_by_scale": strengths,
        "change_by_scale": changes,
        "monotone": all(a <= b for curve in (recognised, changes) for a, b in itertools.pairwise(curve.values())),
        "zero_is_identical": bool(np.array_equal(base, drawn[0.0])),
        "without_word": share([value >= effects.THRESHOLD for value in silent]),
        "bg_kept": share([effects.lit_background(p) == w.bg for w, p in zip(wanted, drawn[1.0], strict=True)]),
        "shape_right": share([shape == asked for shape, asked in zip(named, shapes, strict=True)]),
    }


def check_stack(
    painter: Painter, judge: classifier.ShapeNet, names: tuple[str, str], wanted: list[Wish]
) -> dict[str, float]:
    """Return how often each of two stacked LoRAs shows, and both at once."""
    pictures = painter.with_loras(wanted, dict.fromkeys(names, 1.0), names)
    seen = {name: np.array(strength_of(name, judge)(pictures)) >= effects.THRESHOLD for name in names}
    result = {name: share(hits.tolist()) for name, hits in seen.items()}
    result["both"] = share(np.logical_and(*seen.values()).tolist())
    print(f"  {' + '.join(names)}: {result}")
    return result


def seconds_each(painter: Painter, wanted: list[Wish]) -> float:
    """Return the mean time of one picture drawn alone."""
    start = time.perf_counter()
    for wish in wanted:
        painter.paint([wish.prompt()], [wish.seed])
    return round((time.perf_counter() - start) / len(wanted), 3)


def report(options: argparse.Namespace) -> dict[str, object]:
    """Run every check and return the figures."""
    painter, judge = Painter(options.steps, options.guidance), classifier.load()
    wanted, few = wishes(options.prompts, seed=5), wishes(options.lora_prompts, seed=6)
    print("judges on drawings:", effects.colour_calibration(), effects.calibration())
    result: dict[str, object] = check_base(painter, judge, wanted)
    print("base:", result)
    result["drawings_shape"] = round(classifier.accuracy(judge, 12, 1000, 0.0), 4)
    names = [name for name in TRIGGERS if (LORAS / f"{name}.safetensors").exists()]
    result["loras"] = {name: check_lora(painter, judge, name, few) for name in names}
    stacks = [pair for pair in STACKS if set(pair) <= set(names)]
    result["stacked"] = {"+".join(pair): check_stack(painter, judge, pair, few) for pair in stacks}
    result["calibration"] = {**effects.colour_calibration(), **effects.calibration()}
    settings = {"prompts": options.prompts, "lora_prompts": options.lora_prompts}
    result |= {**settings, "steps": options.steps, "guidance": options.guidance}
    result["seconds_per_image"] = seconds_each(painter, wanted[:6])
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "measured.json").write_text(json.dumps(result, indent=2) + "\n")
        sheet = np.concatenate(list(painter.with_loras(wanted[:16], {}, ())), axis=1)
        Image.fromarray(sheet).save(options.out / "sample.png")
    return result


def main() -> None:
    """Print readable figures and, last, one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--lora-prompts", type=int, default=40)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--out", type=Path)
    print(json.dumps(report(parser.parse_args())))


if __name__ == "__main__":
    main()
