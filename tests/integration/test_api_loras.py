"""Registering and listing LoRAs and models over HTTP, on in-memory twins."""

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi.testclient import TestClient

from api.access import Access
from api.context import REGISTRATIONS_AT_ONCE, Limits
from core.catalogue.records import PUBLIC
from core.errors import StoreDenied
from core.ports import ObjectStat
from core.store.memory import MemoryStore
from tests.integration.api_parts import ANN, BOB, SHAPES, TOKENS, Parts, safetensors, with_catalogue

GOOD = safetensors({"ss_base_model_version": "sd_v1", "modelspec.trigger_phrase": "zork, blue"})
KEY = "tenants/default/loras/neu.safetensors"
HOSTILE: list[tuple[str, bytes, str]] = [
    ("empty", b"", "lora_file_invalid"),
    ("an HTML page", b"<!DOCTYPE html><html><body>404</body></html>", "lora_file_invalid"),
    ("a pickle", b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94.", "lora_file_invalid"),
    ("a zip", b"PK\x03\x04" + b"\0" * 64, "lora_file_invalid"),
    ("truncated data", GOOD[:-1], "lora_file_invalid"),
    ("truncated header", GOOD[:40], "lora_file_invalid"),
    ("a huge header", (2**40).to_bytes(8, "little") + b"{" + b" " * 99, "lora_file_invalid"),
    ("a nesting bomb", (4_000).to_bytes(8, "little") + b'{"a":' + b"[" * 3_995, "lora_file_invalid"),
    ("larger than the limit", b"\0" * 5_000, "lora_too_large"),
]


@pytest.fixture
def parts() -> Parts:
    return with_catalogue(Parts(store=MemoryStore(), limits=Limits(max_lora_bytes=4_500)))


@pytest.fixture
def client(parts: Parts) -> TestClient:
    return parts.client()


def put(parts: Parts, data: bytes = GOOD, key: str = KEY) -> str:
    parts.store.put_bytes(key, data, "application/octet-stream")
    return hashlib.sha256(data).hexdigest()


def register(client: TestClient, **body: Any) -> Any:
    return client.post("/v1/loras", json={"name": "neu", "key": KEY} | body)


def test_an_object_becomes_a_lora_that_jobs_may_name(client: TestClient, parts: Parts) -> None:
    # Given an uploaded file
    digest = put(parts)
    # If it is registered
    answer = register(client, name="neu (v1.2)")
    # Expect what the file says of itself
    assert answer.status_code == 201
    assert answer.headers["location"] == "/v1/loras/neu%20%28v1.2%29"
    view = answer.json()
    expected = {"name": "neu (v1.2)", "public": False, "digest": digest, "size_bytes": len(GOOD), "base": "SD 1"}
    assert view.items() >= expected.items()
    assert (view["trigger_words"], view["default_scale"], view["tensors"]) == (["zork", "blue"], 1.0, 1)
    # and that it can be read and used
    assert client.get(answer.headers["location"]).json() == view
    job = client.post("/v1/jobs", json={"prompt": "x <lora:neu (v1.2):0.5>"}).json()
    assert job["request"]["loras"] == [{"name": "neu (v1.2)", "digest": digest, "unet": 0.5, "te": 0.5}]
    assert parts.queue.get("default", job["id"]).spec.loras.refs[0].key == KEY


def test_what_the_caller_says_of_it_stands_above_the_file(client: TestClient, parts: Parts) -> None:
    digest = put(parts)
    view = register(client, trigger_words=[], default_scale=0.6, sha256=digest).json()
    assert (view["trigger_words"], view["default_scale"]) == ([], 0.6)


def test_a_file_is_hashed_in_pieces(client: TestClient, parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.registration.READ_BYTES", 7)
    digest = put(parts)
    assert register(client).json()["digest"] == digest


def test_the_same_again_is_no_error_and_another_file_is(client: TestClient, parts: Parts) -> None:
    # Given
    put(parts)
    assert register(client).status_code == 201
    # If the same file is registered again, with another setting
    again = register(client, default_scale=0.5)
    # Expect the setting to be renewed
    assert (again.status_code, again.json()["default_scale"]) == (200, 0.5)
    # If another file takes the place of the object
    put(parts, safetensors(name="other"))
    taken = register(client)
    # Expect the name to keep its meaning
    assert (taken.status_code, taken.json()["code"]) == (409, "name_taken")
    assert client.get("/v1/loras/neu").json() == again.json()


@pytest.mark.parametrize(("data", "code"), [row[1:] for row in HOSTILE], ids=[row[0] for row in HOSTILE])
def test_a_hostile_file_is_refused_by_what_it_is(client: TestClient, parts: Parts, data: bytes, code: str) -> None:
    put(parts, data)
    answer = register(client)
    assert (answer.status_code, answer.json()["code"]) == (422, code), answer.text
    assert client.get("/v1/loras/neu").status_code == 404


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"key": "tenants/default/none.safetensors"}, 422, "lora_object_missing"),
        ({"key": "tenants/other/neu.safetensors"}, 422, "invalid_request"),
        ({"key": "tenants/default"}, 422, "invalid_request"),
        ({"key": "tenants/default2/neu.safetensors"}, 422, "invalid_request"),
        ({"key": "results/default/x.png"}, 422, "invalid_request"),
        ({"key": "/etc/passwd"}, 422, "invalid_request"),
        ({"key": "tenants/default/../other/neu.safetensors"}, 422, "invalid_key"),
        ({"key": "public/../tenants/other/neu.safetensors"}, 422, "invalid_key"),
        ({"key": "tenants/default/a\x00"}, 422, "invalid_request"),
        ({"key": ""}, 422, "invalid_request"),
        ({"sha256": "0" * 64}, 422, "lora_checksum_mismatch"),
        ({"sha256": "A" * 64}, 422, "invalid_request"),
        ({"name": "../neu"}, 422, "invalid_request"),
        ({"name": "a:b"}, 422, "invalid_request"),
        ({"name": ""}, 422, "invalid_request"),
        ({"name": "x" * 129}, 422, "invalid_request"),
        ({"default_scale": 101}, 422, "invalid_request"),
        ({"trigger_words": ["a\x1b"]}, 422, "invalid_request"),
        ({"owner": "public"}, 422, "invalid_request"),
    ],
)
def test_a_bad_registration_is_refused_by_name(
    client: TestClient, parts: Parts, body: dict[str, Any], status: int, code: str
) -> None:
    put(parts)
    put(parts, key="tenants/other/neu.safetensors")
    before = client.get("/v1/loras").json()
    answer = register(client, **body)
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert client.get("/v1/loras").json() == before


