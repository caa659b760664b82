"""Our images against diffusers' own pipeline, with PEFT applying the LoRAs."""

import numpy as np
import pytest

from cli.bundle import SHAPES
from tests.e2e.conftest import Service
from tests.e2e.test_same_pixels import pixels


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "loras",
    [{}, {"stripes": 1.0}, {"outline": 0.5}, {"stripes": 1.0, "outline": 0.7}, {"heart": 1.0}, {"dusk": 1.0}],
)
def test_an_image_is_the_one_that_diffusers_draws(service: Service, loras: dict[str, float]) -> None:
    import torch
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    prompt = "a green square on a white background, dusk" if "dusk" in loras else "a green square on a white background"
    pipeline = StableDiffusionPipeline.from_pretrained(
        SHAPES / "model", torch_dtype=torch.float32, safety_checker=None, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, algorithm_type="dpmsolver++", solver_order=2
    )
    for name in loras:
        pipeline.load_lora_weights(SHAPES / "loras" / f"{name}.safetensors", adapter_name=name)
    if loras:
        pipeline.set_adapters(list(loras), list(loras.values()))
    theirs = pipeline(
        prompt, num_inference_steps=12, guidance_scale=3.0, generator=torch.Generator().manual_seed(11)
    ).images[0]
    ours = service.draw(prompt, seed=11, loras=[{"name": name, "scale": scale} for name, scale in loras.items()])
    assert np.abs(pixels(ours) - pixels(theirs)).max() <= 1
