"""The engine on the bundled model."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from cli.bundle import SHAPES
from core.errors import ModelInvalid
from core.samplers import SAMPLERS
from worker.engine.base import ImagePrompt, Shape
from worker.engine.pipeline import DiffusersEngine

pytestmark = pytest.mark.filterwarnings("ignore")  # libraries warn of their own next releases
PROMPT = [ImagePrompt("a red circle on a blue background", "", 5)]


def test_an_image_does_not_depend_on_the_samplers_used_before() -> None:
    engine = DiffusersEngine(SHAPES / "model", device="cpu")

    def draw(sampler: str) -> bytes:
        return engine.sample(PROMPT, Shape(64, 64, 4, 3.0, sampler), lambda step, steps: None)[0].tobytes()

    first = {sampler: DiffusersEngine(SHAPES / "model", device="cpu") for sampler in ("DPM++ 2M", "UniPC")}
    fresh = {
        sampler: made.sample(PROMPT, Shape(64, 64, 4, 3.0, sampler), lambda step, steps: None)[0].tobytes()
        for sampler, made in first.items()
    }
    seen: dict[str, bytes] = {}
    for before, after in itertools.permutations(SAMPLERS, 2):
        for sampler in (before, after):
            assert seen.setdefault(sampler, draw(sampler)) == draw(sampler), f"{after} after {before}"
    assert {sampler: seen[sampler] for sampler in fresh} == fresh


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_draws_and_counts_its_steps(sampler: str) -> None:
    engine = DiffusersEngine(SHAPES / "model", device="cpu")
    steps: list[tuple[int, int]] = []
    image = engine.sample(PROMPT, Shape(64, 64, 6, 3.0, sampler), lambda step, of: steps.append((step, of)))[0]
    assert steps[-1] == (6, 6)
    pixels = np.asarray(image, dtype=float)
    assert np.abs(pixels[2, 2] - (32, 70, 220)).max() < 60, "blue background"
    assert pixels[32, 32, 0] > 150, "red middle"


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ModelInvalid):
        DiffusersEngine(tmp_path, device="cpu")
