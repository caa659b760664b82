"""Fused weights give what PEFT's own layers give, from files in each of the three layouts."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.lora_samples import ref_of, write
from worker.lora.file import read
from worker.lora.fuse import Fuser

RANK, ALPHA = 4, 6.0
UNET_TARGETS = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "ff.net.0.proj",
    "ff.net.2",
    "proj_in",
    "proj_out",
    "conv1",
    "conv2",
]
TE_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    unet: Any = UNet2DConditionModel(  # type: ignore[no-untyped-call]
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    te: Any = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    return {"unet": unet.eval(), "te": te.eval()}


@torch.no_grad()
def outputs(models: dict[str, nn.Module]) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(5)
    tokens = torch.randint(2, 50, (2, 16), generator=draw)
    latents = torch.randn(2, 4, 8, 8, generator=draw)
    prompt = models["te"](tokens).last_hidden_state
    return models["unet"](latents, torch.tensor([500, 20]), prompt).sample, prompt


@pytest.fixture(scope="module")
def adapted(models: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The models with PEFT's LoRA layers in them, at random values."""
    from peft import LoraConfig, inject_adapter_in_model

    adapted = copy.deepcopy(models)
    for part, targets in (("unet", UNET_TARGETS), ("te", TE_TARGETS)):
        config = LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules=targets, init_lora_weights=False)
        adapted[part] = inject_adapter_in_model(config, adapted[part]).eval()
    return adapted


def pairs(adapted: dict[str, nn.Module]) -> dict[tuple[str, str, str], torch.Tensor]:
    """The factors by component, module and ``A`` or ``B``."""
    from peft import get_peft_model_state_dict

    found = {}
    for part, model in adapted.items():
        for key, tensor in get_peft_model_state_dict(model).items():
            module, _, half = key.removesuffix(".weight").rpartition(".lora_")
            found[part, module, half] = tensor
    assert found
    return found


def in_kohya_names(factors: dict[tuple[str, str, str], torch.Tensor]) -> dict[str, torch.Tensor]:
    file = {}
    for (part, module, half), tensor in factors.items():
        path = ("text_model." if part == "te" else "") + module
        stem = f"lora_{part}_{path.replace('.', '_')}"
        file[f"{stem}.lora_{'down' if half == 'A' else 'up'}.weight"] = tensor
        file[f"{stem}.alpha"] = torch.tensor(ALPHA)
    return file


def in_diffusers_names(factors: dict[tuple[str, str, str], torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without alpha, as diffusers wrote them: the scaling is in the up factor."""
    file = {}
    for (part, module, half), tensor in factors.items():
        if part == "te":
            stem, middle = f"text_encoder.text_model.{module}", "lora_linear_layer"
        else:
            stem, middle = f"unet.{module}", "lora"
        value = tensor if half == "A" else tensor * (ALPHA / RANK)
        file[f"{stem}.{middle}.{'down' if half == 'A' else 'up'}.weight"] = value
    return file


def in_peft_names(factors: dict[tuple[str, str, str], torch.Tensor]) -> dict[str, torch.Tensor]:
    prefixes = {"unet": "unet", "te": "text_encoder"}
    return {f"{prefixes[part]}.{module}.lora_{half}.weight": tensor for (part, module, half), tensor in factors.items()}


PEFT_METADATA = {
    "lora_adapter_metadata": json.dumps(
        {f"{p}.{k}": v for p in ("unet", "text_encoder") for k, v in (("r", RANK), ("lora_alpha", ALPHA))}
    )
}


@pytest.mark.parametrize(
    ("layout", "metadata"),
    [(in_kohya_names, {}), (in_diffusers_names, {}), (in_peft_names, PEFT_METADATA)],
    ids=["kohya", "diffusers", "peft"],
)
def test_fused_models_draw_what_peft_draws(
    layout: Any, metadata: dict[str, str], models: dict[str, nn.Module], adapted: dict[str, nn.Module], tmp_path: Path
) -> None:
    plain, expected = outputs(models), outputs(adapted)
    fused = copy.deepcopy(models)
    fuser = Fuser(fused)

    lora = read(write(tmp_path / "a.safetensors", layout(pairs(adapted)), metadata), ref_of("a"), fuser.index)
    fuser.apply([lora])

    assert lora.report.keys_unmatched == lora.report.keys_extra == 0
    for got, want, without in zip(outputs(fused), expected, plain, strict=True):
        assert (want - without).abs().max() > 0.01 * want.abs().max()
        assert (got - want).abs().max() <= 2e-5 * want.abs().max()
    fuser.restore()
    for got, without in zip(outputs(fused), plain, strict=True):
        assert torch.equal(got, without)


def test_rank_stabilised_scaling_is_pefts(models: dict[str, nn.Module], tmp_path: Path) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    adapted = copy.deepcopy(models)
    config = LoraConfig(
        r=RANK,
        lora_alpha=2,
        target_modules=["to_q", "to_k"],
        use_rslora=True,
        init_lora_weights=False,
        alpha_pattern={"attn2.to_k": 5},
    )
    adapted["unet"] = inject_adapter_in_model(config, adapted["unet"]).eval()
    declared = {"unet.lora_alpha": 2, "unet.use_rslora": True, "unet.alpha_pattern": {"attn2.to_k": 5}}
    fused = copy.deepcopy(models)
    fuser = Fuser(fused)
    factors = pairs({"unet": adapted["unet"]})

    path = write(tmp_path / "a.safetensors", in_peft_names(factors), {"lora_adapter_metadata": json.dumps(declared)})
    fuser.apply([read(path, ref_of("a"), fuser.index)])

    got, want = outputs(fused)[0], outputs(adapted)[0]
    assert (got - want).abs().max() <= 2e-5 * want.abs().max()
    assert not torch.allclose(want, outputs(models)[0], atol=1e-3)
