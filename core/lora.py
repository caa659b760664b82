"""LoRA references and the canonical set of them that a job names.

Two requests that mean the same weights have the same ``LoraSet`` and so the same ``LoraSet.id``: duplicates are
summed, LoRAs without effect are dropped, the rest is sorted by digest. Names, keys and sizes travel along for
messages and fetching but do not take part in the identity.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

from core.errors import InvalidRequest

SCALE_LIMIT = 100.0
"""Largest magnitude of a scale. Far above any that is of use; keeps weights finite."""


@dataclass(frozen=True, slots=True)
class LoraRef:
    """One LoRA as a job uses it: which file (by content) and how strongly."""

    digest: str
    """SHA-256 of the whole file, 64 hex digits."""
    unet: float = 1.0
    """Scale of the weight change in the UNet or transformer."""
    te: float = 1.0
    """Scale of the weight change in the text encoders."""
    name: str = ""
    """The name that the request used. Not part of the identity."""
    key: str = ""
    """Object key in the store. Not part of the identity."""
    size_bytes: int = 0
    """Size of the file. Not part of the identity."""

    def __post_init__(self) -> None:
        """Refuse scales that are not finite or absurd."""
        for part, scale in (("unet", self.unet), ("te", self.te)):
            if not math.isfinite(scale) or abs(scale) > SCALE_LIMIT:
                msg = f"LoRA {self.name or self.digest[:12]!r}: {part} scale {scale} is not within ±{SCALE_LIMIT:g}"
                raise InvalidRequest(msg)

    @property
    def has_effect(self) -> bool:
        """Whether any part of the LoRA has a scale other than 0."""
        return self.unet != 0.0 or self.te != 0.0

    @property
    def identity(self) -> tuple[str, float, float]:
        """What distinguishes this reference from another: content and scales."""
        return (self.digest, self.unet, self.te)


@dataclass(frozen=True, slots=True)
class LoraSet:
    """A canonical set of LoRAs. Build it with ``of``; the constructor trusts its argument."""

    refs: tuple[LoraRef, ...] = ()

    @classmethod
    def of(cls, refs: Iterable[LoraRef]) -> Self:
        """Sum duplicates, drop what has no effect, sort by digest."""
        merged: dict[str, LoraRef] = {}
        for ref in refs:
            seen = merged.get(ref.digest)
            merged[ref.digest] = ref if seen is None else replace(seen, unet=seen.unet + ref.unet, te=seen.te + ref.te)
        kept = (_without_negative_zero(ref) for ref in merged.values() if ref.has_effect)
        return cls(tuple(sorted(kept, key=lambda ref: ref.digest)))

    @property
    def id(self) -> str:
        """32 hex digits that name this set: equal sets, equal ids."""
        text = json.dumps([ref.identity for ref in self.refs], separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    @property
    def size_bytes(self) -> int:
        """Bytes of all files of the set."""
        return sum(ref.size_bytes for ref in self.refs)

    def __iter__(self) -> Iterator[LoraRef]:
        """Iterate over the references in canonical order."""
        return iter(self.refs)

    def __len__(self) -> int:
        """Count the LoRAs."""
        return len(self.refs)

    def to_json(self) -> list[dict[str, Any]]:
        """Give the references as JSON objects."""
        return [
            {"digest": r.digest, "unet": r.unet, "te": r.te, "name": r.name, "key": r.key, "size_bytes": r.size_bytes}
            for r in self.refs
        ]

    @classmethod
    def from_json(cls, items: Iterable[dict[str, Any]]) -> Self:
        """Read what ``to_json`` gave. Fields of a later release are ignored."""
        fields = ("digest", "unet", "te", "name", "key", "size_bytes")
        return cls.of(LoraRef(**{name: item[name] for name in fields if name in item}) for item in items)


def _without_negative_zero(ref: LoraRef) -> LoraRef:
    return replace(ref, unet=ref.unet + 0.0, te=ref.te + 0.0)
