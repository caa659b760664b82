"""Which store a URL names."""

from __future__ import annotations

import secrets
from pathlib import Path
from urllib.parse import unquote

from core.errors import StoreError
from core.ports import ObjectStore
from core.store.links import LinkSigner
from core.store.local import LocalStore
from core.store.s3 import S3Store


def open_store(
    url: str,
    *,
    s3_endpoint: str = "",
    s3_public_endpoint: str = "",
    s3_region: str = "us-east-1",
    public_url: str = "",
    url_secret: str = "",
) -> ObjectStore:
    """Open ``file:///path``, ``file://./relative`` or ``s3://bucket/prefix``. Asks no server.

    ``public_url`` and ``url_secret`` serve a directory's links; without a secret one is drawn, and links are good
    only in this process. Raises ``StoreError`` for any other URL.
    """
    scheme, _, rest = url.partition("://")
    if scheme == "file" and rest.startswith(("/", "./")):
        return LocalStore(Path(unquote(rest)), LinkSigner(public_url, url_secret or secrets.token_hex(32)))
    bucket, _, prefix = rest.partition("/")
    if scheme == "s3" and bucket:
        return S3Store(bucket, prefix, endpoint=s3_endpoint, public_endpoint=s3_public_endpoint, region=s3_region)
    msg = f"{url!r} names no store: write file:///path, file://./relative or s3://bucket/prefix"
    raise StoreError(msg)
