"""The error tree.

Every failure that a caller can meet is one of these. ``code`` is the stable name that clients, metrics and
dashboards read; ``retryable`` says whether the same call may succeed later; ``blame`` says whose side must change.

    FuselineError
    ├── RequestError                 the request itself
    │   ├── InvalidRequest           a field is out of range or malformed
    │   ├── InvalidPromptTag         a <lora:...> tag that cannot be read
    │   ├── Unauthorized  LinkInvalid
    │   ├── JobNotFound  UnknownLora  UnknownModel
    │   ├── NameTaken                another object holds that name
    │   ├── IdempotencyConflict      the same key with another body
    │   ├── QueueFull                the tenant's cap on queued work
    │   └── Busy                     too many calls of its kind at once
    ├── LoraError                    a LoRA file that cannot be used
    │   ├── LoraObjectMissing  LoraFileInvalid  LoraTooLarge  LoraChecksumMismatch
    │   └── LoraUnsupported  LoraUnmatched  LoraShapeMismatch  LoraNotFinite  LoraPairIncomplete
    ├── ModelError                   a checkpoint that cannot be used
    │   └── ModelObjectMissing  ModelInvalid
    ├── StoreError                   object storage
    │   └── ObjectNotFound  StoreUnavailable  StoreDenied  InvalidKey  ChecksumMismatch
    ├── QueueError                   the queue
    │   └── QueueUnavailable  LeaseLost  QueueMisconfigured
    ├── CacheTooSmall                one set needs more bytes than the cache may hold
    ├── CacheBusy                    running batches hold the room that a set needs
    └── EngineError                  sampling
        └── EngineOutOfMemory  EngineFailed  EngineBroken  JobCancelled
"""

from __future__ import annotations

from typing import ClassVar, Literal

Blame = Literal["client", "server"]


class FuselineError(Exception):
    """Any failure that Fuseline names. The message says what happened and what to do."""

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False
    blame: ClassVar[Blame] = "server"


# --- the request ------------------------------------------------------------------------------------------------


class RequestError(FuselineError):
    """The request cannot be accepted as it is."""

    code = "request_invalid"
    blame: ClassVar[Blame] = "client"


class InvalidRequest(RequestError):
    """A field is missing, malformed or out of range."""

    code = "invalid_request"


class InvalidPromptTag(RequestError):
    """A ``<lora:...>`` tag in the prompt cannot be read."""

    code = "invalid_prompt_tag"


class Unauthorized(RequestError):
    """The request carries no token, or one that is not known."""

    code = "unauthorized"


class LinkInvalid(RequestError):
    """The link to a file was not made by this service, or has expired."""

    code = "link_invalid"


class JobNotFound(RequestError):
    """No job of that id belongs to the caller."""

    code = "job_not_found"


class UnknownLora(RequestError):
    """No LoRA of that name is visible to the caller."""

    code = "unknown_lora"


class UnknownModel(RequestError):
    """No model of that name is registered."""

    code = "unknown_model"


class NameTaken(RequestError):
    """Another object is registered under that name already."""

    code = "name_taken"


class IdempotencyConflict(RequestError):
    """The idempotency key was used before with another body."""

    code = "idempotency_conflict"


class QueueFull(RequestError):
    """The tenant has as many queued jobs as its cap allows."""

    code = "queue_full"
    retryable = True


class Busy(RequestError):
    """The service does as much of this at once as it can."""

    code = "busy"
    retryable = True
    blame = "server"


# --- LoRA files -------------------------------------------------------------------------------------------------


class LoraError(FuselineError):
    """A LoRA cannot be applied."""

    code = "lora_error"
    blame = "client"


class LoraObjectMissing(LoraError):
    """The store holds no object under the LoRA's key."""

    code = "lora_object_missing"


class LoraFileInvalid(LoraError):
    """The file is not a well-formed safetensors file."""

    code = "lora_file_invalid"


class LoraTooLarge(LoraError):
    """The file, its header or its tensors exceed a limit."""

    code = "lora_too_large"


class LoraChecksumMismatch(LoraError):
    """The object's bytes are not those that were registered."""

    code = "lora_checksum_mismatch"


class LoraUnsupported(LoraError):
    """The adapter type is recognised but cannot be fused."""

    code = "lora_unsupported"


class LoraUnmatched(LoraError):
    """Keys of the file fit no module of the base model."""

    code = "lora_unmatched"


class LoraShapeMismatch(LoraError):
    """A weight change has another shape than the weight it belongs to."""

    code = "lora_shape_mismatch"


class LoraNotFinite(LoraError):
    """The file holds NaN or infinite values."""

    code = "lora_not_finite"


class LoraPairIncomplete(LoraError):
    """One half of a factor pair is missing."""

    code = "lora_pair_incomplete"


# --- models -----------------------------------------------------------------------------------------------------


class ModelError(FuselineError):
    """A checkpoint cannot be used."""

    code = "model_error"


class ModelObjectMissing(ModelError):
    """The store holds no object under one of the model's keys."""

    code = "model_object_missing"


class ModelInvalid(ModelError):
    """The checkpoint's files are not what its registration says."""

    code = "model_invalid"


# --- the store --------------------------------------------------------------------------------------------------


class StoreError(FuselineError):
    """Object storage did not do what was asked."""

    code = "store_error"


class ObjectNotFound(StoreError):
    """No object has that key."""

    code = "object_not_found"


class StoreUnavailable(StoreError):
    """The store did not answer, or answered with a server error."""

    code = "store_unavailable"
    retryable = True


class StoreDenied(StoreError):
    """The store refused the credentials."""

    code = "store_denied"
    retryable = True


class InvalidKey(StoreError):
    """The text is no valid object key."""

    code = "invalid_key"
    blame = "client"


class ChecksumMismatch(StoreError):
    """An object's bytes are not those that its digest names."""

    code = "checksum_mismatch"


# --- the queue --------------------------------------------------------------------------------------------------


class QueueError(FuselineError):
    """The queue did not do what was asked."""

    code = "queue_error"


class QueueUnavailable(QueueError):
    """Redis did not answer in time."""

    code = "queue_unavailable"
    retryable = True


class LeaseLost(QueueError):
    """The lease's token is no longer the live one: another worker may hold its jobs."""

    code = "lease_lost"


class QueueMisconfigured(QueueError):
    """The Redis server's settings could lose jobs."""

    code = "queue_misconfigured"


# --- the worker -------------------------------------------------------------------------------------------------


class CacheTooSmall(FuselineError):
    """One job's files need more bytes than the cache may hold."""

    code = "cache_too_small"


class CacheBusy(FuselineError):
    """The files of running batches leave no room in the cache."""

    code = "cache_busy"
    retryable = True


class EngineError(FuselineError):
    """Sampling failed."""

    code = "engine_error"


class EngineOutOfMemory(EngineError):
    """The device has too little memory even for one image."""

    code = "engine_out_of_memory"
    retryable = True


class EngineFailed(EngineError):
    """The model or the device failed while sampling."""

    code = "engine_failed"
    retryable = True


class EngineBroken(EngineError):
    """The device does not answer any more in this process; a new process must take over."""

    code = "engine_broken"
    retryable = True


class JobCancelled(EngineError):
    """The job was cancelled while it ran."""

    code = "job_cancelled"
    blame = "client"
