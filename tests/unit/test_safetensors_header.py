"""The header reader: what it reads, what it refuses, and that it says why."""

from __future__ import annotations

import hashlib
import io
import json
import struct
from typing import Any

import pytest

from core.errors import LoraError, LoraFileInvalid, LoraTooLarge
from core.safetensors_header import (
    HEADER_LIMIT_BYTES,
    METADATA_VALUE_LIMIT,
    STRUCTURE_LIMIT,
    TENSOR_LIMIT,
    Header,
    TensorInfo,
    base_hint,
    parse_header,
    tensor_digest,
    trigger_words,
)

GIT_LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 144\n"


def file_of(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def parse(content: bytes) -> Header:
    return parse_header(lambda start, length: content[start : start + length], len(content))


def tensor(start: int, end: int, dtype: str = "F16", shape: list[Any] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - start) // 2] if shape is None else shape, "data_offsets": [start, end]}


def test_reads_tensors_metadata_and_where_the_data_starts() -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "b": tensor(4, 12, "F32", [1, 2]),
        "a": tensor(0, 4),
        "scalar": tensor(12, 14, "BF16", []),
        "nothing": tensor(14, 14, "F32", [0, 3]),
    }
    content = file_of(header, bytes(14))
    at = len(content) - 14

    parsed = parse(content)

    assert parsed.data_start == at
    assert dict(parsed.metadata) == {"format": "pt"}
    assert dict(parsed.tensors) == {
        "a": TensorInfo("F16", (2,), at, at + 4),
        "b": TensorInfo("F32", (1, 2), at + 4, at + 12),
        "scalar": TensorInfo("BF16", (), at + 12, at + 14),
        "nothing": TensorInfo("F32", (0, 3), at + 14, at + 14),
    }


def test_a_long_header_is_fetched_in_two_ranges_and_the_tensors_never() -> None:
    names = {f"{'x' * 200}{i}": tensor(2 * i, 2 * i + 2) for i in range(1000)}
    content = file_of(names, bytes(2000))
    ranges: list[tuple[int, int]] = []

    def read(start: int, length: int) -> bytes:
        ranges.append((start, length))
        return content[start : start + length]

    parsed = parse_header(read, len(content))

    assert len(parsed.tensors) == 1000
    assert ranges == [(0, 65536), (65536, parsed.data_start - 65536)]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "an HTML page"),
        (b"\n <html>\n{}", "an HTML page"),
        (GIT_LFS, "a git-lfs pointer"),
        (b"PK\x03\x04" + bytes(100), "a zip archive"),
        (b"\x80\x02}q\x00(X\x01" + bytes(100), "a Python pickle"),
        (b"GGUF" + bytes(100), "a GGUF file"),
        (b'{"error": "Unauthorized"}', "JSON text"),
        (b"\x00" * 100, "does not begin like a safetensors file"),
        (b"\x05", "does not begin like a safetensors file"),
    ],
)
def test_another_kind_of_file_is_named_by_its_content(content: bytes, says: str) -> None:
    with pytest.raises(LoraFileInvalid, match=says):
        parse(content)


def test_a_file_cut_off_anywhere_is_refused() -> None:
    content = file_of({"a": tensor(0, 64)}, bytes(64))

    for size in range(len(content)):
        with pytest.raises(LoraFileInvalid):
            parse(content[:size])


def test_a_truncated_file_says_how_many_bytes_are_missing() -> None:
    content = file_of({"a": tensor(0, 64)}, bytes(64))

    with pytest.raises(LoraFileInvalid, match=rf"declares {len(content)} bytes, the file has {len(content) - 10}"):
        parse(content[:-10])
    with pytest.raises(LoraFileInvalid, match="its header alone declares"):
        parse(content[:20])


