"""The API as a service: who may call, what an operator sees, and what happens when a part is broken."""

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from fastapi.testclient import TestClient

from api.access import Access
from api.context import CHECKS_AT_ONCE
from core.errors import QueueUnavailable
from core.job import Job
from core.queue.memory import MemoryQueue
from core.store.links import LinkSigner
from core.store.local import LocalStore
from core.store.memory import MemoryStore
from tests.integration.api_parts import ANN, TOKENS, Parts, with_catalogue

GUARDED = [
    ("POST", "/v1/jobs"),
    ("GET", "/v1/jobs/" + "0" * 32),
    ("DELETE", "/v1/jobs/" + "0" * 32),
    ("GET", "/v1/loras"),
    ("POST", "/v1/loras"),
    ("GET", "/v1/loras/ink"),
    ("GET", "/v1/models"),
]
OPEN = {"/v1/files/{key}", "/healthz", "/readyz"}


class SilentQueue(MemoryQueue):
    """A queue that is not there."""

    def ping(self) -> None:
        msg = "gone"
        raise QueueUnavailable(msg)


# --- who may call -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "path"), GUARDED)
@pytest.mark.parametrize("header", [None, "Bearer wrong-token", "Bearer ", "Basic YW5uOmFubg==", "ann-secret-token"])
def test_without_a_known_token_nothing_is_told(method: str, path: str, header: str | None) -> None:
    client = with_catalogue(Parts(access=Access.parse(TOKENS))).client()
    answer = client.request(method, path, headers={"Authorization": header} if header else {})
    assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.headers["content-type"] == "application/problem+json"


def test_every_other_route_is_open_on_purpose() -> None:
    paths = Parts().context
    assert paths.access.is_open
    schema = Parts().client().get("/openapi.json").json()
    unguarded = {
        path
        for path, operations in schema["paths"].items()
        for operation in operations.values()
        if "security" not in operation
    }
    assert unguarded == OPEN


def test_a_known_token_names_its_tenant() -> None:
    client = with_catalogue(Parts(access=Access.parse(TOKENS))).client()
    names = [lora["name"] for lora in client.get("/v1/loras", headers=ANN).json()["loras"]]
    assert names == ["ink", "水彩"]


# --- files ------------------------------------------------------------------------------------------------------


@pytest.fixture
def local(tmp_path: Path) -> Parts:
    parts = with_catalogue(
        Parts(
            store=LocalStore(tmp_path / "store", LinkSigner("http://testserver", "secret")),
            access=Access.parse(TOKENS),
        )
    )
    parts.store.put_bytes("results/ann/j 1/0.png", b"PNG", "image/png")
    return parts


def link(parts: Parts, key: str = "results/ann/j 1/0.png", expires_s: int = 60) -> str:
    parts_of_url = urlsplit(parts.store.url(key, expires_s=expires_s))
    return f"{parts_of_url.path}?{parts_of_url.query}"


def test_a_signed_link_reads_its_file_without_a_token(local: Parts) -> None:
    answer = local.client().get(link(local))
    assert (answer.status_code, answer.content) == (200, b"PNG")
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_an_image_link_of_a_job_works(local: Parts) -> None:
    # Given a job of ann's that was drawn
    client = local.client()
    job_id = client.post("/v1/jobs", json={"prompt": "x"}, headers=ANN).json()["id"]
    local.draw(job_id, "ann")
    # If the link in its view is followed
    (image,) = client.get(f"/v1/jobs/{job_id}", headers=ANN).json()["images"]
    # Expect the image, and bytes that no browser takes for a page
    assert client.get(image["url"]).content == b"PNG"


@pytest.mark.parametrize(
    ("before", "after"),
    [("0.png", "1.png"), ("expires=", "expires=1"), ("signature=", "signature=0"), ("signature=", "sig="), ("?", "#")],
)
def test_a_changed_link_is_refused(local: Parts, before: str, after: str) -> None:
    answer = local.client().get(link(local).replace(before, after))
    assert (answer.status_code, answer.json()["code"]) == (403, "link_invalid")


def test_an_expired_link_is_refused(local: Parts) -> None:
    answer = local.client().get(link(local, expires_s=0))
    assert (answer.status_code, answer.json()["code"]) == (403, "link_invalid")


def test_a_link_to_what_is_gone_is_not_found(local: Parts) -> None:
    path = link(local)
    local.store.delete("results/ann/j 1/0.png")
    answer = local.client().get(path)
    assert (answer.status_code, answer.json()["code"]) == (404, "object_not_found")


@pytest.mark.parametrize("key", ["..%2f..%2fetc%2fpasswd", "%2e%2e/x", "a%00b", "%ff", "x\\y", ""])
def test_no_path_leads_out_of_the_store(local: Parts, key: str) -> None:
    answer = local.client().get(f"/v1/files/{key}?expires=9999999999&signature={'0' * 64}")
    assert answer.status_code == 403


def test_other_stores_serve_no_files_here() -> None:
    answer = Parts().client().get("/v1/files/x?expires=9999999999&signature=0")
    assert (answer.status_code, answer.json()["code"]) == (404, "object_not_found")


