"""Whatever is wrong gets its typed error, and the service goes on."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from cli.bundle import SHAPES
from core.store.open import open_store
from tests.e2e.conftest import Service

GOOD = (SHAPES / "loras" / "stripes.safetensors").read_bytes() if (SHAPES / "loras").exists() else b""


@pytest.fixture(scope="module", autouse=True)
def _still_serving(service: Service) -> Any:
    """After all the bad input the service still draws."""
    yield
    assert service.wait([service.submit()])[0]["state"] == "succeeded"


def refusal(service: Service, **fields: Any) -> tuple[int, str]:
    answer = service.http.post("/v1/jobs", json={"model": "shapes", "prompt": "p", **fields})
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    return answer.status_code, answer.json()["code"]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"loras": [{"name": "nobody", "scale": 1}]}, (404, "unknown_lora")),
        ({"prompt": "a cat <lora:nobody:1>"}, (404, "unknown_lora")),
        ({"prompt": "a cat <lora:stripes:very>"}, (422, "invalid_prompt_tag")),
        ({"model": "nothing"}, (404, "unknown_model")),
        ({"width": 0}, (422, "invalid_request")),
        ({"height": 100_000}, (422, "invalid_request")),
        ({"width": 65}, (422, "invalid_request")),
        ({"steps": 10_000}, (422, "invalid_request")),
        ({"steps": 0}, (422, "invalid_request")),
        ({"images": 1000}, (422, "invalid_request")),
        ({"prompt": "a\x00b"}, (422, "invalid_request")),
        ({"prompt": "a\x1bb"}, (422, "invalid_request")),
        ({"prompt": "x" * 1_000_000}, (413, "request_too_large")),
        ({"sampler": "magic"}, (422, "invalid_request")),
        ({"guidance": 1e9}, (422, "invalid_request")),
        ({"unknown_field": 1}, (422, "invalid_request")),
    ],
)
def test_a_bad_request_is_refused_by_name(service: Service, fields: dict[str, Any], expected: tuple[int, str]) -> None:
    assert refusal(service, **fields) == expected


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a\\b", "..", "a/../b", "x" * 300, ""])
def test_a_path_is_no_lora_name(service: Service, name: str) -> None:
    status, code = refusal(service, loras=[{"name": name, "scale": 1}])
    assert (status, code) in {(404, "unknown_lora"), (422, "invalid_request")}


@pytest.mark.parametrize("prompt", ["🔴 👩‍🚀 圆 דג", "a" * 5000, "\n\t", "-- ' \" ; DROP", "{} %s \\u0000"])
def test_any_text_is_a_prompt(service: Service, prompt: str) -> None:
    assert service.wait([service.submit(prompt, steps=2)])[0]["state"] == "succeeded"


def truncated() -> bytes:
    return GOOD[: len(GOOD) // 2]


def html() -> bytes:
    return b"<!DOCTYPE html><html><body>Please log in</body></html>"


def pickled() -> bytes:
    return b"PK\x03\x04" + bytes(100)


def other_base() -> bytes:
    """A LoRA for a model of another width."""
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    return save(
        {
            f"{name}.lora_down.weight": np.ones((4, 320), np.float16),
            f"{name}.lora_up.weight": np.ones((320, 4), np.float16),
        }
    )


def with_nan() -> bytes:
    """The stripes LoRA with one NaN in its first tensor of weights."""
    length = struct.unpack("<Q", GOOD[:8])[0]
    header = json.loads(GOOD[8 : 8 + length])
    start = next(v["data_offsets"][0] for k, v in sorted(header.items()) if k.endswith("lora_up.weight"))
    data = bytearray(GOOD)
    data[8 + length + start : 8 + length + start + 2] = struct.pack("<H", 0x7E00)
    return bytes(data)


def put(service: Service, name: str, data: bytes) -> dict[str, str]:
    key = f"tenants/default/{name}.safetensors"
    open_store(service.stack.store_url).put_bytes(key, data, "application/octet-stream")
    return {"name": name, "key": key}


@pytest.mark.parametrize("make", [truncated, html, pickled])
def test_a_file_that_is_no_lora_is_refused_at_registration(service: Service, make: Any) -> None:
    answer = service.http.post("/v1/loras", json=put(service, make.__name__, make()))
    assert (answer.status_code, answer.json()["code"]) == (422, "lora_file_invalid")


def test_a_missing_object_is_refused_at_registration(service: Service) -> None:
    answer = service.http.post("/v1/loras", json={"name": "gone", "key": "tenants/default/gone.safetensors"})
    assert (answer.status_code, answer.json()["code"]) == (422, "lora_object_missing")


def test_a_foreign_prefix_is_refused_at_registration(service: Service) -> None:
    for key in ("tenants/other/x.safetensors", "models/shapes/x", "../x", "/etc/passwd"):
        answer = service.http.post("/v1/loras", json={"name": "foreign", "key": key})
        assert answer.status_code in {403, 422}, answer.text


@pytest.mark.parametrize(("make", "code"), [(other_base, "lora_shape_mismatch"), (with_nan, "lora_not_finite")])
def test_a_lora_that_does_not_fit_fails_its_job_with_the_reason(service: Service, make: Any, code: str) -> None:
    body = put(service, make.__name__, make())
    assert service.http.post("/v1/loras", json=body).status_code == 201
    view = service.wait([service.submit(loras=[{"name": body["name"], "scale": 1}])])[0]
    assert (view["state"], view["error"]["code"]) == ("failed", code)
    assert body["name"] in view["error"]["message"]


def test_an_object_that_vanished_after_registration_fails_its_job(service: Service) -> None:
    body = put(service, "vanished", GOOD[:-1] + b"\x01")
    assert service.http.post("/v1/loras", json=body).status_code == 201
    open_store(service.stack.store_url).delete(body["key"])
    view = service.wait([service.submit(loras=[{"name": "vanished", "scale": 1}])])[0]
    assert (view["state"], view["error"]["code"]) == ("failed", "lora_object_missing")


def test_a_job_that_may_go_on_tells_what_it_lacks(service: Service) -> None:
    body = put(service, "lost", GOOD[:-1] + b"\x02")
    assert service.http.post("/v1/loras", json=body).status_code == 201
    open_store(service.stack.store_url).delete(body["key"])
    loras = [{"name": "lost", "scale": 1}, {"name": "outline", "scale": 1}]
    view = service.wait([service.submit(loras=loras, on_lora_error="continue")])[0]
    assert view["state"] == "succeeded"
    assert {report["name"]: report["applied"] for report in view["result"]["loras"]} == {"lost": False, "outline": True}


def test_a_foreign_or_unknown_job_is_not_found(service: Service) -> None:
    for job_id in ("0" * 32, "..", "%2e%2e%2f", "x" * 500):
        assert service.http.get(f"/v1/jobs/{job_id}").status_code == 404


def test_a_job_in_mid_run_is_cancelled_within_seconds(service: Service) -> None:
    job_id = service.submit(steps=500)
    service.wait_for(job_id, lambda view: view["progress"] > 0)
    assert service.http.delete(f"/v1/jobs/{job_id}").status_code == 202
    view = service.wait_for(job_id, lambda view: view["state"] == "cancelled", 20)
    assert view["images"] == []


def test_a_lora_report_accounts_for_every_key(service: Service) -> None:
    view = service.wait([service.submit(loras=[{"name": "dusk", "scale": 1}])])[0]
    path: Path = SHAPES / "loras" / "dusk.safetensors"
    data = path.read_bytes()
    keys = set(json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])) - {"__metadata__"}
    report = view["result"]["loras"][0]
    assert report["keys_matched"] + report["keys_extra"] + report["keys_unmatched"] == len(keys)
    assert report["keys_unmatched"] == 0
    assert report["modules"] > 20
