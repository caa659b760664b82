"""LoRAs: list, look, register."""

from __future__ import annotations

from urllib.parse import quote

from fastapi import APIRouter, Response, status

from api.context import Caller, Context, Parts
from api.problems import TOO_LARGE, responses
from api.registration import examine
from api.schemas import RegisterRequest
from api.views import LoraList, LoraView
from core.catalogue.records import LoraRecord
from core.errors import (
    Busy,
    InvalidKey,
    InvalidRequest,
    LoraChecksumMismatch,
    LoraFileInvalid,
    LoraObjectMissing,
    LoraTooLarge,
    NameTaken,
    QueueUnavailable,
    StoreUnavailable,
    Unauthorized,
    UnknownLora,
)

router = APIRouter(prefix="/v1/loras", tags=["loras"], responses=responses(Unauthorized, QueueUnavailable))

_FILE_ERRORS = (LoraObjectMissing, LoraFileInvalid, LoraTooLarge, LoraChecksumMismatch)


@router.get("")
def list_loras(tenant: Caller, context: Parts) -> LoraList:
    """List the caller's own LoRAs and the public ones. Where both have a name, it means the caller's."""
    return LoraList(loras=[LoraView.of(record) for record in context.catalogue.list_loras(tenant)])


@router.post(
    "",
    status_code=status.HTTP_201_CREATED,
    responses=responses(
        *(Unauthorized, QueueUnavailable, StoreUnavailable, Busy, InvalidRequest, InvalidKey, NameTaken, *_FILE_ERRORS)
    )
    | TOO_LARGE
    | {200: {"model": LoraView, "description": "The same file had that name already; its settings are renewed."}},
)
def register_lora(asked: RegisterRequest, tenant: Caller, context: Parts, response: Response) -> LoraView:
    """Register an object of the store as a LoRA. The file is read whole, checked and hashed before this returns."""
    with context.registrations.place():
        record = examine(asked, tenant, context)
    if _is_known(record, context):
        response.status_code = status.HTTP_200_OK
    context.catalogue.add_lora(record)
    response.headers["Location"] = f"{router.prefix}/{quote(record.name, safe='')}"
    return LoraView.of(record)


@router.get("/{name}", responses=responses(UnknownLora))
def read_lora(name: str, tenant: Caller, context: Parts) -> LoraView:
    """Show the LoRA that a name means to the caller."""
    return LoraView.of(context.catalogue.get_lora(tenant, name))


def _is_known(record: LoraRecord, context: Context) -> bool:
    try:
        held = context.catalogue.get_lora(record.owner, record.name)
    except UnknownLora:
        return False
    return held.owner == record.owner
