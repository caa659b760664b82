"""Names in LoRA files resolve to the live model's modules, whole and never by guessing."""

from __future__ import annotations

import re

import pytest

from core.errors import LoraUnsupported
from worker.lora.adapters.lora import LowRank
from worker.lora.adapters.refused import refuse_unsupported
from worker.lora.keys import ModuleIndex, ModuleKey, other_base

ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
FLAT = ATTENTION.replace(".", "_")
CLIP = "encoder.layers.0"
UNET = {
    f"{ATTENTION}.to_q": (320, 320),
    f"{ATTENTION}.to_out.0": (320, 320),
    "time_embedding.linear_1": (1280, 320),
    "conv_in": (320, 4, 3, 3),
}
TE = {f"{CLIP}.self_attn.q_proj": (768, 768), f"{CLIP}.self_attn.out_proj": (768, 768), f"{CLIP}.mlp.fc1": (3072, 768)}


def index(root: str = "") -> ModuleIndex:
    return ModuleIndex({"unet": UNET, "te": {root + name: shape for name, shape in TE.items()}})


@pytest.mark.parametrize(
    ("stem", "module"),
    [
        (f"lora_unet_{FLAT}_to_q", f"{ATTENTION}.to_q"),
        (f"lora_unet_{FLAT}_to_out_0", f"{ATTENTION}.to_out.0"),
        (f"lora_unet_{FLAT}_to_out", f"{ATTENTION}.to_out.0"),
        ("lora_unet_time_embedding_linear_1", "time_embedding.linear_1"),
        ("lora_unet_conv_in", "conv_in"),
        (f"unet.{ATTENTION}.to_q", f"{ATTENTION}.to_q"),
        (f"unet.{ATTENTION}.to_out.0", f"{ATTENTION}.to_out.0"),
        (f"unet.{ATTENTION}.processor.to_out", f"{ATTENTION}.to_out.0"),
        (f"{ATTENTION}.processor.to_q", f"{ATTENTION}.to_q"),
        (f"base_model.model.{ATTENTION}.to_q", f"{ATTENTION}.to_q"),
        (f"unet.base_model.model.{ATTENTION}.to_q", f"{ATTENTION}.to_q"),
    ],
)
def test_every_spelling_of_a_unet_module_is_found(stem: str, module: str) -> None:
    assert index().find(stem) == ModuleKey("unet", module)