# --- for operators ----------------------------------------------------------------------------------------------


def test_a_whole_service_is_alive_and_ready() -> None:
    client = Parts().client()
    assert client.get("/healthz").json() == client.get("/readyz").json() == {"status": "ok"}


def test_without_its_queue_it_is_alive_and_not_ready() -> None:
    client = Parts(queue=SilentQueue()).client()
    assert client.get("/healthz").status_code == 200
    answer = client.get("/readyz")
    assert (answer.status_code, answer.json()["code"]) == (503, "queue_unavailable")


def test_without_its_store_it_is_not_ready() -> None:
    store = MemoryStore()
    store.fail_next(1)
    answer = Parts(store=store).client().get("/readyz")
    assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable")


def test_a_crowd_waits_for_a_slow_queue_together() -> None:
    # Given a queue that answers nobody until so many have asked
    crowd = 100
    barrier = threading.Barrier(crowd)

    class SlowQueue(MemoryQueue):
        def get(self, tenant: str, job_id: str) -> Job:
            barrier.wait(timeout=30)
            return super().get(tenant, job_id)

    # If they ask at once
    with Parts(queue=SlowQueue()).client() as client, ThreadPoolExecutor(crowd) as callers:
        answers = [callers.submit(client.get, "/v1/jobs/" + "0" * 32) for _ in range(crowd)]
        # Expect that none of them stood behind another
        assert {answer.result().status_code for answer in answers} == {404}


def test_only_so_many_readiness_checks_wait_at_once() -> None:
    # Given as many checks as may be, all waiting for a queue that hangs
    began, go_on = threading.Semaphore(0), threading.Event()

    class HangingQueue(MemoryQueue):
        def ping(self) -> None:
            began.release()
            assert go_on.wait(30)

    with Parts(queue=HangingQueue()).client() as client, ThreadPoolExecutor(CHECKS_AT_ONCE) as callers:
        waiting = [callers.submit(client.get, "/readyz") for _ in range(CHECKS_AT_ONCE)]
        try:
            assert all(began.acquire(timeout=30) for _ in waiting)
            # If one more asks
            refused = client.get("/readyz")
        finally:
            go_on.set()
        # Expect it to be sent away, and the others to be answered
        assert (refused.status_code, refused.json()["code"]) == (503, "busy")
        assert refused.json()["retryable"] is True
        assert int(refused.headers["retry-after"]) > 0
        assert {answer.result().status_code for answer in waiting} == {200}
        assert client.get("/readyz").status_code == 200


def test_requests_are_counted_by_route_template() -> None:
    # Given
    parts = with_catalogue(Parts())
    client = parts.client()
    # If routes are called, one of them by ids, and one that is not there
    client.get("/v1/jobs/" + "0" * 32)
    client.get("/v1/jobs/" + "1" * 32)
    client.get("/secret-path")
    scrape = client.get("/metrics")
    # Expect templates, never paths
    assert scrape.headers["content-type"].startswith("text/plain; version=")
    name = "fuseline_http_request_duration_seconds_count"
    assert f'{name}{{method="GET",route="/v1/jobs/{{job_id}}",status="404"}} 2.0' in scrape.text
    assert f'{name}{{method="GET",route="unmatched",status="404"}} 1.0' in scrape.text
    assert "secret-path" not in scrape.text


# --- errors -----------------------------------------------------------------------------------------------------


def test_routes_that_are_not_there_are_problems_too() -> None:
    client = Parts().client()
    missing, wrong = client.get("/v1/nothing"), client.put("/v1/jobs")
    assert (missing.status_code, missing.json()["code"]) == (404, "not_found")
    assert (wrong.status_code, wrong.json()["code"]) == (405, "method_not_allowed")
    assert "POST" in wrong.headers["allow"]


def test_what_nobody_foresaw_is_a_500_that_tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    # Given a defect
    class Defect(MemoryQueue):
        def get(self, tenant: str, job_id: str) -> Any:
            msg = f"internal detail {tenant}"
            raise ZeroDivisionError(msg)

    client: TestClient = Parts(queue=Defect()).client(raise_server_exceptions=False)
    # If it is met
    with caplog.at_level(logging.ERROR, "api.problems"):
        answer = client.get("/v1/jobs/" + "0" * 32)
    # Expect an incident that leads to the log, where the traceback is
    problem = answer.json()
    assert (answer.status_code, problem["code"]) == (500, "internal")
    assert answer.headers["content-type"] == "application/problem+json"
    assert "internal detail" not in answer.text
    (record,) = caplog.records
    assert problem["incident"] in record.getMessage()
    assert record.exc_info is not None


def test_every_operation_documents_its_problems() -> None:
    schema = Parts().client().get("/openapi.json").json()
    operations = [op for path in schema["paths"].values() for op in path.values()]
    errors = [answer for op in operations for status, answer in op["responses"].items() if int(status) >= 400]
    assert len(errors) > 20
    assert all(list(answer["content"]) == ["application/problem+json"] for answer in errors)
    assert set(schema["components"]["schemas"]["Problem"]["required"]) >= {"type", "title", "status", "detail", "code"}
    assert "HTTPValidationError" not in schema["components"]["schemas"]
