"""An object of the store becomes a LoRA of the catalogue: looked at, measured and hashed, never trusted."""

from __future__ import annotations

import hashlib
import time

from api.context import Context
from api.problems import FieldProblem, FieldsInvalid
from api.schemas import RegisterRequest
from core.catalogue.records import PUBLIC, LoraRecord
from core.errors import LoraChecksumMismatch, LoraObjectMissing, LoraTooLarge, ObjectNotFound
from core.ports import ObjectStore
from core.safetensors_header import base_hint, parse_header, trigger_words

READ_BYTES = 8 * 1024 * 1024
"""Read at a time while hashing."""


def examine(asked: RegisterRequest, tenant: str, context: Context) -> LoraRecord:
    """Read the object and describe it. Takes as long as reading all of it once.

    Raises ``LoraObjectMissing``, ``LoraTooLarge``, ``LoraFileInvalid``, ``LoraChecksumMismatch``, ``InvalidRequest``
    for a key outside the caller's part of the store, and what the store raises.
    """
    owner = _owner(asked.key, tenant, context)
    try:
        size_bytes = context.store.stat(asked.key).size_bytes
        if size_bytes > context.limits.max_lora_bytes:
            msg = f"the object {asked.key!r} has {size_bytes} bytes; at most {context.limits.max_lora_bytes} are taken"
            raise LoraTooLarge(msg)
        header = parse_header(lambda start, length: context.store.get_bytes(asked.key, start, length), size_bytes)
        digest = _digest(context.store, asked.key, size_bytes)
    except ObjectNotFound as error:
        msg = f"the store holds no object {asked.key!r}; upload it first, then register it"
        raise LoraObjectMissing(msg) from error
    if asked.sha256 is not None and asked.sha256 != digest:
        msg = f"the object {asked.key!r} has the SHA-256 {digest}, not {asked.sha256}; upload it again"
        raise LoraChecksumMismatch(msg)
    return LoraRecord(
        name=asked.name,
        owner=owner,
        key=asked.key,
        digest=digest,
        size_bytes=size_bytes,
        base=base_hint(header.metadata),
        trigger_words=trigger_words(header.metadata) if asked.trigger_words is None else tuple(asked.trigger_words),
        default_scale=asked.default_scale,
        tensors=len(header.tensors),
        created_ms=int(time.time() * 1000),
    )


def _owner(key: str, tenant: str, context: Context) -> str:
    """Tell whose a key is. A foreign key is refused without a look at it: whether it exists is not the caller's."""
    if key.startswith(f"tenants/{tenant}/"):
        return tenant
    if key.startswith(f"{PUBLIC}/") and context.access.may_publish():
        return PUBLIC
    raise FieldsInvalid(FieldProblem(field="key", message=f"only objects under 'tenants/{tenant}/' can be registered"))


def _digest(store: ObjectStore, key: str, size_bytes: int) -> str:
    digest = hashlib.sha256()
    for start in range(0, size_bytes, READ_BYTES):
        digest.update(store.get_bytes(key, start, min(READ_BYTES, size_bytes - start)))
    return digest.hexdigest()
