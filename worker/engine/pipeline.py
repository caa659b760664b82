"""Stable Diffusion through diffusers. The only file that imports diffusers.

Algorithm and numbers are diffusers' own: the pipeline is called as its users call it, with one generator per image.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image
from torch import nn

from core.errors import EngineBroken, EngineFailed, EngineOutOfMemory, ModelInvalid
from worker.engine.base import ImagePrompt, OnStep, Shape

_SCHEDULERS: Mapping[str, tuple[type[Any], Mapping[str, Any]]] = {
    # its defaults are for images as such: latents must not be clipped
    "DDIM": (diffusers.DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}),
    "DPM++ 2M": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "DPM++ 2M Karras": (
        diffusers.DPMSolverMultistepScheduler,
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "use_karras_sigmas": True},
    ),
    "Euler": (diffusers.EulerDiscreteScheduler, {}),
    "Euler a": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "Heun": (diffusers.HeunDiscreteScheduler, {}),
    "UniPC": (diffusers.UniPCMultistepScheduler, {}),
}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(device: str) -> str:
    """Turn ``auto`` into the best device of this machine."""
    if device != "auto":
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def resolve_dtype(dtype: str, device: str) -> torch.dtype:
    """Turn ``auto`` into bfloat16 on CUDA and float32 elsewhere."""
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    return _DTYPES[dtype]


class DiffusersEngine:
    """A Stable Diffusion checkpoint in diffusers' folder layout, on one device."""

    def __init__(self, folder: Path, *, device: str = "auto", dtype: str = "auto", threads: int = 0) -> None:
        if threads:
            torch.set_num_threads(threads)
        self.device = resolve_device(device)
        self._pipeline = _load(folder, resolve_dtype(dtype, self.device))
        self._scheduler_config = self._pipeline.scheduler.config
        """The checkpoint's own: each pass derives its scheduler from this, never from the pass before."""
        try:
            self._pipeline.to(self.device)
        except torch.OutOfMemoryError as error:
            msg = f"the model does not fit into the memory of {self.device}"
            raise EngineOutOfMemory(msg) from error

    @property
    def components(self) -> Mapping[str, nn.Module]:
        """The UNet and the text encoder."""
        return {"unet": self._pipeline.unet, "te": self._pipeline.text_encoder}

    def sample(self, images: Sequence[ImagePrompt], shape: Shape, on_step: OnStep) -> list[Image.Image]:
        """Draw a batch in one pass."""
        scheduler, options = _SCHEDULERS[shape.sampler]
        self._pipeline.scheduler = scheduler.from_config(self._scheduler_config, **options)
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()  # what a pass before this one could not use, in pieces of other sizes

        def step_ended(_pipeline: object, step: int, _timestep: object, tensors: dict[str, Any]) -> dict[str, Any]:
            on_step(min(step + 1, shape.steps), shape.steps)
            return tensors

        try:
            drawn = self._pipeline(
                prompt=[image.prompt for image in images],
                negative_prompt=[image.negative_prompt for image in images],
                width=shape.width,
                height=shape.height,
                num_inference_steps=shape.steps,
                guidance_scale=shape.guidance,
                generator=[torch.Generator("cpu").manual_seed(image.seed) for image in images],
                callback_on_step_end=step_ended,
            )
        except torch.OutOfMemoryError as error:
            msg = f"{len(images)} images of {shape.width}×{shape.height} do not fit into the memory of {self.device}"
            raise EngineOutOfMemory(msg) from error
        except RuntimeError as error:
            msg = f"sampling failed on {self.device}: {error}"
            raise (EngineFailed if self._answers() else EngineBroken)(msg) from error
        return list(drawn.images)

    def _answers(self) -> bool:
        """Whether the device still computes: after an illegal access CUDA refuses everything in this process."""
        try:
            return bool(torch.ones(1, device=self.device).add(1).item() == 2)  # noqa: PLR2004
        except RuntimeError:
            return False


def _load(folder: Path, dtype: torch.dtype) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # libraries warn of their own next releases while they load
            pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
                folder,
                torch_dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                safety_checker=None,
                requires_safety_checker=False,
            )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        msg = f"the checkpoint is no Stable Diffusion model in diffusers layout: {error}"
        raise ModelInvalid(msg) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
