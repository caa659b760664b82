"""The header of a safetensors file, read without trusting it and without reading the tensors.

A file is an 8-byte little-endian length, a JSON object of that length, and the tensors' bytes. The JSON names each
tensor's dtype, shape and byte range, and may hold string metadata. Everything in it was written by a stranger: sizes
are capped before anything is allocated, ranges must tile the data exactly, and text is cleaned before it is shown.

Pure: the caller brings a function that reads byte ranges, so a local file and a ranged GET from a store are the same.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, BinaryIO, NoReturn

from core.errors import LoraFileInvalid, LoraTooLarge

HEADER_LIMIT_BYTES = 16 * 1024 * 1024
TENSOR_LIMIT = 20_000
DIMENSION_LIMIT = 8
FILE_LIMIT_BYTES = 2**40
NAME_LIMIT = 512
"""Characters in a tensor's name or a metadata key."""
METADATA_VALUE_LIMIT = 256 * 1024
"""Characters kept of one metadata value; the rest is cut off."""
STRUCTURE_LIMIT = 32 * TENSOR_LIMIT
"""Brackets and commas outside strings: bounds what parsing can allocate."""
DEPTH_LIMIT = 3
"""Of JSON: the header, a tensor's entry, its shape."""
FIRST_READ_BYTES = 64 * 1024

ITEM_BYTES: Mapping[str, int] = MappingProxyType(
    {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
    | {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1}
)
"""Bytes of one element by dtype: the dtypes that are read at all."""

ReadRange = Callable[[int, int], bytes]
"""``read(start, length)``: that many bytes of the file, fewer only at its end."""

_LENGTH_BYTES = 8
_BLOCK_BYTES = 1024 * 1024
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]")
_NOT_SAFETENSORS = (
    (re.compile(rb"version https://git-lfs"), "is a git-lfs pointer, not the file it points to: fetch it with git lfs"),
    (re.compile(rb"PK\x03\x04"), "is a zip archive, such as a PyTorch .pt or .ckpt: convert it to safetensors"),
    (re.compile(rb"\x80[\x02-\x05][^\x00]"), "is a Python pickle, which can run code: convert it to safetensors"),
    (re.compile(rb"GGUF"), "is a GGUF file: convert it to safetensors"),
    (re.compile(rb"\s*<(?:!doctype|html|\?xml|head|body)", re.IGNORECASE), "is an HTML page: the download went wrong"),
    (re.compile(rb"\s*\{\s*\""), "is JSON text: the download went wrong"),
)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies and what it is."""

    dtype: str
    """One of ``ITEM_BYTES``."""
    shape: tuple[int, ...]
    start: int
    """Offset of its first byte in the file."""
    end: int
    """Offset behind its last byte in the file."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file says of itself, checked."""

    tensors: Mapping[str, TensorInfo]
    """By name, in the order of their bytes."""
    metadata: Mapping[str, str]
    """Strings without control characters, each at most ``METADATA_VALUE_LIMIT`` characters."""
    data_start: int
    """Offset of the first byte behind the header."""


def parse_header(read: ReadRange, size_bytes: int) -> Header:
    """Read and check the header of a file of ``size_bytes``, in one or two range reads.

    Raises:
        LoraFileInvalid: the file is no well-formed safetensors file; the message says what it is instead.
        LoraTooLarge: its header or its number of tensors exceeds a limit.
    """
    head = read(0, min(size_bytes, FIRST_READ_BYTES))
    data_start = _data_start(head, size_bytes)
    if data_start > len(head):
        head += read(len(head), data_start - len(head))
    if len(head) < data_start:
        _invalid(f"the file ended after {len(head)} bytes although its size is {size_bytes}")
    entries = _parse_json(head[_LENGTH_BYTES:data_start])
    metadata = _metadata(entries.pop("__metadata__", {}))
    return Header(_tensors(entries, data_start, size_bytes), metadata, data_start)


def tensor_digest(file: BinaryIO, header: Header) -> str:
    """SHA-256 of all bytes behind the header: equal for equal weights under edited metadata.

    Its first 12 hex digits are what marketplaces show as AutoV3.
    """
    file.seek(header.data_start)
    digest = hashlib.sha256()
    while block := file.read(_BLOCK_BYTES):
        digest.update(block)
    return digest.hexdigest()


