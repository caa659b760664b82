"""What a local directory adds to the contract: links, durable writes, and no way out of its root."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from core.errors import InvalidKey, ObjectNotFound, StoreDenied, StoreError, StoreUnavailable
from core.store.links import LinkSigner
from core.store.local import LocalStore
from core.store.open import open_store
from core.store.s3 import S3Store

TYPE = "application/octet-stream"


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store", LinkSigner("http://api/", "secret"))


def files(store: LocalStore) -> list[str]:
    """Every file below the root, unfinished writes included."""
    return sorted(str(path.relative_to(store.root)) for path in store.root.rglob("*") if path.is_file())


def test_a_file_put_there_by_hand_is_an_object(store: LocalStore) -> None:
    (store.root / "loras").mkdir()
    (store.root / "loras/x.safetensors").write_bytes(b"x")

    assert [stat.key for stat in store.list("loras/")] == ["loras/x.safetensors"]
    assert store.get_bytes("loras/x.safetensors") == b"x"


def test_symbolic_links_out_of_the_root_are_no_objects(store: LocalStore, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    (store.root / "file").symlink_to(tmp_path / "secret")
    (store.root / "folder").symlink_to(tmp_path)
    (store.root / "loop").symlink_to(store.root / "loop")

    for key in ("file", "folder/secret"):
        with pytest.raises(InvalidKey, match="leads out"):
            store.get_bytes(key)
        with pytest.raises(InvalidKey, match="leads out"):
            store.put_bytes(key, b"overwritten", TYPE)
    with pytest.raises(ObjectNotFound):
        store.get_bytes("loop")

    assert list(store.list("")) == []
    assert (tmp_path / "secret").read_bytes() == b"secret"


def test_a_key_cannot_be_an_object_and_a_folder(store: LocalStore) -> None:
    store.put_bytes("a/b", b"x", TYPE)

    for key in ("a", "a/b/c"):
        with pytest.raises(InvalidKey, match="folder"):
            store.put_bytes(key, b"y", TYPE)

    assert files(store) == ["a/b"]


def test_the_folder_of_unfinished_writes_is_nobodys(store: LocalStore) -> None:
    (store.root / ".incoming/left-by-a-dead-process").write_bytes(b"half")

    with pytest.raises(InvalidKey):
        store.get_bytes(".incoming/left-by-a-dead-process")
    assert list(store.list("")) == []
    assert list(store.list(".incoming/")) == []


def test_a_full_disk_leaves_the_old_object(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put_bytes("k", b"old", TYPE)

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreUnavailable, match="No space left"):
        store.put_bytes("k", b"new", TYPE)

    assert store.get_bytes("k") == b"old"
    assert files(store) == ["k"]


def test_a_directory_that_may_not_be_read_is_denied(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put_bytes("k", b"x", TYPE)

    def forbidden(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "open", forbidden)
    with pytest.raises(StoreDenied, match="owner and mode"):
        store.get_bytes("k")


def test_what_is_written_is_synced_before_it_is_an_object(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut must not leave a name without its content: file, then name, then the folder's names."""
    there: list[bool] = []
    monkeypatch.setattr(os, "fsync", lambda _descriptor: there.append((store.root / "k").exists()))

    store.put_bytes("k", b"x", TYPE)

    assert there == [False, True]


def test_a_link_names_the_file_route_and_verifies(store: LocalStore) -> None:
    before = int(time.time())
    parts = urlsplit(store.url("t/ü b?.png", expires_s=60))
    query = {name: values[0] for name, values in parse_qs(parts.query).items()}
    expires = int(query["expires"])

    assert (parts.scheme, parts.netloc) == ("http", "api")
    assert unquote(parts.path) == "/v1/files/t/ü b?.png"
    assert before + 60 <= expires <= before + 65
    assert store.verify_url("t/ü b?.png", expires, query["signature"], before)


def test_a_link_that_was_changed_or_has_expired_does_not_verify() -> None:
    signer = LinkSigner("http://api", "secret")
    signature = parse_qs(urlsplit(signer.link("a/b", 1000)).query)["signature"][0]

    assert signer.verify("a/b", 1000, signature, 999.9)
    assert not signer.verify("a/b", 1000, signature, 1000)
    assert not signer.verify("a/c", 1000, signature, 999)
    assert not signer.verify("a/b", 1001, signature, 999)
    assert not signer.verify("a/b", 1000, signature[:-1], 999)
    assert not signer.verify("a/b", 1000, "ü", 999)
    assert not LinkSigner("http://api", "other").verify("a/b", 1000, signature, 999)
    assert "secret" not in repr(signer)


def test_a_url_names_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    absolute = open_store(f"file://{tmp_path}/a%20b")
    relative = open_store("file://./var/store")
    bucket = open_store("s3://bucket/some/prefix/")

    assert isinstance(absolute, LocalStore)
    assert isinstance(relative, LocalStore)
    assert isinstance(bucket, S3Store)
    assert absolute.root == tmp_path / "a b"
    assert relative.root == tmp_path / "var/store"
    assert (bucket.bucket, bucket.prefix) == ("bucket", "some/prefix/")
    assert open_store("s3://bucket").prefix == ""  # type: ignore[attr-defined]


@pytest.mark.parametrize("url", ["", "file://", "file://relative", "s3://", "s3:///x", "http://host/x", "/path"])
def test_any_other_url_is_refused(url: str) -> None:
    with pytest.raises(StoreError, match="names no store"):
        open_store(url)


def test_links_of_a_drawn_secret_differ_between_stores(tmp_path: Path) -> None:
    one, other = (open_store(f"file://{tmp_path}", public_url="http://api") for _ in range(2))

    assert one.url("k", expires_s=10**6) != other.url("k", expires_s=10**6)
