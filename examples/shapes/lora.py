"""LoRA layers for training, and the merge of a kohya file into a pipeline's weights."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import nn

if TYPE_CHECKING:
    from pathlib import Path

    from diffusers import StableDiffusionPipeline

ATTENTION_ENDS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
CONVOLUTION_ENDS = ("conv1", "conv2")
"""The 3 x 3 convolutions of the residual blocks; they get half the rank."""
TEXT_ENDS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


class Adapted(nn.Module):
    """A frozen linear or convolution layer plus ``alpha / rank * up(down(x))``."""

    def __init__(self, base: nn.Linear | nn.Conv2d, rank: int, alpha: float) -> None:
        """Start with ``up`` at zero, so that nothing changes at first."""
        super().__init__()
        self.base, self.scale, self.alpha = base, alpha / rank, alpha
        if isinstance(base, nn.Conv2d):
            shape = {"kernel_size": base.kernel_size, "stride": base.stride, "padding": base.padding}
            self.down: nn.Module = nn.Conv2d(base.in_channels, rank, bias=False, **shape)
            self.up: nn.Module = nn.Conv2d(rank, base.out_channels, 1, bias=False)
        else:
            self.down = nn.Linear(base.in_features, rank, bias=False)
            self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.kaiming_uniform_(self.down.weight, a=5**0.5)
        nn.init.zeros_(self.up.weight)
        self.down.to(base.weight.dtype)
        self.up.to(base.weight.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer to ``x`` of any batch shape."""
        return self.base(x) + self.scale * self.up(self.down(x))


def adapt(model: nn.Module, ends: tuple[str, ...], prefix: str, rank: int, alpha: float) -> dict[str, Adapted]:
    """Freeze ``model``, wrap each layer whose name ends so, and return kohya name to layer."""
    model.requires_grad_(requires_grad=False)
    found = {
        name: module
        for name, module in model.named_modules()
        if name.endswith(ends) and isinstance(module, nn.Linear | nn.Conv2d)
    }
    adapted = {}
    for name, module in found.items():
        parent, _, own = name.rpartition(".")
        share = 2 if own in CONVOLUTION_ENDS else 1
        layer = Adapted(module, rank // share, alpha / share)
        setattr(model.get_submodule(parent), own, layer)
        adapted[prefix + name.replace(".", "_")] = layer
    return adapted


def text_prefix(text_encoder: nn.Module) -> str:
    """Return the kohya prefix; ``text_model`` is part of it where the library leaves it out."""
    return "lora_te_" if hasattr(text_encoder, "text_model") else "lora_te_text_model_"


def write(layers: dict[str, Adapted], weights: list[torch.Tensor], metadata: dict[str, str], path: Path) -> None:
    """Write fp16 weights (down and up of each layer in turn) with metadata and its hash."""
    tensors, values = {}, iter(weights)
    for name, layer in layers.items():
        tensors[f"{name}.lora_down.weight"] = next(values).detach().half().contiguous()
        tensors[f"{name}.lora_up.weight"] = next(values).detach().half().contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(layer.alpha, dtype=torch.float16)
    raw = save(tensors, metadata={"format": "pt"})
    body = raw[8 + int.from_bytes(raw[:8], "little") :]
    header = json.loads(raw[8 : len(raw) - len(body)])
    header["__metadata__"] = {**metadata, "sshs_model_hash": hashlib.sha256(body).hexdigest()}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(len(text).to_bytes(8, "little") + text + body)
    temporary.replace(path)


def trigger(path: Path) -> str:
    """Return the word that calls for the LoRA, from its metadata."""
    with safe_open(path, "pt") as file:
        return file.metadata()["modelspec.trigger_phrase"]


class Merger:
    """Adds LoRA files to a pipeline's weights and takes them away again, exactly."""

    def __init__(self, pipeline: StableDiffusionPipeline) -> None:
        """Note every layer by its kohya name and keep a copy of what a merge has changed."""
        self.layers: dict[str, nn.Module] = {}
        parts = {"lora_unet_": pipeline.unet, text_prefix(pipeline.text_encoder): pipeline.text_encoder}
        for prefix, part in parts.items():
            names = {n: m for n, m in part.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
            self.layers |= {prefix + name.replace(".", "_"): module for name, module in names.items()}
        self.kept: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def apply(self, files: dict[Path, float]) -> None:
        """Set the weights to base + sum of scale * alpha / rank * up @ down."""
        for name, weight in self.kept.items():
            self.layers[name].weight.copy_(weight)
        for path, scale in files.items():
            tensors = load_file(path)
            for name in sorted({key.split(".")[0] for key in tensors}):
                weight = self.layers[name].weight
                self.kept.setdefault(name, weight.clone())
                down, up = (tensors[f"{name}.lora_{part}.weight"].float() for part in ("down", "up"))
                change = (up.flatten(1) @ down.flatten(1)).view_as(weight)
                weight += scale * float(tensors[f"{name}.alpha"]) / len(down) * change
