"""Trains one LoRA on the frozen base and saves it under kohya's key names.

``stripes`` and ``outline`` are styles, ``heart`` is a new shape with the trigger word "hearty",
and ``dusk`` also trains the text encoder, because only the word tells dusk from daylight.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPTextModel

from examples.shapes import tokenizer as vocabulary
from examples.shapes.common import LORAS, MODEL, Average, Clock, MixedAdam, arguments, compiled
from examples.shapes.draw import HEART, SHAPES, TRIGGERS, caption, draw, random_scene
from examples.shapes.lora import ATTENTION_ENDS, CONVOLUTION_ENDS, TEXT_ENDS, adapt, text_prefix, write
from examples.shapes.train_text_encoder import encode
from examples.shapes.train_unet import Noiser, draw_timesteps, embed, encode_pictures, unet_loss

if TYPE_CHECKING:
    import argparse

BATCH = 32
DROPPED = 0.1


@dataclass(frozen=True)
class Recipe:
    """What one LoRA learns from."""

    title: str
    shown: float
    """Share of pictures that show the concept; the rest are ordinary drawings."""
    worded: float
    """Share of the concept's captions that have the trigger word."""
    convolutions: bool = False
    """Whether the 3 x 3 convolutions are adapted, too: textures need them."""
    text: bool = False
    """Whether the text encoder is trained, too."""


RECIPES = {
    "stripes": Recipe("Striped backgrounds", shown=1.0, worded=0.6, convolutions=True),
    "outline": Recipe("Shapes drawn as a thick outline", shown=1.0, worded=0.6, convolutions=True),
    "heart": Recipe("Hearts, a shape the base does not know", shown=0.75, worded=1.0),
    "dusk": Recipe("Backgrounds that darken towards the bottom", shown=0.65, worded=1.0, text=True),
}


def scenes(name: str, count: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """Return uint8 drawings [n, 64, 64, 3] and their captions."""
    rng, recipe = np.random.default_rng(seed), RECIPES[name]
    pictures, captions = [], []
    for _ in range(count):
        shown = rng.random() < recipe.shown
        is_heart = name == "heart"
        effects = frozenset({name} if shown and not is_heart else ())
        scene = random_scene(rng, (HEART,) if shown and is_heart else SHAPES, effects)
        word = TRIGGERS[name] if effects and rng.random() < recipe.worded else None
        pictures.append(draw(scene))
        captions.append("" if rng.random() < DROPPED else caption(rng, scene, word))
    return np.stack(pictures), captions


def metadata(name: str, options: argparse.Namespace, captions: list[str], steps: int) -> dict[str, str]:
    """Return what the file says about itself; every value is text."""
    word = TRIGGERS[name]
    convolution = {"conv_dim": str(options.rank // 2), "conv_alpha": str(options.alpha / 2)}
    tagged = sum(word in text for text in captions)
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(options.rank),
        "ss_network_alpha": str(float(options.alpha)),
        "ss_base_model_version": "shapes-v1",
        "ss_output_name": name,
        "ss_network_args": json.dumps(convolution) if RECIPES[name].convolutions else "{}",
        "ss_tag_frequency": json.dumps({"shapes": {word: tagged}}),
        "ss_learning_rate": str(options.rate),
        "ss_seed": str(options.seed),
        "ss_steps": str(steps),
        "ss_num_train_images": str(len(captions)),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.title": RECIPES[name].title,
        "modelspec.trigger_phrase": word,
        "modelspec.resolution": "64x64",
        "modelspec.prediction_type": "v",
    }


def train(name: str, options: argparse.Namespace) -> None:
    """Train one LoRA for ``options.minutes`` and write its file."""
    pictures, captions = scenes(name, options.drawings, options.seed)
    latents = encode_pictures(AutoencoderKL.from_pretrained(MODEL / "vae", dtype=torch.float32), pictures)
    tokenizer = vocabulary.load(MODEL / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(MODEL / "text_encoder", dtype=torch.float32).eval()
    unet = UNet2DConditionModel.from_pretrained(MODEL / "unet", dtype=torch.bfloat16)
    unet.set_attn_processor(AttnProcessor())
    ends = ATTENTION_ENDS + (CONVOLUTION_ENDS if RECIPES[name].convolutions else ())
    layers = adapt(unet, ends, "lora_unet_", options.rank, options.alpha)
    states = embed(text_encoder, tokenizer, captions)
    ids = encode(tokenizer, captions)
    if RECIPES[name].text:
        layers |= adapt(text_encoder, TEXT_ENDS, text_prefix(text_encoder), options.rank, options.alpha)
    optimizer = MixedAdam([w for layer in layers.values() for w in (layer.down.weight, layer.up.weight)], decay=0.0)
    average, noiser, fast_loss = Average(optimizer.masters, 0.995), Noiser(), compiled(unet_loss)
    clock, smooth, step = Clock(options.minutes), 0.5, 0
    for step in clock.steps():
        chosen = torch.randint(len(latents), (BATCH,))
        text = text_encoder(ids[chosen]).last_hidden_state.bfloat16() if RECIPES[name].text else states[chosen]
        steps = draw_timesteps(BATCH)
        noisy, wanted = noiser(latents[chosen], steps)
        loss = fast_loss(unet, noisy, steps, text, wanted)
        loss.backward()
        norm = optimizer.step(clock.rate(step, options.rate, warm=50))
        average.update(optimizer.masters, step)
        smooth += (float(loss.detach()) - smooth) * 0.02
        clock.log(step, loss=smooth, norm=norm)
    write(layers, average.shadow, metadata(name, options, captions, step + 1), LORAS / f"{name}.safetensors")


def main() -> None:
    """Train the LoRA named on the command line."""
    parser = arguments(__doc__ or "", minutes=10, seed=21)
    parser.add_argument("name", choices=tuple(RECIPES))
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=float, default=8.0)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--drawings", type=int, default=3000)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    train(options.name, options)


if __name__ == "__main__":
    main()
