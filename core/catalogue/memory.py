"""The catalogue in memory: the readable specification, and the one that tests use."""

from __future__ import annotations

from collections.abc import Iterable

from core.catalogue.records import PUBLIC, LoraRecord, ModelRecord
from core.errors import NameTaken, UnknownLora, UnknownModel


class MemoryCatalogue:
    """LoRAs and models of one process. Not shared, not kept."""

    def __init__(self) -> None:
        self._loras: dict[tuple[str, str], LoraRecord] = {}
        self._models: dict[str, ModelRecord] = {}
        self._versions: dict[str, ModelRecord] = {}

    def add_lora(self, record: LoraRecord) -> None:
        """Enter a LoRA, or replace the entry of the same owner, name and digest.

        Raises ``NameTaken`` if the owner has another file under that name: what a name means never changes.
        """
        place = (record.owner, record.name)
        held = self._loras.get(place)
        if held is not None and held.digest != record.digest:
            raise name_taken(record, held.digest)
        self._loras[place] = record

    def get_lora(self, tenant: str, name: str) -> LoraRecord:
        """Find a LoRA by its exact name: the tenant's own, else a public one. Raises ``UnknownLora``."""
        record = self._loras.get((tenant, name)) or self._loras.get((PUBLIC, name))
        if record is None:
            raise unknown_lora(name)
        return record

    def list_loras(self, tenant: str) -> Iterable[LoraRecord]:
        """List what ``get_lora`` can find, by name."""
        public = {name: record for (owner, name), record in self._loras.items() if owner == PUBLIC}
        own = {name: record for (owner, name), record in self._loras.items() if owner == tenant}
        return visible(public, own)

    def add_model(self, record: ModelRecord) -> None:
        """Enter or replace a model. What the name meant before stays known by its digest."""
        self._versions[record.digest] = record
        self._models[record.name] = record

    def get_model(self, name: str) -> ModelRecord:
        """Find a model by its exact name. Raises ``UnknownModel``."""
        record = self._models.get(name)
        if record is None:
            raise unknown_model(name)
        return record

    def get_model_version(self, digest: str) -> ModelRecord:
        """Find a model by its content. Raises ``UnknownModel``."""
        record = self._versions.get(digest)
        if record is None:
            raise unknown_model(digest)
        return record

    def list_models(self) -> Iterable[ModelRecord]:
        """List the models, by name."""
        return tuple(record for _, record in sorted(self._models.items()))


def visible(public: dict[str, LoraRecord], own: dict[str, LoraRecord]) -> tuple[LoraRecord, ...]:
    """Merge public and own LoRAs by name; the own one wins."""
    return tuple(record for _, record in sorted((public | own).items()))


def name_taken(record: LoraRecord, held_digest: str) -> NameTaken:
    """Say that the owner has another file under that name."""
    msg = (
        f"the name {record.name!r} belongs to another file (sha256 {held_digest[:12]}…, not {record.digest[:12]}…); "
        "choose another name"
    )
    return NameTaken(msg)


def unknown_lora(name: str) -> UnknownLora:
    """Say that no visible LoRA has that name."""
    msg = f"no LoRA is named {name[:128]!r}; GET /v1/loras lists those that exist, POST /v1/loras registers one"
    return UnknownLora(msg)


def unknown_model(name: str) -> UnknownModel:
    """Say that no model has that name."""
    msg = f"no model is named {name[:128]!r}; GET /v1/models lists those that exist"
    return UnknownModel(msg)