def trigger_words(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Guess the words that call the concept: the stated phrase, else tags that stand on every training image."""
    stated = metadata.get("modelspec.trigger_phrase", "")
    words = stated.split(",") if stated else _constant_tags(metadata)
    tidy = (" ".join(word.split())[:100] for word in words)
    return tuple(dict.fromkeys(word for word in tidy if word))[:8]


def base_hint(metadata: Mapping[str, str]) -> str:
    """Say which base the metadata claims, such as ``SD 1`` or ``SDXL``; its own words if unknown, else empty."""
    text = metadata.get("modelspec.architecture") or metadata.get("ss_base_model_version") or ""
    if not text and metadata.get("ss_v2") in {"True", "False"}:
        text = "sd_v2" if metadata["ss_v2"] == "True" else "sd_v1"
    for pattern, label in _BASES:
        if re.match(pattern, text, re.IGNORECASE):
            return label
    return " ".join(text.split())[:60]


_BASES = (
    (r"stable-diffusion-xl|sdxl", "SDXL"),
    (r"stable-diffusion-v1|sd_v1", "SD 1"),
    (r"stable-diffusion-v2|sd_v2", "SD 2"),
    (r"stable-diffusion-3|sd3", "SD 3"),
    (r"flux-?2", "FLUX.2"),
    (r"flux", "FLUX.1"),
)


def _constant_tags(metadata: Mapping[str, str]) -> list[str]:
    """Tags whose count equals the number of images of their training folder."""
    try:
        folders = json.loads(metadata.get("ss_dataset_dirs", "{}"))
        counts = json.loads(metadata.get("ss_tag_frequency", "{}"))
        return [
            str(tag)
            for folder, tags in counts.items()
            for tag, count in tags.items()
            if count == folders.get(folder, {}).get("img_count")
        ]
    except (ValueError, AttributeError, RecursionError):  # free text of a stranger: no guess is no fault
        return []


def _data_start(head: bytes, size_bytes: int) -> int:
    length = int.from_bytes(head[:_LENGTH_BYTES], "little")
    data_start = _LENGTH_BYTES + length
    begins_well = head[_LENGTH_BYTES : _LENGTH_BYTES + 1] == b"{"
    if begins_well and length <= HEADER_LIMIT_BYTES and data_start <= size_bytes:
        return data_start
    if not head:
        _invalid("the file is empty")
    for pattern, what in _NOT_SAFETENSORS:
        if pattern.match(head):
            _invalid(f"the file {what}")
    if not begins_well:
        _invalid("the file does not begin like a safetensors file (8 bytes of length, then JSON)")
    if data_start > size_bytes:
        _invalid(f"the file is truncated: its header alone declares {length} bytes, the whole file has {size_bytes}")
    msg = f"the header declares {length} bytes; at most {HEADER_LIMIT_BYTES} are read"
    raise LoraTooLarge(msg)


def _parse_json(raw: bytes) -> dict[str, Any]:
    _check_structure(raw)
    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        msg = f"the header is no valid JSON: {str(error)[:200]}"
        raise LoraFileInvalid(msg) from error
    if not isinstance(entries, dict):
        _invalid("the header is no JSON object")
    return entries


def _check_structure(raw: bytes) -> None:
    """Bound depth and number of JSON values before the parser allocates any."""
    marks = re.sub(rb"[^\[\]{},]+", b"", _STRING.sub(b"", raw))
    if len(marks) > STRUCTURE_LIMIT:
        msg = f"the header holds more than {STRUCTURE_LIMIT} values"
        raise LoraTooLarge(msg)
    steps = ((mark in b"[{") - (mark in b"]}") for mark in marks)
    if max(itertools.accumulate(steps), default=0) > DEPTH_LIMIT:
        _invalid(f"the header's JSON is nested deeper than {DEPTH_LIMIT} levels")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        msg = f"{twice[:NAME_LIMIT]!r} stands there twice"
        raise ValueError(msg)
    return entries


def _no_constant(text: str) -> NoReturn:
    msg = f"{text} is no JSON"
    raise ValueError(msg)


def _metadata(raw: object) -> Mapping[str, str]:
    if not isinstance(raw, dict):
        _invalid("the header's __metadata__ is no JSON object")
    for name, value in raw.items():
        if not isinstance(value, str):
            _invalid(f"the metadata entry {name[:NAME_LIMIT]!r} is no string")
    return MappingProxyType({_clean(k)[:NAME_LIMIT]: _clean(v)[:METADATA_VALUE_LIMIT] for k, v in raw.items()})


def _clean(text: str) -> str:
    return _CONTROL.sub("", text.encode("utf-8", "replace").decode())


def _tensors(entries: dict[str, Any], data_start: int, size_bytes: int) -> Mapping[str, TensorInfo]:
    if not entries:
        _invalid("the file holds no tensors")
    if len(entries) > TENSOR_LIMIT:
        msg = f"the file holds {len(entries)} tensors; at most {TENSOR_LIMIT} are read"
        raise LoraTooLarge(msg)
    infos = {name: _tensor(name, entry, data_start) for name, entry in entries.items()}
    ordered = sorted(infos.items(), key=lambda item: (item[1].start, item[1].end))
    at = data_start
    for name, info in ordered:
        if info.start != at:
            _invalid(f"the bytes of tensor {name!r} leave a hole or overlap others")
        at = info.end
    if at > size_bytes:
        _invalid(f"the file is truncated: its header declares {at} bytes, the file has {size_bytes}")
    if at < size_bytes:
        _invalid(f"the file has {size_bytes - at} bytes behind its last tensor")
    return MappingProxyType(dict(ordered))


def _tensor(name: str, entry: object, data_start: int) -> TensorInfo:
    if len(name) > NAME_LIMIT or not name.isprintable():
        _invalid(f"the tensor name {name[:80]!r} is longer than {NAME_LIMIT} or holds control characters")
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, end], **rest} if not rest:
            pass
        case _:
            _invalid(f"tensor {name!r} is not described by dtype, shape and two data_offsets")
    if dtype not in ITEM_BYTES:
        _invalid(f"tensor {name!r} has the dtype {dtype[:20]!r}; known are {', '.join(ITEM_BYTES)}")
    if len(shape) > DIMENSION_LIMIT or not all(
        type(number) is int and 0 <= number <= FILE_LIMIT_BYTES for number in (*shape, start, end)
    ):
        _invalid(f"tensor {name!r} has a shape or offset that no tensor has")
    if math.prod(shape) * ITEM_BYTES[dtype] != end - start:
        _invalid(f"tensor {name!r} of shape {shape} and dtype {dtype} does not fill its {end - start} bytes")
    return TensorInfo(dtype, tuple(shape), data_start + start, data_start + end)


def _invalid(message: str) -> NoReturn:
    raise LoraFileInvalid(message)
