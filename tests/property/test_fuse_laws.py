"""Laws of fusing: what is fused depends on the set alone, and each tensor of a file is counted once."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from core.errors import LoraError
from core.safetensors_header import parse_header
from tests.lora_samples import loaded, ref_of, write
from worker.lora.adapters.lora import LowRank
from worker.lora.file import LoadedLora, read
from worker.lora.fuse import Fuser
from worker.lora.keys import ModuleIndex, ModuleKey

NAMES = ("a", "b", "c", "d")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MODULES = {ModuleKey("unet", "0"): (8, 16), ModuleKey("unet", "1"): (12, 8), ModuleKey("te", "0"): (6, 6)}
TOUCHES = {"a": (0, 1, 2), "b": (0,), "c": (1, 2), "d": (2,)}


def components(dtype: torch.dtype) -> dict[str, nn.Module]:
    torch.manual_seed(7)
    return {
        "unet": nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 12)).to(dtype),
        "te": nn.Sequential(nn.Linear(6, 6)).to(dtype),
    }


def lora(name: str, unet: float, te: float) -> LoadedLora:
    draw = torch.Generator().manual_seed(ord(name))
    keys = [list(MODULES)[i] for i in TOUCHES[name]]
    shapes = {key: MODULES[key] for key in keys}
    adapters = {
        key: LowRank(torch.randn(3, i, generator=draw), torch.randn(o, 3, generator=draw), alpha=2.0)
        for key, (o, i) in shapes.items()
    }
    return loaded(ref_of(name, unet, te), adapters)


def bits(parts: dict[str, nn.Module]) -> list[bytes]:
    return [
        bytes(w.detach().view(torch.uint8).flatten().tolist()) for part in parts.values() for w in part.parameters()
    ]


scales = st.floats(-2, 2, allow_nan=False)
sets = st.lists(st.builds(lora, st.sampled_from(NAMES), scales, scales), max_size=4)


@settings(max_examples=60, deadline=None)
@given(
    history=st.lists(sets, max_size=5),
    last=sets,
    dtype=st.sampled_from(DTYPES),
    order=st.randoms(use_true_random=False),
)
def test_weights_after_any_history_are_those_of_the_last_set(
    history: list[list[LoadedLora]], last: list[LoadedLora], dtype: torch.dtype, order: random.Random
) -> None:
    fresh, worn = components(dtype), components(dtype)
    places = [w.data_ptr() for part in worn.values() for w in part.parameters()]
    Fuser(fresh).apply(last)
    fuser = Fuser(worn)

    for loras in history:
        fuser.apply(loras)
    shuffled = list(last)
    order.shuffle(shuffled)
    fuser.apply(shuffled)

    assert bits(worn) == bits(fresh)
    assert [w.data_ptr() for part in worn.values() for w in part.parameters()] == places
    fuser.restore()
    assert bits(worn) == bits(components(dtype))


INDEX = ModuleIndex({"unet": {"0": (8, 8), "1": (8, 8)}, "te": {"0": (8, 8)}})
SPELLINGS = (("lora_unet_0", "unet.0"), ("lora_unet_1", "base_model.model.1"), ("lora_te_0", "text_encoder.0"))
PAIRS = (
    (".lora_down.weight", ".lora_up.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    (".lora_A.weight", ".lora_B.weight"),
)
PARTS = tuple(part for pair in PAIRS for part in pair)


def tensors_of(keys: Iterable[str]) -> dict[str, torch.Tensor]:
    return {key: torch.ones(() if key.endswith(".alpha") else (8, 8)) for key in keys}


@st.composite
def pairs_of_known_modules(draw: st.DrawFn) -> set[str]:
    keys = set()
    for spellings in draw(st.sets(st.sampled_from(SPELLINGS), min_size=1)):
        stem = draw(st.sampled_from(spellings))
        keys |= {stem + part for part in draw(st.sampled_from(PAIRS))}
        keys |= {f"{stem}.alpha"} if draw(st.booleans()) else set()
    return keys


def names(stems: tuple[str, ...], parts: tuple[str, ...]) -> st.SearchStrategy[set[str]]:
    return st.sets(st.builds(str.__add__, st.sampled_from(stems), st.sampled_from(parts)))


@settings(max_examples=100, deadline=None)
@given(
    matched=pairs_of_known_modules(),
    extra=names(("lora_te2_x", "text_encoder_2.0"), (*PARTS, ".alpha")),
    misspelled=names(("lora_unet_9", "model.0", "zorp"), (*PARTS, ".alpha")),
    unknown=names(("lora_unet_0", "lora_te2_x", "zorp"), (".other", "", ".lora_down")),
)
def test_every_tensor_is_matched_or_extra_or_unmatched(
    matched: set[str],
    extra: set[str],
    misspelled: set[str],
    unknown: set[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = tmp_path_factory.getbasetemp() / "accounts.safetensors"
    write(path, tensors_of(matched | extra | misspelled | unknown))

    report = read(path, ref_of("a"), INDEX, match_threshold=0.0).report

    counts = (report.keys_matched, report.keys_extra, report.keys_unmatched)
    assert counts == (len(matched), len(extra), len(misspelled | unknown))


@settings(max_examples=150, deadline=None)
@given(
    changes=st.lists(st.tuples(st.integers(0, 700), st.integers(0, 255)), min_size=1, max_size=3),
    cut=st.integers(0, 20),
)
def test_a_damaged_file_is_read_or_refused_by_name(
    changes: list[tuple[int, int]], cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    content = bytearray(
        write(path, tensors_of({"lora_unet_0.lora_down.weight", "lora_unet_0.lora_up.weight"})).read_bytes()
    )
    for place, value in changes:
        content[place % len(content)] = value
    path.write_bytes(content[: len(content) - cut])

    with contextlib.suppress(LoraError):
        assert read(path, ref_of("a"), INDEX).report.keys_unmatched == 0


@settings(max_examples=100, deadline=None)
@given(
    tensors=st.dictionaries(
        st.text(st.characters(codec="ascii", categories=("L", "N", "P")), min_size=1, max_size=20),
        st.tuples(st.sampled_from([*DTYPES, torch.int64, torch.bool]), st.lists(st.integers(0, 5), max_size=4)),
        min_size=1,
        max_size=8,
    )
)
def test_what_the_safetensors_library_writes_is_read(
    tensors: dict[str, tuple[torch.dtype, list[int]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "written.safetensors"
    content = write(
        path, {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in tensors.items()}
    ).read_bytes()

    header = parse_header(lambda start, length: content[start : start + length], len(content))

    assert {name: info.shape for name, info in header.tensors.items()} == {n: tuple(s) for n, (_, s) in tensors.items()}
    assert all(info.end <= len(content) for info in header.tensors.values())
