"""Submit, look, cancel: over HTTP, on in-memory twins."""

import json
import time
from datetime import UTC, datetime
from typing import Any

import pytest
from fastapi.testclient import TestClient

from api.access import Access
from api.context import Limits
from core.errors import QueueUnavailable
from core.events import SubmitRejected
from core.job import JobError
from core.queue.memory import MemoryQueue
from tests.integration.api_parts import ANN, BOB, CHALK, INK, SHAPES, TOKENS, Parts, chunks, with_catalogue


@pytest.fixture
def parts() -> Parts:
    return with_catalogue(Parts())


@pytest.fixture
def client(parts: Parts) -> TestClient:
    return parts.client()


def submit(client: TestClient, **body: Any) -> dict[str, Any]:
    answer = client.post("/v1/jobs", json={"prompt": "a red circle"} | body)
    assert answer.status_code == 202, answer.text
    accepted: dict[str, Any] = answer.json()
    return accepted


# --- what a submit means ----------------------------------------------------------------------------------------


def test_a_submit_is_taken_resolved_and_told_to_the_workers(client: TestClient, parts: Parts) -> None:
    # If only a prompt is sent
    answer = client.post("/v1/jobs", json={"prompt": "a red circle"})
    # Expect a 202 that says where the job is and what its defaults became
    accepted = answer.json()
    assert answer.status_code == 202
    assert answer.headers["location"] == f"/v1/jobs/{accepted['id']}"
    assert accepted["state"] == "queued"
    defaults = {"width": 64, "height": 64, "steps": 12, "guidance": 3.0, "sampler": "DPM++ 2M", "images": 1}
    model = {"model": "shapes", "model_digest": SHAPES.digest}
    texts = {"prompt": "a red circle", "negative_prompt": "", "metadata": {}}
    choices = {"loras": [], "seed": 1234, "format": "png", "on_lora_error": "fail"}
    assert accepted["request"] == defaults | model | texts | choices
    # and one job in the queue, one ticket for its pool
    assert parts.queued == 1
    assert parts.tickets.pools == ["default"]
    assert parts.queue.get("default", accepted["id"]).spec.seed == 1234


def test_what_is_given_is_kept(client: TestClient, parts: Parts) -> None:
    numbers = {"width": 128, "height": 96, "steps": 1, "guidance": 0, "seed": 0, "images": 16}
    texts = {"prompt": "p\tq\nr 🎨 مرحبا", "negative_prompt": "blur", "model": "shapes", "metadata": {"order": "7"}}
    asked = numbers | texts | {"sampler": "euler A", "format": "png", "on_lora_error": "continue"}
    accepted = submit(client, **asked, priority=-10)
    expected = asked | {"model_digest": SHAPES.digest, "loras": [], "sampler": "Euler a"}
    assert accepted["request"] == expected
    job = parts.queue.get("default", accepted["id"])
    assert job.priority == -10
    assert job.spec.to_json() == job.spec.from_json(job.spec.to_json()).to_json()


@pytest.mark.parametrize(
    ("prompt", "loras", "expected"),
    [
        ("x <lora:ink>", [], [("ink", 0.7, 0.7)]),
        ("x <lora:ink:0.5>", [], [("ink", 0.5, 0.5)]),
        ("x <lora:ink:0.5:0.8>", [], [("ink", 0.8, 0.5)]),
        ("x <lora:ink:te=0.2>", [], [("ink", 0.7, 0.2)]),
        ("x", [{"name": "ink"}], [("ink", 0.7, 0.7)]),
        ("x", [{"name": "ink", "scale": -1}], [("ink", -1, -1)]),
        ("x", [{"name": "ink", "unet": 0.4}], [("ink", 0.4, 0.7)]),
        ("x <lora:ink:1>", [{"name": "ink", "scale": 0.5}], [("ink", 1.5, 1.5)]),
        ("x <lora:ink:1>", [{"name": "ink", "scale": -1}], []),
        ("x <lora:chalk:1> <lora:ink:2>", [], [("ink", 2, 2), ("chalk", 1, 1)]),
        ("x", [{"name": "ink", "scale": 0}], []),
    ],
)
def test_tags_and_loras_become_one_set(
    client: TestClient, parts: Parts, prompt: str, loras: list[Any], expected: list[tuple[str, float, float]]
) -> None:
    accepted = submit(client, prompt=prompt, loras=loras)
    assert [(lora["name"], lora["unet"], lora["te"]) for lora in accepted["request"]["loras"]] == expected
    assert accepted["request"]["prompt"] == "x"
    refs = parts.queue.get("default", accepted["id"]).spec.loras
    assert {ref.digest for ref in refs} <= {INK, CHALK}
    assert all(ref.key and ref.size_bytes == 9 for ref in refs)


