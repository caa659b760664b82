"""Objects in a bucket of S3 or of a server that speaks its protocol."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    TokenRetrievalError,
)
from botocore.exceptions import ConnectionError as ConnectionFailed
from s3transfer.exceptions import S3ValidationError

from core.errors import InvalidKey, ObjectNotFound, StoreDenied, StoreError, StoreUnavailable
from core.ports import ObjectStat
from core.store.keys import check_key, check_prefix

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

MIB = 1024 * 1024
PARTS_AT_ONCE = 8
TRANSFER = TransferConfig(multipart_threshold=8 * MIB, multipart_chunksize=8 * MIB, max_concurrency=PARTS_AT_ONCE)
"""Files above the threshold travel as parts of 8 MiB, eight at a time, in both directions."""

CONNECT_TIMEOUT_S = 3.0
READ_TIMEOUT_S = 20.0
"""Longest silence of the server, not longest transfer."""
ATTEMPTS = 3
"""Of one request, the first included; who needs more patience repeats the whole call."""

NAMES_A_FAULT_OF_THE_KEY = frozenset(
    {"KeyTooLongError", "XMinioInvalidObjectName", "XMinioParentIsObject", "XMinioObjectExistsAsDirectory"}
)
DENIED = frozenset({"ExpiredToken", "InvalidToken", "InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied"})
BUSY = frozenset({"SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "PreconditionFailed"})
"""Asking again may help; a failed precondition means that the object was replaced while it was read."""


class S3Store:
    """An ``ObjectStore`` in one bucket, below a prefix. Safe to share between threads. Makes no bucket.

    Credentials come from the usual AWS variables, files or role. Presigned URLs carry ``public_endpoint``, which
    clients of the service reach, because the endpoint is part of what is signed.
    """

    def __init__(
        self, bucket: str, prefix: str = "", *, endpoint: str = "", public_endpoint: str = "", region: str = "us-east-1"
    ) -> None:
        self.bucket = bucket
        self.prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        with _errors(bucket, ""):
            self._client = self._public_client = _client(endpoint, region)
            if public_endpoint not in {"", endpoint}:
                self._public_client = _client(public_endpoint, region)

    def stat(self, key: str) -> ObjectStat:
        """Ask for an object's size."""
        name = self._name(key)
        with _errors(self.bucket, key):
            return ObjectStat(key, self._client.head_object(Bucket=self.bucket, Key=name)["ContentLength"])

    def get_file(self, key: str, path: Path) -> None:
        """Download an object into a new file, in parallel ranges if it is large. A failure leaves no file."""
        name = self._name(key)
        with _errors(self.bucket, key):
            self._client.download_file(self.bucket, name, str(path), Config=TRANSFER)

    def get_bytes(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        """Read an object or a part of it."""
        if length == 0:
            self.stat(key)
            return b""
        name = self._name(key)
        last = "" if length is None else start + length - 1
        with _errors(self.bucket, key):
            try:
                answer = self._client.get_object(Bucket=self.bucket, Key=name, Range=f"bytes={start}-{last}")
            except ClientError as error:
                if _code(error) == "InvalidRange":  # it begins at or after the end
                    return b""
                raise
            with contextlib.closing(answer["Body"]) as body:
                return body.read()

    def put_file(self, key: str, path: Path, content_type: str) -> None:
        """Upload a file, in parts if it is large."""
        name = self._name(key)
        with path.open("rb") as file, _errors(self.bucket, key):
            self._client.upload_fileobj(
                file, self.bucket, name, ExtraArgs={"ContentType": content_type}, Config=TRANSFER
            )

    def put_bytes(self, key: str, data: bytes, content_type: str) -> None:
        """Upload bytes."""
        name = self._name(key)
        with _errors(self.bucket, key):
            self._client.put_object(Bucket=self.bucket, Key=name, Body=data, ContentType=content_type)

    def list(self, prefix: str) -> Iterator[ObjectStat]:
        """List the objects whose key begins with a prefix, in key order."""
        name = self.prefix + check_prefix(prefix)
        with _errors(self.bucket, prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=name)
            for page in pages:
                for item in page.get("Contents", ()):
                    if not item["Key"].endswith("/"):  # some servers list folders
                        yield ObjectStat(item["Key"].removeprefix(self.prefix), item["Size"])

    def delete(self, key: str) -> None:
        """Remove an object; none of that key is no error."""
        name = self._name(key)
        with _errors(self.bucket, key):
            self._client.delete_object(Bucket=self.bucket, Key=name)

    def url(self, key: str, *, expires_s: int) -> str:
        """Make a presigned URL that reads the object until it expires. Asks no server."""
        name = self._name(key)
        with _errors(self.bucket, key):
            return self._public_client.generate_presigned_url(
                "get_object", Params={"Bucket": self.bucket, "Key": name}, ExpiresIn=expires_s
            )

    def _name(self, key: str) -> str:
        return self.prefix + check_key(key)


def _client(endpoint: str, region: str) -> S3Client:
    config = Config(
        signature_version="s3v4",
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
        max_pool_connections=2 * PARTS_AT_ONCE,
        s3={"addressing_style": "path" if endpoint else "auto"},
        # the newer checksum headers are unknown to many servers other than AWS
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    session = boto3.session.Session()
    return session.client("s3", endpoint_url=endpoint or None, region_name=region, config=config)


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


@contextlib.contextmanager
def _errors(bucket: str, key: str) -> Iterator[None]:
    """Turn boto3's errors into the store's."""
    try:
        yield
    except ClientError as error:
        raise _from_answer(error, bucket, key) from error
    except (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError, TokenRetrievalError) as error:
        msg = f"no usable S3 credentials: {error}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give a role"
        raise StoreDenied(msg) from error
    except (ConnectionFailed, HTTPClientError, IncompleteReadError, Boto3Error, S3ValidationError) as error:
        msg = f"the S3 server did not answer in full about {bucket}/{key}: {error}"
        raise StoreUnavailable(msg) from error
    except (BotoCoreError, ValueError) as error:
        msg = f"S3 cannot be used as configured (bucket {bucket!r}): {error}"
        raise StoreError(msg) from error
    except OSError as error:
        msg = f"the local file of {bucket}/{key} cannot be read or written: {error}"
        raise StoreUnavailable(msg) from error


def _from_answer(error: ClientError, bucket: str, key: str) -> StoreError:
    """Read a refusal. HEAD has no body, so its code is the bare status."""
    code = _code(error)
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if code == "NoSuchBucket":
        return StoreError(f"there is no bucket {bucket!r}: create it, or correct the store's URL")
    if code in NAMES_A_FAULT_OF_THE_KEY:
        return InvalidKey(f"S3 takes no key {key!r}: {error}")
    if code in DENIED or status in {401, 403}:
        return StoreDenied(f"S3 refused the credentials for bucket {bucket!r} ({code}): check them and their rights")
    if code in BUSY or status in {408, 412, 429} or status >= 500:  # noqa: PLR2004 - HTTP's server errors
        return StoreUnavailable(f"the S3 server could not answer about {bucket}/{key} now ({code}, HTTP {status})")
    if status == 404:  # noqa: PLR2004 - HTTP's Not Found
        return ObjectNotFound(f"the store holds no object {key!r}")
    return StoreError(f"S3 refused the request about {bucket}/{key}: {error}")
