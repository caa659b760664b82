"""Trains the autoencoder: 64 x 64 pictures to 4 x 16 x 16 latents and back.

The loss is L1 + MSE plus a small KL term.  The drawings include each effect and the heart, so
that a LoRA is never held back by what the autoencoder can show.  ``--decoder`` goes on with the
decoder alone, for sharper edges: the latents, and what was trained on them, stay as they are.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np
import torch
from diffusers import AutoencoderKL

from examples.shapes.common import Average, Clock, MixedAdam, arguments, compiled, save_atomically
from examples.shapes.draw import EFFECTS, HEART, SHAPES, Scene, draw, random_scene

if TYPE_CHECKING:
    import argparse

BATCH = 32
KL_WEIGHT = 1e-6
"""Weight of the KL term summed over a latent's 1,024 elements, relative to a mean over pixels.

It is raised from 0 over the first 300 steps."""


def build_vae() -> AutoencoderKL:
    """Return a fresh autoencoder with 16, 32 and 64 channels."""
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
    )
    with torch.no_grad():  # Begin with quiet latents, or the decoder learns to ignore them.
        vae.quant_conv.weight[4:] = 0
        vae.quant_conv.bias[4:] = -6
    return vae


def varied_scene(rng: np.random.Generator) -> Scene:
    """Return a scene of any shape, heart included; 55 % have one or more effects."""
    chosen = frozenset(e for e in EFFECTS if rng.random() < 0.4) if rng.random() < 0.7 else frozenset()
    return random_scene(rng, (*SHAPES, HEART), chosen)


def to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """Turn uint8 [n, 64, 64, 3] into float32 [n, 3, 64, 64] in -1..1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def losses(vae: AutoencoderKL, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the pixel loss and the KL term (both scalars) of one batch [n, 3, 64, 64]."""
    posterior = vae.encode(wanted.to(vae.dtype)).latent_dist
    mean, spread = posterior.mean.float(), posterior.logvar.float()
    latents = mean + torch.exp(0.5 * spread) * torch.randn_like(mean)
    error = vae.decode(latents.to(vae.dtype)).sample.float() - wanted
    kl = 0.5 * (mean.square() + spread.exp() - 1 - spread).sum(dim=(1, 2, 3)).mean()
    return error.abs().mean() + error.square().mean(), kl


@torch.no_grad()
def latent_scale(vae: AutoencoderKL, pictures: torch.Tensor) -> float:
    """Return the factor that gives the latents of ``pictures`` unit variance."""
    return 1.0 / float(vae.encode(pictures).latent_dist.sample().std())


def chosen(vae: AutoencoderKL, *, decoder_only: bool) -> list[torch.Tensor]:
    """Return the parameters to train."""
    if decoder_only:
        return [*vae.post_quant_conv.parameters(), *vae.decoder.parameters()]
    return list(vae.parameters())


class Run:
    """One training run: the fp32 model that is written, its bf16 twin that is trained, and the state."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Begin afresh, from the finished autoencoder (``--decoder``) or from a checkpoint."""
        self.options = options
        self.whole = AutoencoderKL.from_pretrained(options.work / "vae") if options.decoder else build_vae()
        self.live = copy.deepcopy(self.whole).to(torch.bfloat16, memory_format=torch.channels_last)
        self.live.requires_grad_(requires_grad=False)
        parameters = chosen(self.live, decoder_only=options.decoder)
        for parameter in parameters:
            parameter.requires_grad_()
        self.optimizer = MixedAdam(parameters)
        self.average = Average(self.optimizer.masters, 0.998)
        self.path = options.work / ("decoder.pt" if options.decoder else "vae.pt")
        self.first, self.elapsed = 0, 0.0
        if options.resume:
            state = torch.load(self.path)
            self.optimizer.restore(state)
            self.average.shadow, self.first, self.elapsed = state["average"], state["step"], state["elapsed"]

    def save(self, step: int, elapsed: float) -> None:
        """Write a checkpoint and the averaged model with its scaling factor."""
        state = {**self.optimizer.state(), "average": self.average.shadow, "step": step, "elapsed": elapsed}
        save_atomically(state, self.path)
        self.average.copy_to(chosen(self.whole, decoder_only=self.options.decoder))
        if not self.options.decoder:
            rng = np.random.default_rng(7)
            pictures = np.stack([draw(random_scene(rng)) for _ in range(256)])
            self.whole.register_to_config(scaling_factor=round(latent_scale(self.whole, to_tensor(pictures)), 5))
        self.whole.save_pretrained(self.options.work / "vae")


def main() -> None:
    """Train until the time is up; a checkpoint is written every two minutes."""
    parser = arguments(__doc__ or "", minutes=10, seed=2)
    parser.add_argument("--drawings", type=int, default=20000)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--decoder", action="store_true", help="polish the decoder; latents stay as they are")
    options = parser.parse_args()
    run = Run(options)
    torch.manual_seed(options.seed + run.first)
    rng = np.random.default_rng(options.seed + run.first)
    pictures = np.stack([draw(varied_scene(rng)) for _ in range(options.drawings)])
    clock = Clock(options.minutes, run.elapsed)
    fast_losses, saved, step = compiled(losses), run.elapsed, run.first
    for step in clock.steps(run.first):
        batch = to_tensor(pictures[rng.integers(len(pictures), size=BATCH)])
        pixel, kl = fast_losses(run.live, batch)
        (pixel + KL_WEIGHT * min(1.0, step / 300) * kl).backward()
        norm = run.optimizer.step(clock.rate(step, options.rate, warm=30))
        run.average.update(run.optimizer.masters, step)
        clock.log(step, pixel=pixel, kl=kl, norm=norm)
        if clock.elapsed - saved > 120:
            saved = clock.elapsed
            run.save(step + 1, clock.elapsed)
    run.save(step + 1, clock.elapsed)


if __name__ == "__main__":
    main()
