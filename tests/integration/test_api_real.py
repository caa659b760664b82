"""The API on a real Valkey: the whole process, and what it answers while Redis hangs or is gone."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
from fastapi.testclient import TestClient

from api.access import Access
from api.context import Context
from api.main import running_context
from cli.embedded import EmbeddedValkey, free_port, running_valkey
from core.catalogue.redis import RedisCatalogue
from core.job import JobState
from core.queue.redis import RedisQueue
from core.settings import Settings
from tests.integration.api_parts import SHAPES, Parts, safetensors

BOUND_S = 2.0
"""Within this, a broken Redis is a 503."""

CALLS = [
    ("POST", "/v1/jobs", {"prompt": "x", "model": "shapes"}),
    ("POST", "/v1/jobs", {"prompt": "x"}),
    ("GET", "/v1/jobs/" + "0" * 32, None),
    ("DELETE", "/v1/jobs/" + "0" * 32, None),
    ("GET", "/v1/loras", None),
    ("GET", "/v1/loras/ink", None),
    ("GET", "/v1/models", None),
    ("GET", "/readyz", None),
]


def expect_503_in_time(client: TestClient) -> None:
    for method, path, body in CALLS:
        began = time.monotonic()
        answer = client.request(method, path, json=body)
        took_s = time.monotonic() - began
        assert (answer.status_code, answer.json()["code"]) == (503, "queue_unavailable"), (method, path, answer.text)
        assert took_s < BOUND_S, (method, path)
        assert int(answer.headers["retry-after"]) > 0
    assert client.get("/healthz").status_code == 200
    assert "fuseline_queue_up 0.0" in client.get("/metrics").text


@contextmanager
def api_on(url: str) -> Iterator[TestClient]:
    """Serve from a Redis that need not be there."""
    queue = RedisQueue(url)
    parts = Parts(queue=queue, catalogue=RedisCatalogue(queue.client))
    parts.metrics.watch_queue(queue.stats)
    with ExitStack() as stack:
        stack.callback(queue.client.close)
        yield parts.client()


def test_a_redis_that_accepts_and_never_answers_is_a_503() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        port = listener.getsockname()[1]
        with api_on(f"redis://127.0.0.1:{port}/0") as client:
            expect_503_in_time(client)


def test_a_redis_that_is_not_there_is_a_503() -> None:
    with api_on(f"redis://127.0.0.1:{free_port()}/0") as client:
        expect_503_in_time(client)


@pytest.fixture
def own_valkey(tmp_path: Path) -> Iterator[EmbeddedValkey]:
    with running_valkey(tmp_path / "valkey") as server:
        yield server


@pytest.fixture
def context(own_valkey: EmbeddedValkey, tmp_path: Path) -> Iterator[Context]:
    settings = Settings(redis_url=own_valkey.url, store_url=f"file://{tmp_path}/store")
    with running_context(settings, Access(), "http://testserver") as context:
        context.catalogue.add_model(SHAPES)
        yield context


def test_a_submit_waits_in_redis_with_its_ticket(context: Context) -> None:
    # Given an API on real parts, and a LoRA in its store
    client = Parts.client_of(context)
    context.store.put_bytes("tenants/default/ink.safetensors", safetensors(), "")
    registered = client.post("/v1/loras", json={"name": "墨 ink", "key": "tenants/default/ink.safetensors"})
    assert registered.status_code == 201
    # If a job is submitted, twice with one key
    body = {"prompt": "x <lora:墨 ink:0.5>", "metadata": {"order": "7"}}
    first, second = (client.post("/v1/jobs", json=body, headers={"Idempotency-Key": "k"}) for _ in range(2))
    # Expect one job with everything in it, one ticket, and the counts of both
    assert first.status_code == second.status_code == 202
    assert first.json() == second.json()
    assert client.post("/v1/jobs", json={"prompt": "y"}, headers={"Idempotency-Key": "k"}).status_code == 422
    view = client.get(first.headers["location"]).json()
    assert (view["state"], view["queue_position"]) == ("queued", 0)
    assert view["request"] == first.json()["request"]
    scrape = client.get("/metrics").text
    assert 'fuseline_queue_jobs{pool="default",state="queued"} 1.0' in scrape
    assert 'fuseline_queue_tickets{pool="default"} 1.0' in scrape
    assert 'fuseline_submitted_total{pool="default"} 1.0' in scrape
    assert 'fuseline_submit_rejected_total{reason="idempotency_conflict"} 1.0' in scrape
    # If it is cancelled
    cancelled = client.delete(first.headers["location"])
    # Expect it to be over
    assert (cancelled.status_code, cancelled.json()["state"]) == (200, JobState.CANCELLED)


def test_a_redis_that_freezes_is_a_503_and_a_thaw_is_forgiven(context: Context, own_valkey: EmbeddedValkey) -> None:
    # Given an API with live connections
    client = Parts.client_of(context)
    assert client.post("/v1/jobs", json={"prompt": "x"}).status_code == 202
    assert own_valkey.process is not None
    # If the server stops answering
    own_valkey.process.send_signal(signal.SIGSTOP)
    try:
        expect_503_in_time(client)
    finally:
        own_valkey.process.send_signal(signal.SIGCONT)
    # Expect service as soon as it goes on
    assert client.post("/v1/jobs", json={"prompt": "x"}).status_code == 202


def test_a_redis_that_was_restarted_is_found_again_at_once(context: Context, own_valkey: EmbeddedValkey) -> None:
    # Given an API with live connections, and a job
    client = Parts.client_of(context)
    location = client.post("/v1/jobs", json={"prompt": "x"}).headers["location"]
    # If the server dies
    own_valkey.stop(signal.SIGKILL)
    expect_503_in_time(client)
    # Expect, once it is back, the job, and no call that fails for an old connection
    own_valkey.start()
    assert client.get(location).json()["state"] == "queued"
    assert client.post("/v1/jobs", json={"prompt": "x"}).status_code == 202


# --- the process ------------------------------------------------------------------------------------------------


def run_api(tmp_path: Path, **settings: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FUSELINE_")}
    environment |= {f"FUSELINE_{name.upper()}": value for name, value in settings.items()}
    environment.setdefault("FUSELINE_STORE_URL", f"file://{tmp_path}/store")
    return subprocess.Popen(
        [sys.executable, "-m", "api.main"], env=environment, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )


def url_of(process: subprocess.Popen[str]) -> str:
    """Wait for the line that says where it listens."""
    assert process.stderr is not None
    for line in process.stderr:
        _, found, url = line.partition("listens on ")
        if found:
            return url.strip()
    pytest.fail("the API ended without listening")


def test_the_process_serves_and_leaves_on_sigterm(redis_url: str, tmp_path: Path) -> None:
    # Given the process on a free port
    with run_api(tmp_path, redis_url=redis_url, api_port="0", api_tokens="ann=ann-secret-token") as process:
        try:
            url = url_of(process)
            # Expect it to be ready, and guarded
            assert httpx.get(f"{url}/readyz").json() == {"status": "ok"}
            assert httpx.get(f"{url}/v1/models").status_code == 401
            token = {"Authorization": "Bearer ann-secret-token"}
            assert httpx.get(f"{url}/v1/models", headers=token).json() == {"models": []}
            # and to refuse a large body over a real socket, declared or not
            for content in (b"x" * 2_000_000, (b"x" * 65_536 for _ in range(40))):
                answer = httpx.post(f"{url}/v1/jobs", content=content, headers=token | {"Content-Type": "text/json"})
                assert (answer.status_code, answer.json()["code"]) == (413, "request_too_large")
            # If it is told to end
            process.send_signal(signal.SIGTERM)
            # Expect it to leave in order
            assert process.wait(15) == 0
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"api_host": "0.0.0.0"}, "set FUSELINE_API_TOKENS"),
        ({"api_host": "example.org"}, "set FUSELINE_API_TOKENS"),
        ({"api_tokens": "ann"}, "api_tokens, entry 1"),
        ({"api_tokens": "public=some-secret-token"}, "api_tokens, entry 1"),
        ({"redis_url": "redis://user:hunter2@127.0.0.1:1/0"}, "Redis does not serve"),
        ({"store_url": "ftp://x"}, "names no store"),
        ({"max_steps": "0"}, "max_steps"),
    ],
)
def test_the_process_says_why_it_does_not_start(
    redis_url: str, tmp_path: Path, settings: dict[str, str], sentence: str
) -> None:
    with run_api(tmp_path, **({"redis_url": redis_url, "api_port": "0"} | settings)) as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert sentence in errors
    assert "Traceback" not in errors
    assert "hunter2" not in errors


def test_a_redis_that_may_evict_is_refused(own_valkey: EmbeddedValkey, tmp_path: Path) -> None:
    # Given
    with ExitStack() as stack:
        client = RedisQueue(own_valkey.url).client
        stack.callback(client.close)
        client.config_set("maxmemory-policy", "allkeys-lru")
    # If
    with run_api(tmp_path, redis_url=own_valkey.url, api_port="0") as process:
        _, errors = process.communicate(timeout=60)
    # Expect
    assert process.returncode == 1
    assert "noeviction" in errors
    # If the operator insists
    with run_api(tmp_path, redis_url=own_valkey.url, api_port="0", require_durable_redis="false") as process:
        try:
            assert httpx.get(f"{url_of(process)}/healthz").status_code == 200
        finally:
            process.terminate()
            assert process.wait(15) == 0