def test_tenants_register_and_see_only_their_own() -> None:
    # Given two tenants
    parts = with_catalogue(Parts(access=Access.parse(TOKENS)))
    client = parts.client()
    put(parts, key="tenants/ann/x.safetensors")
    put(parts, key="public/x.safetensors")
    body = {"name": "neu", "key": "tenants/ann/x.safetensors"}
    # Expect that bob cannot take ann's file, whether it exists or not, and nobody can publish
    theft = client.post("/v1/loras", json=body, headers=BOB)
    guess = client.post("/v1/loras", json=body | {"key": "tenants/ann/none"}, headers=BOB)
    assert theft.status_code == guess.status_code == 422
    assert theft.text == guess.text
    assert client.post("/v1/loras", json=body | {"key": "public/x.safetensors"}, headers=ANN).status_code == 422
    # If ann registers it
    assert client.post("/v1/loras", json=body, headers=ANN).status_code == 201
    # Expect it to be hers alone
    names = {who: [lora["name"] for lora in client.get("/v1/loras", headers=who_is).json()["loras"]]
             for who, who_is in (("ann", ANN), ("bob", BOB))}  # fmt: skip
    assert names == {"ann": ["ink", "neu", "水彩"], "bob": ["ink"]}
    assert client.get("/v1/loras/neu", headers=BOB).json()["code"] == "unknown_lora"
    assert client.post("/v1/jobs", json={"prompt": "<lora:neu:1>"}, headers=BOB).json()["code"] == "unknown_lora"


def test_the_operator_of_an_open_api_publishes(client: TestClient, parts: Parts) -> None:
    put(parts, key="public/x.safetensors")
    view = register(client, key="public/x.safetensors").json()
    assert view["public"] is True
    assert parts.catalogue.get_lora("anybody", "neu").owner == PUBLIC


def test_a_listing_shows_no_place_in_the_store(client: TestClient) -> None:
    answer = client.get("/v1/loras")
    assert [lora["name"] for lora in answer.json()["loras"]] == ["chalk", "ink"]
    assert "tenants/" not in answer.text


def test_a_store_that_fails_for_a_while_is_retryable(client: TestClient, parts: Parts) -> None:
    # Given a store that answers 500 once
    put(parts)
    assert isinstance(parts.store, MemoryStore)
    parts.store.fail_next(1)
    # If
    first, second = register(client), register(client)
    # Expect
    assert (first.status_code, first.json()["code"]) == (503, "store_unavailable")
    assert first.json()["retryable"] is True
    assert int(first.headers["retry-after"]) > 0
    assert second.status_code == 201


def test_only_so_many_files_are_read_at_once(parts: Parts) -> None:
    # Given as many registrations as may be, all waiting for a store that hangs
    began, go_on = threading.Semaphore(0), threading.Event()

    class HangingStore(MemoryStore):
        def stat(self, key: str) -> ObjectStat:
            began.release()
            assert go_on.wait(30)
            return super().stat(key)

    parts.store = HangingStore()
    put(parts)
    with parts.client() as client, ThreadPoolExecutor(REGISTRATIONS_AT_ONCE) as callers:
        waiting = [callers.submit(register, client) for _ in range(REGISTRATIONS_AT_ONCE)]
        try:
            assert all(began.acquire(timeout=30) for _ in waiting)
            # If one more is asked for
            refused = register(client)
        finally:
            go_on.set()
        # Expect it to be sent away, and a place to be free once the others are done
        assert (refused.status_code, refused.json()["code"]) == (503, "busy")
        assert refused.json()["retryable"] is True
        assert int(refused.headers["retry-after"]) > 0
        assert {answer.result().status_code for answer in waiting} <= {200, 201}
        assert register(client).status_code == 200


def test_a_registration_that_fails_frees_its_place(client: TestClient) -> None:
    codes = {register(client).json()["code"] for _ in range(REGISTRATIONS_AT_ONCE + 1)}
    assert codes == {"lora_object_missing"}


def test_refused_credentials_are_the_operators_matter(client: TestClient, parts: Parts) -> None:
    put(parts)
    assert isinstance(parts.store, MemoryStore)
    parts.store.fail_next(1, StoreDenied("403 for AKIA-some-key"))
    answer = register(client)
    assert (answer.status_code, answer.json()["code"]) == (503, "store_denied")
    assert "AKIA" not in answer.text


def test_models_are_listed_with_their_defaults(client: TestClient) -> None:
    (model,) = client.get("/v1/models").json()["models"]
    names = {"name", "pool", "steps", "guidance", "sampler", "width", "height", "size_multiple", "max_pixels"}
    assert model == SHAPES.model_dump(include=names) | {"digest": SHAPES.digest, "size_bytes": 5}
