"""What requests look like. Bounds that settings or the model decide are checked in ``api.resolve``."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, FailFast, Field, model_validator

from core.catalogue.names import check_name
from core.catalogue.records import Sha256
from core.errors import InvalidRequest
from core.job import OnLoraError
from core.lora import SCALE_LIMIT
from core.samplers import SAMPLERS

SEED_MAX = 2**52 - 1
"""Largest seed: every image's seed is exact in JSON readers that know only doubles."""
SIDE_MAX = 16_384
"""Largest width or height in pixels, whatever the model."""
GUIDANCE_MAX = 50.0
LORAS_MAX = 64
"""Most entries of ``loras``, whatever the settings."""
LABELS_MAX = 16
FIELDS_MAX = 64
"""Most fields of one object in a request, known or not: every unknown one makes an error of its own."""

_UNWANTED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
"""Control characters, and halves of surrogate pairs, which JSON can escape and UTF-8 cannot write."""


def _plain_text(text: str) -> str:
    found = _UNWANTED.search(text)
    if found:
        msg = f"U+{ord(found[0]):04X} at position {found.start()} may not stand here; line feed and tab may"
        raise ValueError(msg)
    return text


def _lora_name(name: str) -> str:
    try:
        check_name(name)
    except InvalidRequest as error:
        raise ValueError(str(error)) from error
    return name


def _sampler(name: str) -> str:
    known = {sampler.lower(): sampler for sampler in SAMPLERS}
    if name.lower() not in known:
        msg = f"no sampler has that name; known are {', '.join(SAMPLERS)}"
        raise ValueError(msg)
    return known[name.lower()]


def _few(given: object, most: int) -> object:
    """Refuse a large object before its entries are looked at, as pydantic collects the faults of every one."""
    if isinstance(given, dict) and len(given) > most:
        msg = f"{len(given)} entries; at most {most}"
        raise ValueError(msg)
    return given


Text = Annotated[str, AfterValidator(_plain_text)]
LoraName = Annotated[str, AfterValidator(_lora_name), Field(examples=["add detail (v1.2)"])]
Scale = Annotated[float, Field(ge=-SCALE_LIMIT, le=SCALE_LIMIT, allow_inf_nan=False)]
Side = Annotated[int, Field(ge=1, le=SIDE_MAX)]
Label = Annotated[Text, Field(min_length=1, max_length=64)]
LabelValue = Annotated[Text, Field(max_length=512)]
Labels = Annotated[
    dict[Label, LabelValue], Field(max_length=LABELS_MAX), BeforeValidator(lambda given: _few(given, LABELS_MAX))
]
TriggerWord = Annotated[Text, Field(min_length=1, max_length=100)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, given: object) -> object:
        return _few(given, FIELDS_MAX)


class LoraUse(_Request):
    """A LoRA by name, with one ``scale`` or one for each part. What is not given is the LoRA's own default."""

    name: LoraName
    scale: Scale | None = None
    """For UNet and text encoders."""
    unet: Scale | None = None
    te: Scale | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.scale is not None and (self.unet is not None or self.te is not None):
            msg = "give either scale, or unet and te"
            raise ValueError(msg)
        return self


class SubmitRequest(_Request):
    """A job. Whatever is not given is the model's default."""

    prompt: Text = Field(examples=["a red circle on a blue background <lora:outline:0.8>"])
    """May name LoRAs in ``<lora:name:scale>`` tags, as A1111 reads them."""
    negative_prompt: Text = ""
    loras: Annotated[list[LoraUse], Field(max_length=LORAS_MAX), FailFast()] = []
    """LoRAs besides those of the prompt's tags. One that is named more than once has its scales summed."""
    model: Text | None = Field(default=None, max_length=256)
    """May be left out while exactly one model is registered."""
    width: Side | None = None
    height: Side | None = None
    steps: int | None = Field(default=None, ge=1)
    guidance: float | None = Field(default=None, ge=0, le=GUIDANCE_MAX, allow_inf_nan=False)
    """Classifier-free guidance scale; 1 = none."""
    sampler: Annotated[str, AfterValidator(_sampler)] | None = None
    seed: int = Field(default=-1, ge=-1, le=SEED_MAX)
    """Seed of the first image; the next has the next number. -1 = drawn, and told in the answer."""
    images: int = Field(default=1, ge=1)
    format: Literal["png"] = "png"
    priority: int = Field(default=0, ge=-10, le=10)
    """Higher runs earlier, within bounds."""
    metadata: Labels = {}
    """Labels of the caller's own, given back unchanged."""
    on_lora_error: OnLoraError = "fail"
    """What becomes of the job when a LoRA cannot be applied."""

    def body_hash(self) -> str:
        """Hash what was asked, whatever the order of its fields: 64 hex digits."""
        text = json.dumps(self.model_dump(mode="json", exclude_unset=True), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


class RegisterRequest(_Request):
    """An object of the store that is to be used as a LoRA."""

    name: LoraName
    key: Text = Field(min_length=1, max_length=1024, examples=["tenants/default/loras/outline.safetensors"])
    """Where it lies in the store: under ``tenants/<tenant>/``."""
    trigger_words: list[TriggerWord] | None = Field(default=None, max_length=32)
    """Words that call what was trained; those of the file's metadata if not given."""
    default_scale: Scale = 1.0
    """Used where a job gives no scale."""
    sha256: Sha256 | None = None
    """What the file's SHA-256 should be; registration fails if it is another."""
