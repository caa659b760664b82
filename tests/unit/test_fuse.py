"""Reading LoRA files into changes, and fusing those into weights."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import pytest
import torch
from torch import nn

from core.errors import (
    LoraFileInvalid,
    LoraNotFinite,
    LoraPairIncomplete,
    LoraShapeMismatch,
    LoraUnmatched,
    LoraUnsupported,
)
from core.lora import LoraRef
from tests.lora_samples import Tensors, loaded, ref_of, write
from worker.lora.adapters.base import Declared
from worker.lora.adapters.lora import LowRank
from worker.lora.file import LoadedLora, read
from worker.lora.fuse import Fuser
from worker.lora.keys import ModuleKey

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


class Unet(nn.Module):
    """A linear layer, a 3×3 and a 1×1 convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(24, 16, bias=False)
        self.conv = nn.Conv2d(6, 16, 3)
        self.proj_in = nn.Conv2d(12, 16, 1)
        self.grouped = nn.Conv2d(4, 4, 3, groups=2)


class TextEncoder(nn.Module):
    """One linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(10, 10)


def components(dtype: torch.dtype = torch.float32) -> dict[str, nn.Module]:
    torch.manual_seed(1)
    return {"unet": Unet().to(dtype), "te": TextEncoder().to(dtype)}


def weights(parts: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    return {f"{c}.{n}": w for c, part in parts.items() for n, w in part.state_dict(keep_vars=True).items()}


def bits(parts: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone().view(torch.uint8) for name, weight in weights(parts).items()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def kohya(seed: int = 0, rank: int = 4, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A file's tensors for all four layers, with an alpha of half the rank."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {
        "lora_unet_to_q": ((rank, 24), (16, rank)),
        "lora_unet_conv": ((rank, 6, 3, 3), (16, rank, 1, 1)),
        "lora_unet_proj_in": ((rank, 12), (16, rank)),
        "lora_te_q_proj": ((rank, 10), (10, rank)),
    }
    tensors = {}
    for stem, (down, up) in shapes.items():
        tensors[f"{stem}.lora_down.weight"] = torch.randn(down, generator=draw).to(dtype)
        tensors[f"{stem}.lora_up.weight"] = torch.randn(up, generator=draw).to(dtype)
        tensors[f"{stem}.alpha"] = torch.tensor(rank / 2).to(dtype)
    return tensors


def one_layer(name: str = "a", module: str = "to_q", unet: float = 1.0) -> LoadedLora:
    draw = torch.Generator().manual_seed(sum(map(ord, name)))
    adapter = LowRank(torch.randn(3, 24, generator=draw), torch.randn(16, 3, generator=draw))
    return loaded(ref_of(name, unet), {ModuleKey("unet", module): adapter})


@pytest.fixture
def lora_path(tmp_path: Path) -> Path:
    return tmp_path / "a.safetensors"


def oracle(base: torch.Tensor, tensors: Tensors, stem: str, scale: float) -> torch.Tensor:
    """W0 + scale·(alpha/r)·up·down in float64."""
    up, down = (tensors[f"{stem}.lora_{part}.weight"].double().flatten(1) for part in ("up", "down"))
    return base.double() + (scale * float(tensors[f"{stem}.alpha"]) / down.shape[0] * (up @ down)).reshape(base.shape)


# --- the formula ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_fused_weights_are_the_formula_rounded_once(dtype: torch.dtype, stored: torch.dtype, lora_path: Path) -> None:
    parts, tensors = components(dtype), kohya(dtype=stored)
    base = {name: weight.detach().clone() for name, weight in weights(parts).items()}
    fuser = Fuser(parts)

    fuser.apply([read(write(lora_path, tensors), ref_of("a", unet=0.7, te=-1.3), fuser.index)])

    for stem, name, scale in [
        ("lora_unet_to_q", "unet.to_q.weight", 0.7),
        ("lora_unet_conv", "unet.conv.weight", 0.7),
        ("lora_unet_proj_in", "unet.proj_in.weight", 0.7),
        ("lora_te_q_proj", "te.q_proj.weight", -1.3),
    ]:
        exact, got = oracle(base[name], tensors, stem, scale), weights(parts)[name].detach()
        if dtype in {torch.float32, torch.float64}:
            error = (got.double() - exact).abs().max() / exact.abs().max()
            assert error <= (1e-6 if dtype == torch.float32 else 1e-14)
        else:
            assert (got == exact.to(dtype)).double().mean() >= 0.998
    for name in ("unet.conv.bias", "unet.grouped.weight", "te.q_proj.bias"):
        assert torch.equal(weights(parts)[name], base[name])


def test_several_loras_on_one_layer_add_up() -> None:
    parts = components()
    base = weights(parts)["unet.to_q.weight"].detach().double()
    loras = [one_layer("a", unet=0.5), one_layer("b", unet=-0.25), one_layer("c", unet=2.0)]

    Fuser(parts).apply(loras)

    exact = base
    for lora in loras:
        exact = exact + lora.ref.unet * lora.adapters[ModuleKey("unet", "to_q")].delta(base.double())
    assert torch.allclose(weights(parts)["unet.to_q.weight"].double(), exact, rtol=0, atol=1e-5)


def test_types_that_are_no_factor_pairs_add_their_change() -> None:
    @dataclass(frozen=True)
    class Doubling:
        kind: ClassVar[str] = "doubling"
        scaling: float = 1.0

        @classmethod
        def split(cls, key: str) -> tuple[str, str] | None:
            raise NotImplementedError

        @classmethod
        def build(cls, parts: Tensors, shape: tuple[int, ...], declared: Declared) -> Self:
            raise NotImplementedError

        def delta(self, weight: torch.Tensor) -> torch.Tensor:
            return weight

    parts = components()
    base = weights(parts)["unet.conv.weight"].detach().clone()

    Fuser(parts).apply([loaded(ref_of("d", unet=0.5), {ModuleKey("unet", "conv"): Doubling()})])

    assert torch.equal(weights(parts)["unet.conv.weight"], base * 1.5)


@pytest.mark.parametrize(
    ("module", "down", "up"),
    [
        ("proj_in", (2, 12), (16, 2)),
        ("proj_in", (2, 12, 1, 1), (16, 2, 1, 1)),
        ("to_q", (2, 24, 1, 1), (16, 2, 1, 1)),
        ("to_q", (2, 24), (16, 2, 1, 1)),
        ("conv", (2, 6, 3, 3), (16, 2)),
        ("conv", (2, 54), (16, 2, 1, 1)),
    ],
)
def test_factors_fit_with_two_or_four_dimensions(
    module: str, down: tuple[int, ...], up: tuple[int, ...], lora_path: Path
) -> None:
    fuser = Fuser(components())
    tensors = {
        f"lora_unet_{module}.lora_down.weight": torch.ones(down),
        f"lora_unet_{module}.lora_up.weight": torch.ones(up),
    }

    lora = read(write(lora_path, tensors), ref_of("a"), fuser.index)

    assert fuser.apply([lora]).modules == 1


# --- scaling ----------------------------------------------------------------------------------------------------

PAIR = {"unet.to_q.lora_A.weight": torch.ones(4, 24), "unet.to_q.lora_B.weight": torch.ones(16, 4)}


@pytest.mark.parametrize(
    ("declared", "scaling"),
    [
        ({}, 1.0),
        ({"unet.lora_alpha": 8, "unet.r": 4}, 2.0),
        ({"unet.lora_alpha": 8, "unet.r": 64}, 2.0),
        ({"unet.lora_alpha": 8, "unet.use_rslora": True}, 4.0),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"to_q": 1}}, 0.25),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"^to_q": 1}}, 0.25),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"o_q": 1}}, 2.0),
        ({"text_encoder.lora_alpha": 8}, 1.0),
    ],
)
def test_peft_metadata_scales(declared: dict[str, object], scaling: float, lora_path: Path) -> None:
    metadata = {"lora_adapter_metadata": json.dumps(declared, indent=2)}

    lora = read(write(lora_path, PAIR, metadata), ref_of("a"), Fuser(components()).index)

    assert lora.adapters[ModuleKey("unet", "to_q")].scaling == scaling


def test_an_alpha_tensor_overrules_metadata(lora_path: Path) -> None:
    metadata = {"lora_adapter_metadata": '{"unet.lora_alpha": 8, "unet.use_rslora": true}'}
    tensors = {**PAIR, "unet.to_q.alpha": torch.tensor([2])}

    lora = read(write(lora_path, tensors, metadata), ref_of("a"), Fuser(components()).index)

    assert lora.adapters[ModuleKey("unet", "to_q")].scaling == 0.5


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{", LoraFileInvalid),
        ("[]", LoraFileInvalid),
        ('{"unet.lora_alpha": "8"}', LoraFileInvalid),
        ('{"unet.lora_alpha": NaN}', LoraFileInvalid),
        ('{"unet.alpha_pattern": [1]}', LoraFileInvalid),
        ('{"unet.alpha_pattern": {"(a+)+$": 1}}', LoraUnsupported),
        ('{"unet.init_lora_weights": "pissa_niter_16"}', LoraUnsupported),
    ],
)
def test_metadata_that_cannot_be_obeyed_is_refused(text: str, error: type[Exception], lora_path: Path) -> None:
    path = write(lora_path, PAIR, {"lora_adapter_metadata": text})

    with pytest.raises(error):
        read(path, ref_of("a"), Fuser(components()).index)


def test_alpha_zero_changes_nothing_and_is_said(lora_path: Path) -> None:
    fuser = Fuser(components())
    lora = read(write(lora_path, {**PAIR, "unet.to_q.alpha": torch.tensor(0.0)}), ref_of("a"), fuser.index)

    assert fuser.apply([lora]).modules == 0
    assert lora.report.warnings == ("1 modules have alpha 0 and change nothing",)


# --- what a file may be -----------------------------------------------------------------------------------------


def test_every_tensor_is_counted_once(lora_path: Path) -> None:
    tensors = kohya() | {"lora_te2_x.lora_down.weight": torch.ones(1, 4), "lora_te2_x.lora_up.weight": torch.ones(4, 1)}

    report = read(
        write(lora_path, tensors, {"modelspec.trigger_phrase": "zorp"}), ref_of("a", 0.5), Fuser(components()).index
    ).report

    assert (report.keys_matched, report.keys_extra, report.keys_unmatched) == (12, 2, 0)
    assert (report.type, report.modules, report.unet, report.trigger_words) == ("lora", 4, 0.5, ("zorp",))
    assert report.warnings == ("2 tensors are for text encoders that this model lacks (te2)",)


def test_a_lower_threshold_lets_some_tensors_be_without_a_place(lora_path: Path) -> None:
    tensors = kohya() | {"lora_unet_nowhere.lora_down.weight": torch.ones(1, 4)}
    index = Fuser(components()).index
    path = write(lora_path, tensors)

    report = read(path, ref_of("a"), index, match_threshold=0.9).report

    assert (report.keys_matched, report.keys_unmatched) == (12, 1)
    assert "'lora_unet_nowhere.lora_down.weight'" in report.warnings[0]
    with pytest.raises(LoraUnmatched, match=r"12 tensors fit this model, 1 do not.*lora_unet_nowhere"):
        read(path, ref_of("a"), index)


def changed(name: str, value: torch.Tensor | None) -> Callable[[], dict[str, torch.Tensor]]:
    return lambda: {key: tensor for key, tensor in (kohya() | {name: value}).items() if tensor is not None}


DOWN, UP, ALPHA = (f"lora_unet_to_q.{part}" for part in ("lora_down.weight", "lora_up.weight", "alpha"))


@pytest.mark.parametrize(
    ("tensors", "error", "says"),
    [
        (changed(DOWN, None), LoraPairIncomplete, "'lora_unet_to_q': the down factor is missing"),
        (changed(UP, None), LoraPairIncomplete, "'lora_unet_to_q': the up factor is missing"),
        (changed(UP, torch.ones(16, 5)), LoraShapeMismatch, r"down \[4, 24\] and up \[16, 5\] do not share a rank"),
        (changed(DOWN, torch.ones(4, 32)), LoraShapeMismatch, r"this model's is \[16, 24\]; it may be made"),
        (changed(UP, torch.ones(17, 4)), LoraShapeMismatch, r"of shape \[17, 24\], this model's is \[16, 24\]"),
        (changed("lora_unet_conv.lora_down.weight", torch.ones(4, 54, 1, 1)), LoraShapeMismatch, r"\[16, 6, 3, 3\]"),
        (changed("lora_unet_conv.lora_up.weight", torch.ones(16, 4, 3, 3)), LoraShapeMismatch, "do not share a rank"),
        (changed(DOWN, torch.ones(0, 24)), LoraShapeMismatch, "no matrices"),
        (changed(DOWN, torch.ones(4)), LoraShapeMismatch, "no matrices"),
        (changed(ALPHA, torch.ones(2)), LoraShapeMismatch, "alpha has the shape"),
        (changed(DOWN, torch.full((4, 24), math.nan)), LoraNotFinite, f"'{DOWN}' holds NaN"),
        (changed(UP, torch.full((16, 4), math.inf)), LoraNotFinite, f"'{UP}' holds NaN"),
        (changed(ALPHA, torch.tensor(math.nan)), LoraNotFinite, "alpha' holds NaN"),
        (changed(DOWN, torch.ones(4, 24, dtype=torch.int32)), LoraUnsupported, "stored as I32"),
        (changed(DOWN, torch.ones(4, 24).to(torch.float8_e4m3fn)), LoraUnsupported, "stored as F8_E4M3"),
        (changed("unet.to_q.lora_A.weight", torch.ones(4, 24)), LoraUnsupported, "both change the same module"),
        (changed("lora_te1_q_proj.alpha", torch.ones(1)), LoraUnsupported, "both change the same module"),
        (changed("lora_unet_to_q.dora_scale", torch.ones(1, 24)), LoraUnsupported, "DoRA"),
        (lambda: {"lora_unet_double_blocks_0.alpha": torch.ones(1)}, LoraUnmatched, "seems to be made for FLUX"),
        (lambda: {"lora_te2_x.alpha": torch.ones(1)}, LoraUnmatched, "1 are for parts it lacks"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_refused_with_its_name(
    tensors: Callable[[], Tensors], error: type[Exception], says: str, lora_path: Path
) -> None:
    path = write(lora_path, tensors())

    with pytest.raises(error, match=rf"LoRA 'zorp': .*{says}"):
        read(path, ref_of("zorp"), Fuser(components()).index)


def test_a_file_for_another_base_is_said_to_be(lora_path: Path) -> None:
    path = write(lora_path, changed(DOWN, torch.ones(4, 32))(), {"ss_base_model_version": "sd_v2"})

    with pytest.raises(LoraShapeMismatch, match="made for SD 2"):
        read(path, ref_of("a"), Fuser(components()).index)


def test_unaligned_tensors_are_read(lora_path: Path) -> None:
    content = write(lora_path, kohya()).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip() + b" "
    lengths = [n for n in range(len(header), len(header) + 8) if n % 4]
    index = Fuser(components()).index
    expected = read(lora_path, ref_of("a"), index).adapters[ModuleKey("te", "q_proj")]

    for n in lengths:
        lora_path.write_bytes(n.to_bytes(8, "little") + header.ljust(n) + content[8 + length :])
        got = read(lora_path, ref_of("a"), index).adapters[ModuleKey("te", "q_proj")]
        assert isinstance(got, LowRank)
        assert isinstance(expected, LowRank)
        assert torch.equal(got.lora_down, expected.lora_down)


def test_a_file_that_shrinks_while_it_is_read_is_refused(lora_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = write(lora_path, kohya()).stat().st_size
    with lora_path.open("r+b") as file:
        file.truncate(size - 4)
    real = os.fstat
    monkeypatch.setattr(os, "fstat", lambda fd: os.stat_result((*real(fd)[:6], size, *real(fd)[7:])))

    with pytest.raises(LoraFileInvalid, match="the file ended within"):
        read(lora_path, ref_of("a"), Fuser(components()).index)


# --- fusing as a change of state --------------------------------------------------------------------------------


def test_no_lora_means_no_copies() -> None:
    fuser = Fuser(components())

    assert fuser.apply([]).modules == 0
    assert fuser.pristine_bytes == 0


def test_only_touched_layers_are_copied_and_only_once() -> None:
    fuser = Fuser(components())

    for name in ("a", "b", "a"):
        fuser.apply([one_layer(name)])

    assert fuser.pristine_bytes == 16 * 24 * 4


def test_the_set_that_is_fused_already_is_not_fused_again() -> None:
    parts = components()
    fuser = Fuser(parts)
    fuser.apply([one_layer("a"), one_layer("b")])
    before = bits(parts)

    again = fuser.apply([one_layer("b"), one_layer("a")])

    assert again.modules == 0
    assert same(bits(parts), before)


def test_a_switch_writes_what_either_set_touches_once(lora_path: Path) -> None:
    fuser = Fuser(components())
    everything = read(write(lora_path, kohya()), ref_of("all"), fuser.index)

    assert fuser.apply([everything]).modules == 4
    assert fuser.apply([one_layer("a")]).modules == 4
    assert fuser.apply([one_layer("b")]).modules == 1
    assert fuser.restore().modules == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_twenty_sets_and_then_none_leave_the_base_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    parts = components(dtype)
    fuser = Fuser(parts)
    base, places = bits(parts), [weight.data_ptr() for weight in weights(parts).values()]
    files = [write(tmp_path / f"{n}.safetensors", kohya(seed=n)) for n in range(4)]

    for n in range(20):
        chosen = [i for i in range(4) if (n + 1) >> i & 1]
        fuser.apply([read(files[i], ref_of(str(i), 0.1 * (n + 1), 0.5), fuser.index) for i in chosen])
        if chosen:
            assert not same(bits(parts), base)
    fuser.restore()

    assert same(bits(parts), base)
    assert [weight.data_ptr() for weight in weights(parts).values()] == places


def test_scale_zero_and_opposite_scales_are_the_empty_set() -> None:
    parts = components()
    fuser = Fuser(parts)
    base = bits(parts)
    fuser.apply([one_layer("b")])

    fuser.apply([one_layer("a", unet=0.5), one_layer("a", unet=-0.5), one_layer("c", unet=0.0)])

    assert same(bits(parts), base)


def test_an_overflow_restores_the_base_and_names_the_module() -> None:
    parts = components(torch.float16)
    fuser = Fuser(parts)
    base = bits(parts)
    huge = LowRank(torch.full((1, 24), 1e4), torch.full((16, 1), 1e4))
    fuser.apply([one_layer("a", module="to_q")])

    with pytest.raises(LoraNotFinite, match="'to_q' overflows"):
        fuser.apply([loaded(ref_of("huge"), {ModuleKey("unet", "to_q"): huge})])

    assert same(bits(parts), base)
    assert fuser.restore().modules == 0
    assert fuser.apply([one_layer("a", module="to_q")]).modules == 1


def test_a_failure_half_way_leaves_the_base(lora_path: Path) -> None:
    parts = components()
    fuser = Fuser(parts)
    base = bits(parts)
    whole = read(write(lora_path, kohya()), ref_of("all"), fuser.index)
    wrong = LowRank(torch.ones(1, 23), torch.ones(16, 1))
    fuser.apply([one_layer("a")])

    with pytest.raises(RuntimeError):
        fuser.apply([loaded(whole.ref, {**whole.adapters, ModuleKey("unet", "to_q"): wrong})])

    assert same(bits(parts), base)
    fuser.apply([one_layer("a")])
    fresh = components()
    Fuser(fresh).apply([one_layer("a")])
    assert same(bits(parts), bits(fresh))


def test_a_rounding_setting_for_sampling_does_not_reach_fusing() -> None:
    before = torch.get_float32_matmul_precision()
    seen: list[str] = []

    class Watching(LowRank):
        def factors(self, scale: float, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            seen.append(torch.get_float32_matmul_precision())
            return super().factors(scale, like)

    torch.set_float32_matmul_precision("medium")
    try:
        adapter = Watching(torch.ones(1, 24), torch.ones(16, 1))
        Fuser(components()).apply([loaded(ref_of("w"), {ModuleKey("unet", "to_q"): adapter})])
        assert (seen, torch.get_float32_matmul_precision()) == (["highest"], "medium")
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")
@pytest.mark.parametrize("pristine_device", [None, "cpu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu_fusing_is_exact_and_reversible_too(dtype: torch.dtype, pristine_device: str | None) -> None:
    on_cpu, on_gpu = components(dtype), {name: part.cuda() for name, part in components(dtype).items()}
    base, places = bits(on_gpu), [weight.data_ptr() for weight in weights(on_gpu).values()]
    fuser = Fuser(on_gpu, pristine_device=pristine_device)
    Fuser(on_cpu).apply([one_layer("a"), one_layer("b")])

    fuser.apply([one_layer("c")])
    fuser.apply([one_layer("a"), one_layer("b")])

    expected, got = weights(on_cpu)["unet.to_q.weight"].detach(), weights(on_gpu)["unet.to_q.weight"].detach().cpu()
    assert torch.allclose(got, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    fuser.restore()
    assert same(bits(on_gpu), base)
    assert [weight.data_ptr() for weight in weights(on_gpu).values()] == places


def test_scales_of_unet_and_text_encoder_are_apart(lora_path: Path) -> None:
    parts = components()
    fuser = Fuser(parts)
    base = bits(parts)
    path = write(lora_path, kohya())

    fuser.apply([read(path, LoraRef("f" * 64, unet=0.0, te=1.0), fuser.index)])

    changed_names = [name for name, now in bits(parts).items() if not torch.equal(now, base[name])]
    assert changed_names == ["te.q_proj.weight"]
