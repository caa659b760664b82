"""Files of a local-directory store, by signed links that expire. Other stores have servers of their own."""

from __future__ import annotations

import time

from fastapi import APIRouter
from fastapi.responses import FileResponse

from api.context import Parts
from api.problems import responses
from core.errors import LinkInvalid, ObjectNotFound, StoreUnavailable
from core.store.local import LocalStore

router = APIRouter(prefix="/v1/files", tags=["files"])


@router.get(
    "/{key:path}",
    response_class=FileResponse,
    responses=responses(LinkInvalid, ObjectNotFound, StoreUnavailable),
)
def read_file(key: str, context: Parts, expires: int = 0, signature: str = "") -> FileResponse:
    """Read the object that a link was made for. The link is the permission; no token is asked."""
    store = context.store
    if not isinstance(store, LocalStore):
        msg = "this service's files are read from its object store, not from here"
        raise ObjectNotFound(msg)
    if not store.verify_url(key, expires, signature, time.time()):
        msg = "the link was not made by this service or has expired; read the job again for a fresh one"
        raise LinkInvalid(msg)
    store.stat(key)
    is_png = key.endswith(".png")
    return FileResponse(
        store.path(key),
        media_type="image/png" if is_png else "application/octet-stream",
        filename=key.rpartition("/")[2],
        content_disposition_type="inline" if is_png else "attachment",
        headers={"X-Content-Type-Options": "nosniff", "Cache-Control": "private, max-age=3600"},
    )
