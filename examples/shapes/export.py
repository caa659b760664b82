"""Writes the trained parts as a StableDiffusionPipeline folder with fp16 weights.

The folder is built beside its final place and then swapped in, so a reader never sees half of it.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from examples.shapes.common import MODEL, WORK

INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.42.1",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def export_tokenizer(source: Path, target: Path) -> None:
    """Copy the vocabulary, leaving out the duplicate single-file form."""
    target.mkdir()
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copyfile(source / name, target / name)
    special = {"bos_token": "<|startoftext|>"}
    special |= dict.fromkeys(("eos_token", "pad_token", "unk_token"), "<|endoftext|>")
    (target / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")


def export_text_encoder(source: Path, target: Path) -> None:
    """Write fp16 weights under the customary names, which begin with ``text_model.``.

    The configuration asks for fp32, or a pipeline loaded without a type would mix the two.
    """
    CLIPTextModel.from_pretrained(source).half().save_pretrained(target)
    weights = load_file(target / "model.safetensors")
    prefix = "text_model."
    named = {name if name.startswith(prefix) else prefix + name: value for name, value in weights.items()}
    save_file(named, target / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**settings, "dtype": "float32"}, indent=2) + "\n")


def export_scheduler(target: Path) -> None:
    """Write the sampler's settings; the betas are those of training.

    Trailing spacing ignores the offset; the pipeline asks for 1 all the same. The default clipping
    bound, minus infinity, is left out: strict JSON cannot say it.
    """
    DPMSolverMultistepScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        steps_offset=1,
        solver_order=2,
    ).save_pretrained(target)
    path = target / "scheduler_config.json"
    settings = json.loads(path.read_text())
    del settings["lambda_min_clipped"]
    path.write_text(json.dumps(settings, indent=2) + "\n")


def forget_paths(folder: Path) -> None:
    """Remove the place of origin that the libraries note in each configuration."""
    for path in folder.rglob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def export(work: Path, target: Path) -> None:
    """Build the folder from the parts in ``work`` and swap it into ``target``."""
    fresh, old = target.with_name(target.name + ".new"), target.with_name(target.name + ".old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    export_tokenizer(work / "tokenizer", fresh / "tokenizer")
    export_text_encoder(work / "text_encoder", fresh / "text_encoder")
    UNet2DConditionModel.from_pretrained(work / "unet").half().save_pretrained(fresh / "unet")
    AutoencoderKL.from_pretrained(work / "vae").half().save_pretrained(fresh / "vae")
    export_scheduler(fresh / "scheduler")
    (fresh / "model_index.json").write_text(json.dumps(INDEX, indent=2) + "\n")
    forget_paths(fresh)
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def main() -> None:
    """Export and print the size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--target", type=Path, default=MODEL)
    options = parser.parse_args()
    with torch.no_grad():
        export(options.work, options.target)
    size = sum(path.stat().st_size for path in options.target.rglob("*") if path.is_file())
    print(f"{options.target}: {size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
