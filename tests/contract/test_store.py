"""What every ObjectStore does: the in-memory twin, a local directory, and S3 against a real server."""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from core.errors import InvalidKey, ObjectNotFound
from core.ports import ObjectStat, ObjectStore
from core.store.memory import MemoryStore
from core.store.open import open_store

TYPE = "application/octet-stream"
MIB = 1024 * 1024

ODD_KEYS = ["a b/ü ☂.bin", "100%/+&?#.bin", 'it\'s/"q".bin', "c:d/…", "-/.hidden", "x" * 255 + "/" + "é" * 127]
BAD_KEYS = [
    "",
    "/a",
    "a/",
    "a//b",
    "..",
    "../a",
    "a/../b",
    "a/./b",
    "a\\b",
    "a\0b",
    "a\nb",
    "a\x7fb",
    "a\ud800b",
    "x" * 256,
    "é" * 128,
    "/".join(["x" * 100] * 11),
]


@pytest.fixture(params=["memory", "local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    if request.param == "memory":
        return MemoryStore()
    if request.param == "local":
        return open_store(f"file://{tmp_path}/store", public_url="http://api", url_secret="secret")
    gateway = request.getfixturevalue("s3_gateway")
    for name, value in gateway.env.items():
        monkeypatch.setenv(name, value)
    bucket = gateway.make_bucket(f"b-{uuid.uuid4().hex}")
    return open_store(f"s3://{bucket}/some/prefix/", s3_endpoint=gateway.endpoint)


@pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 40], ids=["empty", "one-byte", "10-KiB"])
def test_bytes_come_back_as_they_were_put(store: ObjectStore, data: bytes, tmp_path: Path) -> None:
    store.put_bytes("a/b", data, TYPE)

    store.get_file("a/b", tmp_path / "copy")

    assert store.get_bytes("a/b") == data
    assert (tmp_path / "copy").read_bytes() == data
    assert store.stat("a/b") == ObjectStat("a/b", len(data))


def test_a_file_of_several_parts_comes_back_as_it_was_put(store: ObjectStore, tmp_path: Path) -> None:
    data = b"".join(i.to_bytes(4, "big") for i in range(5 * MIB))  # 20 MiB, no two blocks alike
    (tmp_path / "file").write_bytes(data)

    store.put_file("big", tmp_path / "file", TYPE)
    store.get_file("big", tmp_path / "copy")

    assert (tmp_path / "copy").read_bytes() == data
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {"file", "copy"}


@pytest.mark.parametrize(
    ("start", "length", "expected"),
    [
        (0, None, b"0123456789"),
        (3, None, b"3456789"),
        (3, 4, b"3456"),
        (8, 100, b"89"),
        (10, None, b""),
        (50, 5, b""),
        (2, 0, b""),
    ],
)
def test_a_part_can_be_read(store: ObjectStore, start: int, length: int | None, expected: bytes) -> None:
    store.put_bytes("digits", b"0123456789", TYPE)

    assert store.get_bytes("digits", start, length) == expected


def test_a_second_put_replaces_the_first(store: ObjectStore) -> None:
    store.put_bytes("k", b"first and longer", TYPE)
    store.put_bytes("k", b"second", TYPE)

    assert store.get_bytes("k") == b"second"
    assert list(store.list("")) == [ObjectStat("k", 6)]


def test_readers_see_all_of_a_put_or_nothing(store: ObjectStore) -> None:
    """If a reader asks again and again while an object is put, it is told that there is none, then has all of it."""
    content = bytes(range(256)) * 16 * 1024
    writer = threading.Thread(target=store.put_bytes, args=("k", content, TYPE))
    seen = None

    writer.start()
    while seen is None:
        with contextlib.suppress(ObjectNotFound):
            seen = store.get_bytes("k")
    writer.join()

    assert seen == content


@pytest.mark.parametrize("key", ["absent", "folder", "folder/absent", "folder/object/below"])
def test_what_is_not_there_is_not_found(store: ObjectStore, key: str, tmp_path: Path) -> None:
    store.put_bytes("folder/object", b"x", TYPE)
    reads: list[Callable[[], object]] = [
        lambda: store.stat(key),
        lambda: store.get_bytes(key),
        lambda: store.get_bytes(key, 0, 0),
        lambda: store.get_file(key, tmp_path / "copy"),
    ]

    for read in reads:
        with pytest.raises(ObjectNotFound, match=key):
            read()

    assert not [path for path in tmp_path.iterdir() if path.is_file()]


def test_delete_removes_one_object_and_minds_none(store: ObjectStore) -> None:
    store.put_bytes("a/x", b"1", TYPE)
    store.put_bytes("a/y", b"2", TYPE)

    for key in ("a/x", "a/x", "never", "a", "a/y/below"):
        store.delete(key)

    assert [stat.key for stat in store.list("")] == ["a/y"]


def test_list_gives_exactly_the_keys_with_the_prefix_in_order(store: ObjectStore) -> None:
    keys = ["l/B", "l/a-b", "l/a/a", "l/a/b", "l/a0", "l/aé", "m/a"]
    for key in reversed(keys):
        store.put_bytes(key, key.encode(), TYPE)

    expected = {"": keys, "l/": keys[:6], "l/a": keys[1:6], "l/a/": keys[2:4], "l/a/b": ["l/a/b"], "l/x": []}
    for prefix, found in expected.items():
        assert list(store.list(prefix)) == [ObjectStat(key, len(key.encode())) for key in found]


def test_odd_keys_are_kept_as_they_are(store: ObjectStore) -> None:
    for key in ODD_KEYS:
        store.put_bytes(key, key.encode(), TYPE)

    assert {stat.key for stat in store.list("")} == set(ODD_KEYS)
    assert [store.get_bytes(key).decode() for key in ODD_KEYS] == ODD_KEYS


def test_a_text_that_is_no_key_is_refused_by_every_call(store: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    calls: list[Callable[[str], object]] = [
        store.stat,
        store.get_bytes,
        lambda key: store.get_file(key, tmp_path / "copy"),
        lambda key: store.put_bytes(key, b"x", TYPE),
        lambda key: store.put_file(key, tmp_path / "file", TYPE),
        store.delete,
        lambda key: store.url(key, expires_s=60),
    ]

    for key in BAD_KEYS:
        for call in calls:
            with pytest.raises(InvalidKey):
                call(key)

    assert list(store.list("")) == []


def test_a_text_that_begins_no_key_is_refused_as_prefix(store: ObjectStore) -> None:
    for prefix in ("/", "..", "a/../", "a//", "a\nb", "x" * 256):
        with pytest.raises(InvalidKey):
            list(store.list(prefix))
