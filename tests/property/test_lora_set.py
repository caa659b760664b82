"""Laws of the canonical LoRA set."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import InvalidRequest
from core.lora import LoraRef, LoraSet

# halves add without rounding, so that sums do not depend on their order
scales = st.integers(-8, 8).map(lambda n: n / 2)
digests = st.sampled_from(["a" * 64, "b" * 64, "c" * 64])
refs = st.builds(LoraRef, digest=digests, unet=scales, te=scales, name=st.text(max_size=3), size_bytes=st.just(7))
lists = st.lists(refs, max_size=8)


@given(lists, st.randoms())
def test_order_does_not_matter(items: list[LoraRef], random: object) -> None:
    shuffled = list(items)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert LoraSet.of(shuffled).id == LoraSet.of(items).id


@given(lists)
def test_a_set_is_its_own_canonical_form(items: list[LoraRef]) -> None:
    once = LoraSet.of(items)
    assert LoraSet.of(once) == once
    assert LoraSet.from_json(once.to_json()) == once


@given(lists)
def test_each_scale_is_the_sum_of_its_duplicates(items: list[LoraRef]) -> None:
    canonical = {ref.digest: ref for ref in LoraSet.of(items)}
    for digest in {ref.digest for ref in items}:
        unet = sum(ref.unet for ref in items if ref.digest == digest)
        te = sum(ref.te for ref in items if ref.digest == digest)
        if (unet, te) == (0, 0):
            assert digest not in canonical
        else:
            assert (canonical[digest].unet, canonical[digest].te) == (unet, te)


@given(lists, st.text(max_size=4))
def test_names_and_keys_do_not_name_the_set(items: list[LoraRef], other: str) -> None:
    renamed = [replace(ref, name=other, key=other) for ref in items]
    assert LoraSet.of(renamed).id == LoraSet.of(items).id


@given(refs, scales)
def test_another_scale_is_another_set(ref: LoraRef, scale: float) -> None:
    changed = replace(ref, unet=scale)
    assert (LoraSet.of([ref]).id == LoraSet.of([changed]).id) == (ref.unet == scale)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e9])
def test_absurd_scales_are_refused(scale: float) -> None:
    with pytest.raises(InvalidRequest):
        LoraRef("a" * 64, unet=scale)
    with pytest.raises(InvalidRequest):
        LoraSet.of([LoraRef("a" * 64, unet=80), LoraRef("a" * 64, unet=80)])


def test_minus_zero_is_zero() -> None:
    assert LoraSet.of([LoraRef("a" * 64, unet=-0.0, te=1)]).id == LoraSet.of([LoraRef("a" * 64, unet=0.0, te=1)]).id
