"""The catalogue in Redis, beside the queue.

Keys, all without lifetime, because entries stay until they are replaced:

    <prefix>meta:loras:<owner>   hash   name → LoraRecord as JSON; owner is a tenant or ``public``
    <prefix>meta:models          hash   name → ModelRecord as JSON
    <prefix>meta:model_versions  hash   digest → ModelRecord as JSON, also of models whose name means another now
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import redis

from core.catalogue.memory import name_taken, unknown_lora, unknown_model, visible
from core.catalogue.records import PUBLIC, LoraRecord, ModelRecord
from core.errors import QueueUnavailable

T = TypeVar("T")


class RedisCatalogue:
    """LoRAs and models that all processes share. Every call may raise ``QueueUnavailable``.

    How long a call may take is the client's matter: its timeouts and its retries.
    """

    def __init__(self, client: redis.Redis, prefix: str = "fuse:") -> None:
        # Any: redis-py's types are those of both its clients, so every answer may be an awaitable to them
        self._redis: Any = client
        self._loras = f"{prefix}meta:loras:"
        self._models = f"{prefix}meta:models"
        self._versions = f"{prefix}meta:model_versions"

    def add_lora(self, record: LoraRecord) -> None:
        """Enter a LoRA, or replace the entry of the same owner, name and digest.

        Raises ``NameTaken`` if the owner has another file under that name. Nothing changes the digest under a name
        once it is set, so what is read after the refused HSETNX is final.
        """
        key, value = self._loras + record.owner, record.model_dump_json()
        if _ask(lambda: self._redis.hsetnx(key, record.name, value)):
            return
        held = LoraRecord.model_validate_json(_ask(lambda: self._redis.hget(key, record.name)))
        if held.digest != record.digest:
            raise name_taken(record, held.digest)
        _ask(lambda: self._redis.hset(key, record.name, value))

    def get_lora(self, tenant: str, name: str) -> LoraRecord:
        """Find a LoRA by its exact name: the tenant's own, else a public one. Raises ``UnknownLora``."""
        found = _ask(lambda: self._own_else_public(tenant, name))
        if found is None:
            raise unknown_lora(name)
        return LoraRecord.model_validate_json(found)

    def _own_else_public(self, tenant: str, name: str) -> Any:
        with self._redis.pipeline(transaction=False) as pipe:
            pipe.hget(self._loras + tenant, name)
            pipe.hget(self._loras + PUBLIC, name)
            own, public = pipe.execute()
        return own or public

    def list_loras(self, tenant: str) -> Iterable[LoraRecord]:
        """List what ``get_lora`` can find, by name."""
        return visible(self._loras_of(PUBLIC), self._loras_of(tenant))

    def _loras_of(self, owner: str) -> dict[str, LoraRecord]:
        values = _ask(lambda: [value for _, value in self._redis.hscan_iter(self._loras + owner, count=500)])
        records = (LoraRecord.model_validate_json(value) for value in values)
        return {record.name: record for record in records}

    def add_model(self, record: ModelRecord) -> None:
        """Enter or replace a model. What the name meant before stays known by its digest."""
        _ask(lambda: self._set_model(record, record.model_dump_json()))

    def _set_model(self, record: ModelRecord, value: str) -> None:
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.hset(self._versions, record.digest, value)
            pipe.hset(self._models, record.name, value)
            pipe.execute()

    def get_model(self, name: str) -> ModelRecord:
        """Find a model by its exact name. Raises ``UnknownModel``."""
        return self._model(self._models, name)

    def get_model_version(self, digest: str) -> ModelRecord:
        """Find a model by its content. Raises ``UnknownModel``."""
        return self._model(self._versions, digest)

    def _model(self, key: str, field: str) -> ModelRecord:
        found = _ask(lambda: self._redis.hget(key, field))
        if found is None:
            raise unknown_model(field)
        return ModelRecord.model_validate_json(found)

    def list_models(self) -> Iterable[ModelRecord]:
        """List the models, by name."""
        values = _ask(lambda: self._redis.hvals(self._models))
        records = (ModelRecord.model_validate_json(value) for value in values)
        return tuple(sorted(records, key=lambda record: record.name))


def _ask(call: Callable[[], T]) -> T:
    """Make a call, again if its connection broke: after a restart of Redis, pooled ones are stale. All may be repeated.

    A timeout is final, so that no call takes longer than connecting and one answer may. Raises ``QueueUnavailable``.
    """
    try:
        try:
            return call()
        except redis.ConnectionError as error:
            if isinstance(error, redis.TimeoutError):
                raise
            return call()
    except redis.RedisError as error:
        msg = f"Redis did not serve the catalogue ({type(error).__name__}); try again shortly"
        raise QueueUnavailable(msg) from error
