"""Real LoRA files and listings of real files, against the module lists of real bases."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from core.errors import LoraError, LoraFileInvalid, LoraUnmatched, LoraUnsupported
from core.safetensors_header import Header, base_hint, parse_header, tensor_digest
from tests.conftest import SHARED
from tests.lora_samples import ref_of, write
from worker.lora.adapters.lora import LowRank
from worker.lora.file import read
from worker.lora.keys import ModuleIndex, ModuleKey

pytestmark = pytest.mark.shared

FILES = SHARED / "data/lora/files"
MANIFESTS = SHARED / "data/lora/manifests"
Shapes = dict[str, tuple[int, ...]]


@pytest.fixture(autouse=True, scope="module")
def shared_data() -> None:
    if not FILES.is_dir():
        pytest.skip("the reference LoRA files are not part of a clone")


def manifest(name: str) -> Shapes:
    listing = json.loads((MANIFESTS / f"{name}.json").read_text())
    return {key: tuple(shape) for key, shape in listing["tensors"].items()}


def base(unet: str, te: str) -> ModuleIndex:
    """The modules of a base with matrices for weights, as `named_modules` lists them."""
    return ModuleIndex(
        {
            part: {
                name: shape for name, shape in manifest(listing).items() if len(shape) > 1 and "embeddings" not in name
            }
            for part, listing in (("unet", unet), ("te", te))
        }
    )


@pytest.fixture(scope="module")
def sd1() -> ModuleIndex:
    return base("base_sd1_unet", "base_clip_l_text_encoder")


def filled(path: Path, shapes: Shapes, dtype: torch.dtype = torch.float16) -> Path:
    """Make a file of a real one's layout with drawn values, at rank 4 to be quick."""
    draw = torch.Generator().manual_seed(0)
    thin = {key: _of_rank(key, shape, 4) for key, shape in shapes.items()}
    return write(path, {key: torch.randn(shape, generator=draw).to(dtype) for key, shape in thin.items()})


def _of_rank(key: str, shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    if "lora_down" in key:
        return (rank, *shape[1:])
    return (shape[0], rank, *shape[2:]) if "lora_up" in key else shape


def header_of(path: Path) -> Header:
    content = path.read_bytes()
    return parse_header(lambda start, length: content[start : start + length], len(content))


def test_the_diffusers_file_changes_128_modules_of_sd1(sd1: ModuleIndex) -> None:
    lora = read(FILES / "sd1_diffusers_pokemon_rank4.safetensors", ref_of("pokemon"), sd1)

    assert (lora.report.modules, lora.report.keys_matched) == (128, 256)
    assert (lora.report.keys_extra, lora.report.keys_unmatched, lora.report.warnings) == (0, 0, ())
    adapter = lora.adapters[ModuleKey("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0")]
    assert isinstance(adapter, LowRank)
    assert (adapter.rank, adapter.scaling) == (4, 1.0)
    assert all(adapter.delta(torch.zeros(sd1.shape(key))).any() for key, adapter in lora.adapters.items())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sd1_lokr_smart_falcon_rank4", "LoKr"),
        ("sd1_cloneofsimo_disney_rank1_ti", "cloneofsimo"),
        ("ti_embedding_invokeai_test", "textual inversion"),
    ],
)
def test_real_files_of_other_types_are_refused_by_name(name: str, kind: str, sd1: ModuleIndex) -> None:
    with pytest.raises(LoraUnsupported, match=rf"LoRA '{name}': this file is or holds .*{kind}"):
        read(FILES / f"{name}.safetensors", ref_of(name), sd1)


@pytest.mark.parametrize("name", ["sd1_lokr_smart_falcon_rank4", "sd1_diffusers_pokemon_rank4"])
def test_a_real_file_cut_short_is_refused(name: str, sd1: ModuleIndex, tmp_path: Path) -> None:
    content = (FILES / f"{name}.safetensors").read_bytes()
    path = tmp_path / "cut.safetensors"

    for size in (0, 7, 8, 1000, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(LoraFileInvalid):
            read(path, ref_of(name), sd1)


def test_the_digest_of_the_tensors_is_what_the_trainer_wrote() -> None:
    path = FILES / "sd1_lokr_smart_falcon_rank4.safetensors"
    header = header_of(path)

    with path.open("rb") as file:
        assert tensor_digest(file, header) == header.metadata["sshs_model_hash"]
    assert base_hint(header.metadata) == "SD 1"


def test_every_name_of_a_marketplace_sd1_lora_resolves(sd1: ModuleIndex, tmp_path: Path) -> None:
    shapes = manifest("sd1_kohya_shinkai_makoto_offset")

    report = read(filled(tmp_path / "k.safetensors", shapes), ref_of("shinkai"), sd1).report

    assert (report.keys_matched, report.modules) == (len(shapes), 264)
    assert (report.keys_extra, report.keys_unmatched) == (0, 0)


def test_an_sd1_lora_does_not_fit_sd2(tmp_path: Path) -> None:
    sd2 = base("base_sd2_unet", "base_openclip_h_sd2_text_encoder")

    with pytest.raises(LoraError, match="made for another base model"):
        read(FILES / "sd1_diffusers_pokemon_rank4.safetensors", ref_of("pokemon"), sd2)


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("sdxl_kohya_alien_style", LoraUnmatched, "SDXL"),
        ("flux_lora_diffusers_format", LoraUnmatched, "FLUX"),
        ("flux_lora_kohya_format", LoraUnmatched, "FLUX"),
        ("flux_lora_xlabs_format", LoraUnsupported, "XLabs"),
        ("flux_dora_onetrainer_format", LoraUnsupported, "DoRA"),
        ("flux_control_lora_format", LoraError, "bias changes"),
        ("anima_lora_kohya_format", LoraUnmatched, "diffusion transformer"),
        ("qwen_image_lora_kohya_format", LoraUnsupported, "LoKr"),
        ("ti_sd1_easynegative", LoraUnsupported, "textual inversion"),
    ],
)
def test_files_for_other_bases_are_refused_with_the_reason(
    name: str, error: type[Exception], says: str, sd1: ModuleIndex, tmp_path: Path
) -> None:
    """The header alone decides: the tensors stay empty."""
    shapes = {key: (0, *shape[1:]) if shape else (0,) for key, shape in manifest(name).items()}

    with pytest.raises(error, match=says):
        read(filled(tmp_path / "other.safetensors", shapes), ref_of(name), sd1)
