"""PNG with A1111's infotext, read back the way A1111 reads it."""

import io
import json
import re
from dataclasses import replace

import pytest
from PIL import Image

from core.job import JobSpec
from tests.unit.test_job import SPEC
from worker.engine.encode import infotext, png

# the published pattern by which A1111 splits the last line (http conventions of its infotext)
_PARAMETER = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
HASHES = {"a" * 64: "0123456789ab"}


def parse(text: str) -> dict[str, str]:
    found = _PARAMETER.findall(text.splitlines()[-1])
    return {name: json.loads(value) if value.startswith('"') else value for name, value in found}


def test_the_last_line_reads_back_as_parameters() -> None:
    read = parse(infotext(SPEC, 1, HASHES))
    assert read["Steps"] == "12"
    assert read["Sampler"] == "Euler"
    assert read["CFG scale"] == "3.5"
    assert read["Seed"] == "8"
    assert read["Size"] == "64x96"
    assert read["Model"] == "shapes"
    assert read["Lora hashes"] == "ink: 0123456789ab"


def test_the_prompt_carries_its_loras_as_tags() -> None:
    lines = infotext(replace(SPEC, negative_prompt="blurry"), 0, HASHES).splitlines()
    assert lines[0] == "a réd circle 🔴 <lora:ink:1:0.5>"
    assert lines[1] == "Negative prompt: blurry"


@pytest.mark.parametrize("name", ["a, b", "x: y", 'say "hi", ok'])
def test_values_with_marks_are_quoted(name: str) -> None:
    assert parse(infotext(replace(SPEC, model=name), 0, {}))["Model"] == name


@pytest.mark.parametrize("spec", [SPEC, replace(SPEC, prompt="plain")])
def test_a_png_holds_its_text_and_its_pixels(spec: JobSpec) -> None:
    image = Image.new("RGB", (8, 4), (10, 20, 30))
    text = infotext(spec, 0, HASHES)
    with Image.open(io.BytesIO(png(image, text))) as read:
        assert read.format == "PNG"
        assert read.info["parameters"] == text
        assert read.tobytes() == image.tobytes()