def test_equal_requests_share_a_group_however_they_are_written(client: TestClient, parts: Parts) -> None:
    one = submit(client, prompt="a <lora:ink:0.5> <lora:chalk:1>")
    two = submit(client, prompt="b", loras=[{"name": "chalk", "scale": 1}, {"name": "ink", "unet": 0.5, "te": 0.5}])
    groups = {parts.queue.get("default", job["id"]).group for job in (one, two)}
    assert len(groups) == 1


# --- bad input --------------------------------------------------------------------------------------------------

BAD: list[tuple[str, dict[str, Any], int, str, str]] = [
    # what, changes to a good body, status, code, field
    ("unknown LoRA in a tag", {"prompt": "x <lora:nope:1>"}, 404, "unknown_lora", ""),
    ("unknown LoRA", {"loras": [{"name": "nope"}]}, 404, "unknown_lora", ""),
    ("another tenant's LoRA", {"loras": [{"name": "水彩"}]}, 404, "unknown_lora", ""),
    ("unknown model", {"model": "nope"}, 404, "unknown_model", ""),
    ("size 0", {"width": 0}, 422, "invalid_request", "width"),
    ("size 100,000", {"width": 100_000, "height": 100_000}, 422, "invalid_request", "width"),
    ("an odd size", {"height": 65}, 422, "invalid_request", "height"),
    ("too many pixels", {"width": 512, "height": 512}, 422, "invalid_request", "width"),
    ("a size that is text", {"width": "64"}, 422, "invalid_request", "width"),
    ("10,000 steps", {"steps": 10_000}, 422, "invalid_request", "steps"),
    ("0 steps", {"steps": 0}, 422, "invalid_request", "steps"),
    ("true steps", {"steps": True}, 422, "invalid_request", "steps"),
    ("0 images", {"images": 0}, 422, "invalid_request", "images"),
    ("17 images", {"images": 17}, 422, "invalid_request", "images"),
    ("guidance below", {"guidance": -0.1}, 422, "invalid_request", "guidance"),
    ("guidance above", {"guidance": 50.1}, 422, "invalid_request", "guidance"),
    ("seed too large", {"seed": 2**64}, 422, "invalid_request", "seed"),
    ("seed -2", {"seed": -2}, 422, "invalid_request", "seed"),
    ("priority", {"priority": 11}, 422, "invalid_request", "priority"),
    ("unknown format", {"format": "gif"}, 422, "invalid_request", "format"),
    ("unknown sampler", {"sampler": "magic"}, 422, "invalid_request", "sampler"),
    ("a field that is not known", {"cfg_scale": 7}, 422, "invalid_request", "cfg_scale"),
    ("a long prompt", {"prompt": "x" * 8_001}, 422, "invalid_request", "prompt"),
    ("a long negative prompt", {"negative_prompt": "x" * 8_001}, 422, "invalid_request", "negative_prompt"),
    ("NUL in the prompt", {"prompt": "a\x00b"}, 422, "invalid_request", "prompt"),
    ("ESC in the prompt", {"prompt": "a\x1b[31m"}, 422, "invalid_request", "prompt"),
    ("C1 control in the negative prompt", {"negative_prompt": "a\x85"}, 422, "invalid_request", "negative_prompt"),
    ("no prompt", {"prompt": None}, 422, "invalid_request", "prompt"),
    ("a path as LoRA name", {"loras": [{"name": "../../etc/passwd"}]}, 422, "invalid_request", "loras.0.name"),
    ("a path in a tag", {"prompt": "x <lora:../../etc/passwd:1>"}, 422, "invalid_request", ""),
    ("control characters in a name", {"loras": [{"name": "a\nb"}]}, 422, "invalid_request", "loras.0.name"),
    ("an emoji in a tag's name", {"prompt": "x <lora:😀:1>"}, 422, "invalid_request", ""),
    ("a tag without name", {"prompt": "x <lora::1>"}, 422, "invalid_prompt_tag", ""),
    ("a tag without end", {"prompt": "x <lora:ink:1"}, 422, "invalid_prompt_tag", ""),
    ("a tag in the negative prompt", {"negative_prompt": "x <lora:ink:1>"}, 422, "invalid_prompt_tag", ""),
    ("a tag without end there", {"negative_prompt": "x <Lora:ink"}, 422, "invalid_prompt_tag", ""),
    ("a tag with NaN", {"prompt": "x <lora:ink:nan>"}, 422, "invalid_prompt_tag", ""),
    ("a tag with a huge scale", {"prompt": "x <lora:ink:1e9>"}, 422, "invalid_request", ""),
    ("a huge scale", {"loras": [{"name": "ink", "scale": 1e9}]}, 422, "invalid_request", "loras.0.scale"),
    ("scales that sum to too much", {"loras": [{"name": "ink", "scale": 99}] * 2}, 422, "invalid_request", ""),
    ("scale and unet", {"loras": [{"name": "ink", "scale": 1, "unet": 1}]}, 422, "invalid_request", "loras.0"),
    ("17 LoRAs", {"loras": [{"name": "ink"}] * 17}, 422, "invalid_request", "loras"),
    ("17 tags", {"prompt": "<lora:ink:1>" * 17}, 422, "invalid_request", "loras"),
    ("17 labels", {"metadata": {str(n): "" for n in range(17)}}, 422, "invalid_request", "metadata"),
    ("a label that is no text", {"metadata": {"a": 1}}, 422, "invalid_request", "metadata.a"),
    ("a long label", {"metadata": {"a": "x" * 513}}, 422, "invalid_request", "metadata.a"),
]


