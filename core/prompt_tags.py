"""The ``<lora:…>`` grammar of prompts, as A1111 reads it.

    <lora:name>              scale 1
    <lora:name:0.8>          0.8 for UNet and text encoder
    <lora:name:0.5:0.8>      text encoder 0.5, UNet 0.8
    <lora:name:te=0.5:unet=0.8>   named forms override positions

``<lyco:…>`` means the same. The body is split on ":"; a piece with exactly one "=" is named, any other positional
(A1111 ``extra_networks.py``). A tag that cannot be read raises: a prompt never silently lacks its LoRA.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from core.errors import InvalidPromptTag

_TAG = re.compile(r"<(lora|lyco):([^>]*)>", re.IGNORECASE)
_OPENING = re.compile(r"<(lora|lyco):", re.IGNORECASE)
_NAMED = ("te", "unet")
_POSITIONS = 3
_SHOWN_CHARS = 80


@dataclass(frozen=True, slots=True)
class PromptTag:
    """One tag: the LoRA's name and its scales; ``None`` means "the LoRA's default"."""

    name: str
    te: float | None = None
    unet: float | None = None


def extract(prompt: str) -> tuple[str, tuple[PromptTag, ...]]:
    """Split a prompt into its text without tags and the tags in order.

    Raises ``InvalidPromptTag`` for a tag without name, without its ``>``, with a scale that is no finite number, or
    with an option that is not known.
    """
    tags = tuple(_parse(match.group(0), match.group(2)) for match in _TAG.finditer(prompt))
    text = _TAG.sub("", prompt)
    if opening := _OPENING.search(text):
        msg = f"prompt tag {_shown(text[opening.start() :])} has no end; close it with '>'"
        raise InvalidPromptTag(msg)
    return (text.strip(), tags) if tags else (prompt, ())


def refuse_tags(field: str, text: str) -> None:
    """Raise ``InvalidPromptTag`` if a field that takes no tags holds one, or the beginning of one."""
    if opening := _OPENING.search(text):
        tag = _shown(text[opening.start() :])
        msg = f"{field}: LoRAs belong into the prompt or into `loras`; take {tag} out of here"
        raise InvalidPromptTag(msg)


def _parse(tag: str, body: str) -> PromptTag:
    positional: list[str] = []
    named: dict[str, str] = {}
    for piece in body.split(":"):
        if piece.count("=") == 1:
            option, _, value = piece.partition("=")
            named[option.strip().lower()] = value
        else:
            positional.append(piece.strip())
    unknown = sorted(set(named) - set(_NAMED))
    if unknown:
        msg = f"prompt tag {_shown(tag)}: unknown option {unknown[0]!r}; known are {', '.join(_NAMED)}"
        raise InvalidPromptTag(msg)
    if not positional or not positional[0]:
        msg = f"prompt tag {_shown(tag)} names no LoRA"
        raise InvalidPromptTag(msg)
    if len(positional) > _POSITIONS:
        msg = f"prompt tag {_shown(tag)} has {len(positional) - 1} positional scales; at most te and unet are read"
        raise InvalidPromptTag(msg)
    te = _scale(tag, positional[1]) if len(positional) > 1 else None
    unet = _scale(tag, positional[2]) if len(positional) == _POSITIONS else te
    if "te" in named:
        te = _scale(tag, named["te"])
    if "unet" in named:
        unet = _scale(tag, named["unet"])
    return PromptTag(name=positional[0], te=te, unet=unet)


def _scale(tag: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        msg = f"prompt tag {_shown(tag)}: {text[:40]!r} is no scale; write a number such as 0.8"
        raise InvalidPromptTag(msg)
    return value


def _shown(tag: str) -> str:
    return repr(tag if len(tag) <= _SHOWN_CHARS else tag[: _SHOWN_CHARS - 3] + "...")
