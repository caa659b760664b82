"""Trains the UNet on latents held in memory: v-prediction, bf16 with fp32 masters, averaged weights.

Needs the text encoder and the autoencoder in the work folder; both stay frozen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTokenizer

from examples.shapes import tokenizer as vocabulary
from examples.shapes.common import Average, Clock, MixedAdam, arguments, compiled, save_atomically
from examples.shapes.draw import article, caption, draw, random_scene
from examples.shapes.train_text_encoder import encode
from examples.shapes.train_vae import to_tensor

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

BATCH = 64
DROPPED = 0.1
"""Share of captions replaced by the empty one, for classifier-free guidance."""
BRIEF = 0.04
"""Share of captions that leave out the background."""


def build_unet() -> UNet2DConditionModel:
    """Return a fresh UNet for 4 x 16 x 16 latents and text states of width 128."""
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    unet.set_attn_processor(AttnProcessor())
    return unet


def noise_schedule() -> DDPMScheduler:
    """Return the training schedule; the exported sampler has the same betas."""
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction"
    )


def draw_timesteps(count: int) -> torch.Tensor:
    """Return int64 [count] timesteps: 25 % uniform, the rest around 650 (logit-normal)."""
    uniform = torch.rand(count)
    middle = torch.sigmoid(torch.randn(count) * 1.1 + 0.6)
    return (torch.where(torch.rand(count) < 0.25, uniform, middle) * 1000).long().clamp(0, 999)


@torch.no_grad()
def embed(model: CLIPTextModel, tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Return bf16 text states [n, 77, 128]."""
    ids = encode(tokenizer, captions).split(256)
    return torch.cat([model(part).last_hidden_state.bfloat16() for part in ids])


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, pictures: np.ndarray) -> torch.Tensor:
    """Return scaled latents float32 [n, 4, 16, 16] of uint8 [n, 64, 64, 3]."""
    parts = torch.from_numpy(pictures).split(128)
    sampled = [vae.encode(to_tensor(part.numpy())).latent_dist.sample() for part in parts]
    return torch.cat(sampled) * vae.config.scaling_factor


def dataset(options: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return latents [n, 4, 16, 16], the caption number of each [n] and the caption states.

    Caption 0 is the empty one.  The result is cached in the work folder
    until a part is newer.
    """
    cache = options.work / "latents.pt"
    parts = [*(options.work / "vae").iterdir(), *(options.work / "text_encoder").iterdir()]
    if cache.exists() and cache.stat().st_mtime > max(part.stat().st_mtime for part in parts):
        return torch.load(cache)
    rng = np.random.default_rng(options.seed)
    captions: dict[str, int] = {"": 0}
    pictures, numbers = [], []
    for _ in range(options.drawings):
        scene = random_scene(rng)
        text = caption(rng, scene)
        if rng.random() < BRIEF:
            text = f"{article(scene.fg)} {scene.fg} {scene.shape}"
        pictures.append(draw(scene))
        numbers.append(captions.setdefault(text, len(captions)))
    vae = AutoencoderKL.from_pretrained(options.work / "vae")
    model = CLIPTextModel.from_pretrained(options.work / "text_encoder").eval()
    states = embed(model, vocabulary.load(options.work / "tokenizer"), list(captions))
    result = encode_pictures(vae, np.stack(pictures)), torch.tensor(numbers), states
    save_atomically(result, cache)
    return result


class Noiser:
    """Adds noise to latents and knows the velocity that the UNet must predict."""

    def __init__(self) -> None:
        """Tabulate signal and noise amplitudes of the 1,000 timesteps."""
        kept = noise_schedule().alphas_cumprod
        self.signal, self.noise = kept.sqrt(), (1 - kept).sqrt()

    def __call__(self, latents: torch.Tensor, steps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the noisy latents and the velocity, shaped like ``latents`` [n, 4, 16, 16]."""
        a, b = self.signal[steps].view(-1, 1, 1, 1), self.noise[steps].view(-1, 1, 1, 1)
        fresh = torch.randn_like(latents)
        return a * latents + b * fresh, a * fresh - b * latents


def unet_loss(
    unet: UNet2DConditionModel, noisy: torch.Tensor, steps: torch.Tensor, text: torch.Tensor, wanted: torch.Tensor
) -> torch.Tensor:
    """Return the mean squared error of the predicted velocity."""
    return functional.mse_loss(unet(noisy.to(unet.dtype), steps, text).sample.float(), wanted)


def save(optimizer: MixedAdam, average: Average, work: Path, step: int, elapsed: float) -> None:
    """Write a checkpoint and the averaged UNet."""
    state = {**optimizer.state(), "average": average.shadow, "step": step, "elapsed": elapsed}
    save_atomically(state, work / "unet.pt")
    final = build_unet()
    average.copy_to(final.parameters())
    final.save_pretrained(work / "unet")


def main() -> None:
    """Train until the time is up; a checkpoint is written every three minutes."""
    parser = arguments(__doc__ or "", minutes=38, seed=3)
    parser.add_argument("--drawings", type=int, default=16000)
    parser.add_argument("--rate", type=float, default=1.2e-3)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    latents, numbers, states = dataset(options)
    unet, noiser = build_unet().to(torch.bfloat16), Noiser()
    optimizer = MixedAdam(unet.parameters())
    average = Average(optimizer.masters, 0.999)
    first, elapsed = 0, 0.0
    if options.resume:
        state = torch.load(options.work / "unet.pt")
        optimizer.restore(state)
        average.shadow, first, elapsed = state["average"], state["step"], state["elapsed"]
        torch.manual_seed(options.seed + first)
    clock = Clock(options.minutes, elapsed)
    fast_loss, saved, smooth = compiled(unet_loss), elapsed, 1.0
    for step in clock.steps(first):
        chosen = torch.randint(len(latents), (BATCH,))
        text = states[torch.where(torch.rand(BATCH) < DROPPED, 0, numbers[chosen])]
        steps = draw_timesteps(BATCH)
        noisy, wanted = noiser(latents[chosen], steps)
        loss = fast_loss(unet, noisy, steps, text, wanted)
        loss.backward()
        norm = optimizer.step(clock.rate(step, options.rate))
        average.update(optimizer.masters, step)
        smooth += (float(loss.detach()) - smooth) * 0.02
        clock.log(step, loss=smooth, norm=norm)
        if clock.elapsed - saved > 180:
            saved = clock.elapsed
            save(optimizer, average, options.work, step + 1, clock.elapsed)
    save(optimizer, average, options.work, step + 1, clock.elapsed)


if __name__ == "__main__":
    main()