@pytest.mark.parametrize(("body", "status", "code", "field"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_input_is_named_and_nothing_is_queued(
    parts: Parts, body: dict[str, Any], status: int, code: str, field: str
) -> None:
    client = parts.client()
    answer = client.post("/v1/jobs", json={"prompt": "a red circle"} | body)
    problem = answer.json()
    assert (answer.status_code, problem["code"]) == (status, code), problem
    assert answer.headers["content-type"] == "application/problem+json"
    assert problem["type"] == f"urn:fuseline:problem:{code}"
    assert problem["status"] == status
    assert problem["instance"] == "/v1/jobs"
    assert problem["retryable"] is False
    assert problem["title"]
    assert problem["detail"]
    assert [error["field"] for error in problem.get("errors", [])][:1] == ([field] if field else [])
    assert parts.queued == 0
    assert parts.tickets.pools == []
    assert parts.events == [SubmitRejected(code)]


RAW: list[tuple[str, bytes, int, str]] = [
    ("no JSON", b"{", 422, "invalid_request"),
    ("an empty body", b"", 422, "invalid_request"),
    ("a list", b"[]", 422, "invalid_request"),
    ("not UTF-8", b'{"prompt": "\xff"}', 400, "invalid_request"),
    ("NaN guidance", b'{"prompt": "x", "guidance": NaN}', 422, "invalid_request"),
    ("infinite guidance", b'{"prompt": "x", "guidance": 1e999}', 422, "invalid_request"),
    ("half a surrogate pair", b'{"prompt": "\\ud800"}', 422, "invalid_request"),
    ("half a surrogate pair as a field", b'{"prompt": "x", "\\ud800": 1}', 422, "invalid_request"),
    ("half a surrogate pair as a model", b'{"prompt": "x", "model": "\\ud800"}', 422, "invalid_request"),
    ("half a surrogate pair as a label", b'{"prompt": "x", "metadata": {"\\ud800": ""}}', 422, "invalid_request"),
    ("half a surrogate pair as a sampler", b'{"prompt": "x", "sampler": "\\ud800"}', 422, "invalid_request"),
    ("half a surrogate pair as a LoRA", b'{"prompt": "x", "loras": [{"name": "\\ud800"}]}', 422, "invalid_request"),
    ("a number of 9,000 digits", b'{"prompt": "x", "seed": ' + b"9" * 9_000 + b"}", 400, "invalid_request"),
    ("a nesting bomb of lists", b"[" * 100_000, 400, "invalid_request"),
    ("a nesting bomb of objects", b'{"prompt":' * 20_000, 400, "invalid_request"),
    ("a deep value", b'{"prompt": "x", "metadata": ' + b"[" * 900 + b"]" * 900 + b"}", 422, "invalid_request"),
    ("a 1 MB prompt", b'{"prompt": "' + b"x" * 1_000_000 + b'"}', 413, "request_too_large"),
    ("60,000 LoRAs that are none", b'{"prompt": "x", "loras": [' + b"0," * 60_000 + b"0]}", 422, "invalid_request"),
    ("20,000 unknown fields", json.dumps({str(n): 0 for n in range(20_000)}).encode(), 422, "invalid_request"),
    ("tags without end", b'{"prompt": "' + b"<lora:" * 40_000 + b'"}', 422, "invalid_request"),
]


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(("body", "status", "code"), [row[1:] for row in RAW], ids=[row[0] for row in RAW])
def test_hostile_bodies_are_refused_at_once(parts: Parts, body: bytes, status: int, code: str, streamed: bool) -> None:
    client = parts.client()
    began = time.perf_counter()
    answer = client.post(
        "/v1/jobs", content=chunks(body) if streamed else body, headers={"Content-Type": "application/json"}
    )
    assert time.perf_counter() - began < 2
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert len(answer.content) < 4_000
    assert parts.queued == 0


def test_a_number_of_bad_fields_is_told_at_once(client: TestClient) -> None:
    problem = client.post("/v1/jobs", json={"prompt": "x", "steps": 501, "images": 17}).json()
    assert [error["field"] for error in problem["errors"]] == ["steps", "images"]
    assert "at most 500" in problem["detail"]


def test_an_unknown_sampler_is_told_the_known_ones(client: TestClient) -> None:
    problem = client.post("/v1/jobs", json={"prompt": "x", "sampler": "magic"}).json()
    assert "DPM++ 2M" in problem["detail"]


def test_without_a_model_name_there_must_be_exactly_one() -> None:
    # Given no model, then two
    parts = Parts()
    for names in ("none", "other, shapes"):
        # Expect the names to choose from
        answer = parts.client().post("/v1/jobs", json={"prompt": "x"})
        assert answer.status_code == 422
        assert names in answer.json()["detail"]
        parts.catalogue.add_model(SHAPES)
        parts.catalogue.add_model(SHAPES.model_copy(update={"name": "other"}))


def test_a_full_queue_says_when_to_come_again() -> None:
    # Given a tenant that may have one job
    parts = with_catalogue(Parts(queue=MemoryQueue(max_queued_per_tenant=1)))
    client = parts.client()
    submit(client)
    # If it submits another
    answer = client.post("/v1/jobs", json={"prompt": "x"})
    # Expect
    assert (answer.status_code, answer.json()["code"]) == (429, "queue_full")
    assert int(answer.headers["retry-after"]) > 0
    assert answer.json()["retryable"] is True


def test_limits_are_settings() -> None:
    parts = with_catalogue(Parts(limits=Limits(max_steps=5, max_images=1, max_loras=0, max_prompt_chars=3)))
    client = parts.client()
    for body in ({"steps": 6}, {"images": 2}, {"loras": [{"name": "ink"}]}, {"prompt": "1234"}):
        assert client.post("/v1/jobs", json={"prompt": "x"} | body).status_code == 422
    assert client.post("/v1/jobs", json={"prompt": "123", "steps": 5}).status_code == 202


# --- idempotency ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("again", ["k-1", '"k-1"'])
def test_the_same_key_and_body_is_the_same_job(client: TestClient, parts: Parts, again: str) -> None:
    # Given a submit with a key, whose seed was drawn
    first = client.post("/v1/jobs", json={"prompt": "x", "seed": -1}, headers={"Idempotency-Key": "k-1"})
    # If it comes again, written in another order, also after the job ran
    parts.draw(first.json()["id"])
    second = client.post("/v1/jobs", content='{"seed": -1,  "prompt": "x"}', headers=JSON | {"Idempotency-Key": again})
    # Expect the same answer and no second job
    assert (first.status_code, second.status_code) == (202, 202)
    assert second.json() == first.json()
    assert second.headers["location"] == first.headers["location"]
    assert second.headers["idempotency-replayed"] == "true"
    assert parts.queued == 0


JSON = {"Content-Type": "application/json"}


def test_the_same_key_with_another_body_is_refused(client: TestClient, parts: Parts) -> None:
    client.post("/v1/jobs", json={"prompt": "x"}, headers={"Idempotency-Key": "k"})
    answer = client.post("/v1/jobs", json={"prompt": "y"}, headers={"Idempotency-Key": "k"})
    assert (answer.status_code, answer.json()["code"]) == (422, "idempotency_conflict")
    assert parts.queued == 1


def test_keys_belong_to_their_tenants() -> None:
    parts = with_catalogue(Parts(access=Access.parse(TOKENS)))
    client = parts.client()
    ids = {
        client.post("/v1/jobs", json={"prompt": name}, headers=who | {"Idempotency-Key": "k"}).json()["id"]
        for name, who in (("x", ANN), ("y", BOB))
    }
    assert len(ids) == 2


@pytest.mark.parametrize("key", ["", '"', '""', '"open', '"a"b"', "é", "x" * 256])
def test_an_unreadable_key_is_refused(client: TestClient, parts: Parts, key: str) -> None:
    answer = client.post("/v1/jobs", json={"prompt": "x"}, headers=[(b"Idempotency-Key", key.encode("latin-1"))])
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == "Idempotency-Key"
    assert parts.queued == 0


# --- look -------------------------------------------------------------------------------------------------------


def test_a_waiting_job_tells_its_place(client: TestClient) -> None:
    ids = [submit(client)["id"] for _ in range(3)]
    views = [client.get(f"/v1/jobs/{job_id}").json() for job_id in ids]
    assert [view["queue_position"] for view in views] == [0, 1, 2]
    assert views[0]["state"] == "queued"
    assert views[0]["started"] is views[0]["result"] is views[0]["error"] is None
    assert abs(datetime.fromisoformat(views[0]["created"]).timestamp() - time.time()) < 60


def test_a_running_job_tells_its_progress(client: TestClient, parts: Parts) -> None:
    job_id = submit(client)["id"]
    _, lease = parts.take(job_id)
    parts.queue.heartbeat(lease.fence, lease_s=60, progress={job_id: 0.25})
    view = client.get(f"/v1/jobs/{job_id}").json()
    assert (view["state"], view["progress"], view["queue_position"]) == ("running", 0.25, None)
    assert view["attempt"] == 1
    assert view["waited_s"] >= 0
    assert view["ran_s"] is None
    assert lease.fence not in json.dumps(view)


def test_a_finished_job_tells_what_became_of_it(client: TestClient, parts: Parts) -> None:
    # Given
    job_id = submit(client, loras=[{"name": "ink", "scale": 1}], metadata={"order": "7"})["id"]
    parts.draw(job_id)
    # If
    answer = client.get(f"/v1/jobs/{job_id}")
    view = answer.json()
    # Expect
    assert answer.status_code == 200
    assert (view["state"], view["progress"]) == ("succeeded", 1.0)
    assert view["request"]["metadata"] == {"order": "7"}
    assert view["result"]["loras"][0]["keys_matched"] == 8
    assert view["result"]["stage_s"] == {"sample": 0.5}
    assert view["ran_s"] >= 0
    (image,) = view["images"]
    assert (image["seed"], image["size_bytes"], image["sha256"]) == (1234, 3, "c" * 64)
    assert image["url"].startswith("memory:///results/")
    assert datetime.fromisoformat(image["url_expires"]) > datetime.now(UTC)


def test_a_failed_job_tells_why(client: TestClient, parts: Parts) -> None:
    job_id = submit(client)["id"]
    _, lease = parts.take(job_id)
    error = JobError(code="lora_shape_mismatch", message="no fit", blame="client")
    parts.queue.fail(lease.fence, job_id, error, retry_in_s=None)
    view = client.get(f"/v1/jobs/{job_id}").json()
    assert view["state"] == "failed"
    assert view["error"] == {"code": "lora_shape_mismatch", "message": "no fit", "retryable": False, "blame": "client"}


def test_a_delayed_job_tells_when_it_is_tried_again(client: TestClient, parts: Parts) -> None:
    job_id = submit(client)["id"]
    _, lease = parts.take(job_id)
    parts.queue.fail(lease.fence, job_id, JobError(code="store_unavailable", message="500"), retry_in_s=60)
    view = client.get(f"/v1/jobs/{job_id}").json()
    assert view["state"] == "delayed"
    assert datetime.fromisoformat(view["retry_at"]) > datetime.now(UTC)


# --- cancel -----------------------------------------------------------------------------------------------------


def test_cancelling_a_waiting_job_ends_it(client: TestClient, parts: Parts) -> None:
    job_id = submit(client)["id"]
    answer = client.delete(f"/v1/jobs/{job_id}")
    assert (answer.status_code, answer.json()["state"]) == (200, "cancelled")
    assert parts.queued == 0


def test_cancelling_a_running_job_asks_its_worker(client: TestClient, parts: Parts) -> None:
    job_id = submit(client)["id"]
    _, lease = parts.take(job_id)
    answer = client.delete(f"/v1/jobs/{job_id}")
    assert (answer.status_code, answer.json()["cancel_requested"]) == (202, True)
    assert parts.queue.heartbeat(lease.fence, lease_s=60, progress={}) == {job_id}


def test_cancelling_a_finished_job_changes_nothing(client: TestClient, parts: Parts) -> None:
    job_id = submit(client)["id"]
    parts.draw(job_id)
    answer = client.delete(f"/v1/jobs/{job_id}")
    assert (answer.status_code, answer.json()["state"]) == (200, "succeeded")


# --- tenants ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_a_foreign_job_is_no_job(method: str) -> None:
    # Given ann's job
    parts = with_catalogue(Parts(access=Access.parse(TOKENS)))
    client = parts.client()
    job_id = client.post("/v1/jobs", json={"prompt": "x"}, headers=ANN).json()["id"]
    # If bob asks for it, and for one that never was
    foreign = client.request(method, f"/v1/jobs/{job_id}", headers=BOB)
    absent = client.request(method, f"/v1/jobs/{'0' * 32}", headers=BOB)
    # Expect no difference but the id that he sent
    assert foreign.status_code == absent.status_code == 404
    assert foreign.json()["code"] == "job_not_found"
    assert foreign.text.replace(job_id, "0" * 32) == absent.text
    assert client.get(f"/v1/jobs/{job_id}", headers=ANN).json()["state"] == "queued"


@pytest.mark.parametrize("job_id", ["x", "*", "a" * 33, "%00", "A" * 32, "..%2f..", "0" * 4000])
def test_what_is_no_id_is_no_job(client: TestClient, job_id: str) -> None:
    answer = client.get(f"/v1/jobs/{job_id}")
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"


def test_a_queue_that_fails_is_a_503_without_details(parts: Parts) -> None:
    # Given a queue whose error names its server
    class Broken(MemoryQueue):
        def submit(self, job: object) -> Any:
            msg = "redis://user:hunter2@10.0.0.1 is gone"
            raise QueueUnavailable(msg)

    parts.queue = Broken()
    # If
    answer = parts.client().post("/v1/jobs", json={"prompt": "x"})
    # Expect
    assert (answer.status_code, answer.json()["code"]) == (503, "queue_unavailable")
    assert int(answer.headers["retry-after"]) > 0
    assert "hunter2" not in answer.text
    assert answer.json()["incident"]
    assert parts.events == [SubmitRejected("queue_unavailable")]