def test_a_store_that_gives_fewer_bytes_than_it_said_is_refused() -> None:
    content = file_of({"a" * 300: tensor(0, 64)}, bytes(64))

    with pytest.raises(LoraFileInvalid, match="ended after 100 bytes"):
        parse_header(lambda start, length: content[start : min(start + length, 100)], len(content))


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ({}, "no tensors"),
        ({"__metadata__": {"a": "b"}}, "no tensors"),
        ({"a": tensor(0, 8), "b": tensor(6, 16, shape=[5])}, "hole or overlap"),
        ({"a": tensor(0, 8), "b": tensor(0, 8), "c": tensor(8, 16)}, "hole or overlap"),
        ({"a": tensor(0, 6), "b": tensor(8, 16)}, "hole or overlap"),
        ({"a": tensor(2, 16)}, "hole or overlap"),
        ({"a": tensor(0, 14)}, "2 bytes behind its last tensor"),
        ({"a": tensor(0, 16, shape=[9])}, "does not fill its 16 bytes"),
        ({"a": tensor(16, 0, shape=[8])}, "does not fill"),
        ({"a": tensor(0, 16, "F7")}, "has the dtype 'F7'"),
        ({"a": tensor(0, 16, shape=[-8])}, "no tensor has"),
        ({"a": tensor(0, 16, shape=[8.0])}, "no tensor has"),
        ({"a": tensor(0, 16, shape=[True] * 4)}, "no tensor has"),
        ({"a": tensor(0, 16, shape=[1] * 9)}, "no tensor has"),
        ({"a": tensor(0, 16, shape=[10**30])}, "no tensor has"),
        ({"a": {"dtype": "F16", "shape": [8]}}, "not described by"),
        ({"a": tensor(0, 16) | {"more": 1}}, "not described by"),
        ({"a": 5}, "not described by"),
        ({"a\n": tensor(0, 16)}, "control characters"),
        ({"a" * 513: tensor(0, 16)}, "longer than 512"),
        ({"__metadata__": ["x"], "a": tensor(0, 16)}, "no JSON object"),
        ({"__metadata__": {"n": 1}, "a": tensor(0, 16)}, "no string"),
        (b'{"a": {}, "a": {}}', "'a' stands there twice"),
        (b'{"a": {"dtype": "F16", "shape": [NaN], "data_offsets": [0, 16]}}', "NaN is no JSON"),
        (b'{"a": \xff}', "no valid JSON"),
        (b'{"a"', "no valid JSON"),
        (b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}", "nested deeper"),
    ],
)
def test_a_malformed_header_is_refused_with_its_reason(header: object, says: str) -> None:
    with pytest.raises(LoraFileInvalid, match=says):
        parse(file_of(header, bytes(16)))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (struct.pack("<Q", HEADER_LIMIT_BYTES + 1) + b"{" + b" " * HEADER_LIMIT_BYTES, "at most"),
        (file_of({f"{i}": tensor(0, 0) for i in range(TENSOR_LIMIT + 1)}), f"holds {TENSOR_LIMIT + 1} tensors"),
        (file_of(b'{"a": [' + b"[]," * STRUCTURE_LIMIT + b"[]]}"), "values"),
    ],
    ids=["header bytes", "tensors", "values"],
)
def test_limits_hold_before_anything_large_is_made(content: bytes, says: str) -> None:
    with pytest.raises(LoraTooLarge, match=says):
        parse(content)


def test_quotes_without_end_do_not_take_quadratic_time() -> None:
    with pytest.raises(LoraError):
        parse(file_of(b'{"' + rb"\"" * (4 * 1024 * 1024)))


def test_metadata_is_cleaned_and_bounded() -> None:
    dirty = {"title\x1b[31m": "a\x00b\u202ec\n\ud800", "long": "x" * (METADATA_VALUE_LIMIT + 5)}

    metadata = parse(file_of({"__metadata__": dirty, "a": tensor(0, 2)}, bytes(2))).metadata

    assert metadata["title[31m"] == "abc\n?"
    assert len(metadata["long"]) == METADATA_VALUE_LIMIT


def test_the_digest_of_the_tensors_ignores_the_header() -> None:
    one, two = (file_of({"__metadata__": {"n": n}, "a": tensor(0, 4)}, b"data") for n in ("1", "a longer one"))

    digests = {tensor_digest(io.BytesIO(content), parse(content)) for content in (one, two)}

    assert digests == {hashlib.sha256(b"data").hexdigest()}


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({}, ()),
        ({"modelspec.trigger_phrase": " zorp  shape, zorp shape,,other "}, ("zorp shape", "other")),
        (
            {
                "ss_dataset_dirs": '{"10_zorp": {"n_repeats": 10, "img_count": 4}}',
                "ss_tag_frequency": '{"10_zorp": {"zorp": 4, "on red": 2}}',
            },
            ("zorp",),
        ),
        ({"ss_tag_frequency": '{"10_zorp": {"zorp": 4}}'}, ()),
        ({"ss_tag_frequency": "no json", "ss_dataset_dirs": "[]"}, ()),
        ({"ss_tag_frequency": '{"a": [1]}', "ss_dataset_dirs": '["a"]'}, ()),
    ],
)
def test_trigger_words_are_stated_or_stand_on_every_image(metadata: dict[str, str], words: tuple[str, ...]) -> None:
    assert trigger_words(metadata) == words


@pytest.mark.parametrize(
    ("metadata", "base"),
    [
        ({"ss_base_model_version": "sd_v1"}, "SD 1"),
        ({"ss_base_model_version": "sdxl_base_v1-0"}, "SDXL"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, "SD 2"),
        ({"ss_v2": "True"}, "SD 2"),
        ({"ss_base_model_version": "lumina2"}, "lumina2"),
        ({}, ""),
    ],
)
def test_base_hint_reads_what_trainers_write(metadata: dict[str, str], base: str) -> None:
    assert base_hint(metadata) == base