@pytest.mark.parametrize("root", ["", "text_model."], ids=["flat CLIP", "CLIP with text_model"])
@pytest.mark.parametrize(
    ("stem", "module"),
    [
        ("lora_te_text_model_encoder_layers_0_self_attn_q_proj", f"{CLIP}.self_attn.q_proj"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1", f"{CLIP}.mlp.fc1"),
        ("lora_te_encoder_layers_0_mlp_fc1", f"{CLIP}.mlp.fc1"),
        (f"text_encoder.text_model.{CLIP}.self_attn.to_q", f"{CLIP}.self_attn.q_proj"),
        (f"text_encoder.text_model.{CLIP}.self_attn.to_out", f"{CLIP}.self_attn.out_proj"),
        (f"text_encoder.{CLIP}.self_attn.q_proj", f"{CLIP}.self_attn.q_proj"),
        (f"base_model.model.text_model.{CLIP}.self_attn.q_proj", f"{CLIP}.self_attn.q_proj"),
    ],
)
def test_text_encoder_names_are_found_with_and_without_the_text_model_level(root: str, stem: str, module: str) -> None:
    assert index(root).find(stem) == ModuleKey("te", root + module)


@pytest.mark.parametrize(
    "stem",
    [
        "",
        "lora_unet_",
        f"lora_unet_{FLAT}",
        f"lora_unet_{ATTENTION}.to_q",
        f"lora_te_{FLAT}_to_q",
        f"unet.{FLAT}_to_q",
        f"lora_unet_{FLAT}_to_q_",
        "lora_unet_time.embedding.linear_1",
        f"text_encoder_2.{CLIP}.mlp.fc1",
    ],
)
def test_what_is_not_exactly_a_spelling_is_not_found(stem: str) -> None:
    assert index().find(stem) is None


def test_a_spelling_that_could_mean_two_modules_means_none() -> None:
    both = ModuleIndex({"unet": {"proj": (1, 1)}, "te": {"proj": (1, 1)}})

    assert both.find("base_model.model.proj") is None
    assert both.find("unet.proj") == ModuleKey("unet", "proj")
    assert both.find("text_encoder.proj") == ModuleKey("te", "proj")


@pytest.mark.parametrize(
    ("stem", "component"),
    [("lora_te2_text_model_x", "te2"), ("text_encoder_2.x", "te2"), ("lora_te3_x", "te3"), ("lora_te_x", None)],
)
def test_names_of_text_encoders_that_the_model_lacks_are_known(stem: str, component: str | None) -> None:
    assert index().absent_component(stem) == component


@pytest.mark.parametrize(
    ("stem", "base"),
    [
        ("lora_unet_double_blocks_0_img_attn_qkv", "FLUX"),
        ("lora_unet_input_blocks_4_1_proj_in", "SDXL in its original names"),
        ("lora_unet_blocks_0_cross_attn_k_proj", "a diffusion transformer"),
        ("transformer.single_transformer_blocks.0.attn.to_q", "FLUX"),
        (f"lora_unet_{FLAT}_to_q", ""),
    ],
)
def test_names_of_other_bases_are_recognised(stem: str, base: str) -> None:
    assert other_base([stem]) == base


@pytest.mark.parametrize(
    ("key", "split"),
    [
        ("lora_unet_x.lora_down.weight", ("lora_unet_x", "down")),
        ("lora_unet_x.lora_up.weight", ("lora_unet_x", "up")),
        ("lora_unet_x.alpha", ("lora_unet_x", "alpha")),
        ("unet.a.to_q.lora.down.weight", ("unet.a.to_q", "down")),
        ("unet.a.processor.to_q_lora.up.weight", ("unet.a.processor.to_q", "up")),
        ("text_encoder.a.q_proj.lora_linear_layer.up.weight", ("text_encoder.a.q_proj", "up")),
        ("unet.a.to_q.lora_A.weight", ("unet.a.to_q", "down")),
        ("base_model.model.a.to_q.lora_B.default.weight", ("base_model.model.a.to_q", "up")),
        ("unet.a.to_q_lora.alpha", ("unet.a.to_q", "alpha")),
        ("lora_unet_x.weight", None),
        ("lora_unet_x.lora_mid.weight", None),
        (".lora_down.weight", None),
        ("alpha", None),
    ],
)
def test_the_parts_of_a_pair_are_read_in_every_generation_of_names(key: str, split: tuple[str, str] | None) -> None:
    assert LowRank.split(key) == split


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("unet:0:up", "cloneofsimo"),
        ("emb_params", "textual inversion"),
        ("bundle_emb.zorp.clip_l", "textual inversion"),
        ("lllite_unet_x.down.0.weight", "ControlNet-LLLite"),
        ("lora_controlnet", "Control-LoRA"),
        ("ip_adapter.1.to_k_ip.weight", "IP-Adapter"),
        ("model.diffusion_model.out.2.weight", "a whole checkpoint"),
        ("lora_unet_x.dora_scale", "DoRA"),
        ("unet.x.lora_magnitude_vector", "DoRA"),
        ("lora_unet_x.hada_w1_a", "LoHa"),
        ("lora_unet_x.lokr_w2", "LoKr"),
        ("lora_unet_x.lora_mid.weight", "Tucker"),
        ("oft_unet_x.oft_blocks", "OFT"),
        ("unet.x.oft_R.weight", "OFT"),
        ("lora_unet_x.a1.weight", "GLoRA"),
        ("lora_unet_x.on_input", "IA3"),
        ("unet.x.ia3_l", "IA3"),
        ("lora_unet_x.diff_b", "full weight changes"),
        ("lora_unet_x.w_norm", "norm changes"),
        ("unet.x.lora_B.bias", "bias changes"),
        ("lora_unet_x.reshape_weight", "reshapes"),
        ("lora_unet_x.lambda_layer", "T-LoRA"),
        ("unet.x.vera_lambda_b", "VeRA"),
        ("unet.x.delora_A", "DeLoRA"),
        ("double_blocks.0.processor.qkv_lora1.down.weight", "XLabs"),
    ],
)
def test_every_other_type_is_refused_by_its_name(key: str, kind: str) -> None:
    with pytest.raises(LoraUnsupported, match=re.escape(kind)) as refusal:
        refuse_unsupported(["lora_unet_y.lora_down.weight", key])

    assert repr(key) in str(refusal.value)


def test_two_adapters_in_one_file_are_refused() -> None:
    with pytest.raises(LoraUnsupported, match=r"2 adapters \(default, other\)"):
        refuse_unsupported(["a.lora_A.default.weight", "b.lora_A.other.weight"])


def test_plain_lora_names_are_not_refused() -> None:
    refuse_unsupported(["lora_unet_x.lora_down.weight", "lora_unet_x.alpha", "unet.x.lora_A.default.weight"])
