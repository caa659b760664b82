"""What S3 adds to the contract: presigned URLs, parts, and every way in which a server can fail."""

from __future__ import annotations

import contextlib
import http.server
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from cli.embedded import free_port
from core.errors import ObjectNotFound, StoreDenied, StoreError, StoreUnavailable
from core.store import s3
from core.store.s3 import S3Store
from tests.s3_gateway import S3Gateway

MIB = 1024 * 1024


@pytest.fixture
def bucket(s3_gateway: S3Gateway, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty bucket, with its owner's credentials in the environment."""
    for name, value in s3_gateway.env.items():
        monkeypatch.setenv(name, value)
    return s3_gateway.make_bucket(f"b-{uuid.uuid4().hex}")


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some credentials, for servers that do not look at them."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")


class Faulty(http.server.BaseHTTPRequestHandler):
    """An S3 server that answers every request in the way a test chose."""

    status = 500
    headers_sent: tuple[tuple[str, str], ...] = (("Content-Length", "0"),)
    body = b""
    silent: threading.Event | None = None

    def do_GET(self) -> None:
        if self.silent is not None:
            self.silent.wait(30)
            self.close_connection = True
            return
        self.send_response(self.status)
        for name, value in self.headers_sent:
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(self.body)
        self.close_connection = True

    do_HEAD = do_GET  # noqa: N815 - the names that http.server calls

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.do_GET()

    def log_message(self, *_: object) -> None:
        """Keep the tests' output clean."""


@contextlib.contextmanager
def faulty_server(handler: type[Faulty]) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            if handler.silent is not None:
                handler.silent.set()
            server.shutdown()
            thread.join()


def test_a_presigned_url_reads_the_object_and_nothing_else(s3_gateway: S3Gateway, bucket: str) -> None:
    store = S3Store(bucket, "pre", endpoint=s3_gateway.endpoint)
    store.put_bytes("ü b/1.png", b"pixels", "image/png")
    url = store.url("ü b/1.png", expires_s=60)

    answer = httpx.get(url)

    assert answer.content == b"pixels"
    assert answer.headers["content-type"] == "image/png"
    assert httpx.get(url.replace("1.png", "2.png")).status_code == httpx.codes.FORBIDDEN
    assert httpx.get(url.replace("X-Amz-Expires=60", "X-Amz-Expires=600")).status_code == httpx.codes.FORBIDDEN
    assert httpx.put(url, content=b"other").status_code == httpx.codes.FORBIDDEN


def test_presigned_urls_are_made_for_the_public_endpoint(s3_gateway: S3Gateway, bucket: str) -> None:
    """If clients reach the server by another name than the workers, what they are given works for them."""
    public = s3_gateway.endpoint.replace("127.0.0.1", "localhost")
    store = S3Store(bucket, endpoint=s3_gateway.endpoint, public_endpoint=public)
    store.put_bytes("k", b"x", "text/plain")

    url = store.url("k", expires_s=60)

    assert urlsplit(url).hostname == "localhost"
    assert httpx.get(url).content == b"x"


def test_large_files_travel_in_parts(s3_gateway: S3Gateway, bucket: str, tmp_path: Path) -> None:
    store = S3Store(bucket, endpoint=s3_gateway.endpoint)
    (tmp_path / "file").write_bytes(bytes(17 * MIB))

    store.put_file("large", tmp_path / "file", "image/png")
    found = s3_gateway.client.head_object(Bucket=bucket, Key="large")

    assert found["ETag"].strip('"').endswith("-3")
    assert found["ContentType"] == "image/png"


def test_two_prefixes_of_one_bucket_are_two_stores(s3_gateway: S3Gateway, bucket: str) -> None:
    one, other = (S3Store(bucket, prefix, endpoint=s3_gateway.endpoint) for prefix in ("p", "p2"))
    one.put_bytes("k", b"x", "text/plain")

    assert [stat.key for stat in one.list("")] == ["k"]
    assert list(other.list("")) == []
    with pytest.raises(ObjectNotFound):
        other.get_bytes("k")


@pytest.mark.usefixtures("bucket")
def test_no_bucket_is_made(s3_gateway: S3Gateway) -> None:
    store = S3Store("never-made", endpoint=s3_gateway.endpoint)

    with pytest.raises(StoreError, match="no bucket 'never-made': create it") as refusal:
        store.put_bytes("k", b"x", "text/plain")

    assert not refusal.value.retryable
    assert "never-made" not in [found["Name"] for found in s3_gateway.client.list_buckets()["Buckets"]]


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_are_denied(
    s3_gateway: S3Gateway, bucket: str, variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "wrong")
    store = S3Store(bucket, endpoint=s3_gateway.endpoint)
    (tmp_path / "file").write_bytes(b"x")

    for call in (
        lambda: store.stat("k"),
        lambda: store.get_bytes("k"),
        lambda: store.get_file("k", tmp_path / "copy"),
        lambda: store.put_file("k", tmp_path / "file", "text/plain"),
        lambda: list(store.list("")),
    ):
        with pytest.raises(StoreDenied):
            call()


def test_no_credentials_are_denied_with_what_to_do(
    s3_gateway: S3Gateway, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    store = S3Store(bucket, endpoint=s3_gateway.endpoint)

    with pytest.raises(StoreDenied, match="set AWS_ACCESS_KEY_ID"):
        store.stat("k")


@pytest.mark.usefixtures("credentials")
def test_a_server_that_answers_500_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with faulty_server(Faulty) as endpoint:
        store = S3Store("b", endpoint=endpoint)
        for call in (
            lambda: store.stat("k"),
            lambda: store.get_file("k", tmp_path / "copy"),
            lambda: store.put_file("k", tmp_path / "file", "text/plain"),
        ):
            with pytest.raises(StoreUnavailable, match="HTTP 500"):
                call()

    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.usefixtures("credentials")
def test_nobody_listening_is_unavailable() -> None:
    with pytest.raises(StoreUnavailable):
        S3Store("b", endpoint=f"http://127.0.0.1:{free_port()}").stat("k")


@pytest.mark.usefixtures("credentials")
def test_a_silent_server_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(Faulty):
        silent = threading.Event()

    monkeypatch.setattr(s3, "READ_TIMEOUT_S", 0.1)
    with faulty_server(Silent) as endpoint, pytest.raises(StoreUnavailable, match="did not answer in full"):
        S3Store("b", endpoint=endpoint).get_bytes("k")


@pytest.mark.usefixtures("credentials")
def test_a_transfer_that_breaks_off_is_unavailable_and_leaves_no_file(tmp_path: Path) -> None:
    class BreaksOff(Faulty):
        status = 200
        headers_sent = (("Content-Length", "1000"), ("ETag", '"e"'))
        body = b"only this much"

    with faulty_server(BreaksOff) as endpoint:
        store = S3Store("b", endpoint=endpoint)
        with pytest.raises(StoreUnavailable):
            store.get_bytes("k")
        with pytest.raises(StoreUnavailable):
            store.get_file("k", tmp_path / "copy")

    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("credentials")
def test_a_malformed_endpoint_or_bucket_is_a_typed_error() -> None:
    with pytest.raises(StoreError, match="cannot be used as configured"):
        S3Store("b", endpoint="no url")
    with pytest.raises(StoreError, match="cannot be used as configured"):
        S3Store("no bucket!").stat("k")
