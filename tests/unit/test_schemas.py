"""Shapes of requests and answers, the table of statuses, and who a token names."""

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from api.access import OPEN_TENANT, Access
from api.problems import STATUS, status_of
from api.schemas import RegisterRequest, SubmitRequest
from api.views import JobView, ResultView
from core.errors import FuselineError, Unauthorized
from core.job import Job, JobError, JobResult, JobSpec, JobState
from core.lora import LoraSet
from core.queue.rules import WORKER_LOST

SPEC = JobSpec(
    model="m", model_digest="d", prompt="p", negative_prompt="", loras=LoraSet(), width=64, height=64, steps=2,
    guidance=1.0, sampler="DDIM", seed=1, images=1,
)  # fmt: skip


def job(**changes: Any) -> Job:
    fields: dict[str, Any] = {
        "id": "i",
        "tenant": "t",
        "pool": "p",
        "group": "g",
        "spec": SPEC,
        "state": JobState.QUEUED,
    }
    return Job(**fields | changes)


def view(**changes: Any) -> JobView:
    return JobView.of(job(**changes), position=None, images=[])


def errors(kind: type[FuselineError] = FuselineError) -> Iterator[type[FuselineError]]:
    for sub in kind.__subclasses__():
        if sub.__module__ == "core.errors":
            yield sub
            yield from errors(sub)


# --- requests ---------------------------------------------------------------------------------------------------


def test_the_hash_of_a_body_is_what_was_asked_not_how_it_was_written() -> None:
    one = SubmitRequest.model_validate({"prompt": "x", "steps": 3, "metadata": {"a": "1", "b": "2"}})
    two = SubmitRequest.model_validate({"metadata": {"b": "2", "a": "1"}, "steps": 3, "prompt": "x"})
    assert one.body_hash() == two.body_hash()


@pytest.mark.parametrize(
    "change", [{"prompt": "y"}, {"steps": 4}, {"seed": 5}, {"metadata": {"a": "1"}}, {"loras": []}]
)
def test_the_hash_of_a_body_changes_with_what_was_asked(change: dict[str, Any]) -> None:
    body = {"prompt": "x", "steps": 3}
    changed = SubmitRequest.model_validate(body | change)
    assert changed.body_hash() != SubmitRequest.model_validate(body).body_hash()


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc"])))
def test_any_script_may_be_asked_for(prompt: str) -> None:
    assert SubmitRequest(prompt=prompt).prompt == prompt


@given(st.text(), st.sampled_from([*map(chr, range(9)), "\x0b", "\r", "\x1b", "\x7f", "\x9f", "\ud800"]), st.text())
def test_no_control_character_may(before: str, control: str, after: str) -> None:
    with pytest.raises(ValidationError):
        SubmitRequest(prompt=before + control + after)


MANY = 20_000


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (SubmitRequest, {"prompt": "x", "loras": [0] * MANY}),
        (SubmitRequest, {"prompt": "x", "loras": [dict.fromkeys(map(str, range(60)), 0)] * 60}),
        (SubmitRequest, {"prompt": "x", "loras": [dict.fromkeys(map(str, range(MANY)), 0)]}),
        (SubmitRequest, {"prompt": "x", "metadata": dict.fromkeys(map(str, range(MANY)), 0)}),
        (SubmitRequest, {"prompt": "x"} | dict.fromkeys(map(str, range(MANY)), 0)),
        (RegisterRequest, {"name": "x", "key": "y", "trigger_words": [0] * MANY}),
        (RegisterRequest, {"name": "x", "key": "y"} | dict.fromkeys(map(str, range(MANY)), 0)),
    ],
    ids=["loras", "fields of loras", "fields of a lora", "labels", "fields", "trigger words", "fields to register"],
)
def test_a_body_with_many_faults_is_refused_for_a_few(kind: type[BaseModel], body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    assert caught.value.error_count() <= 64


# --- answers ----------------------------------------------------------------------------------------------------


def test_times_are_null_until_they_come() -> None:
    shown = view(created_ms=1_000)
    assert shown.model_dump(mode="json")["created"] == "1970-01-01T00:00:01Z"
    assert (shown.ready, shown.started, shown.finished, shown.waited_s, shown.ran_s) == (None,) * 5


def test_seconds_are_differences_of_times() -> None:
    shown = view(created_ms=1_000, ready_ms=2_000, started_ms=3_500, finished_ms=7_750)
    assert (shown.waited_s, shown.ran_s) == (1.5, 4.25)


def test_a_clock_that_went_back_gives_no_negative_wait() -> None:
    assert view(created_ms=1_000, ready_ms=3_000, started_ms=2_000).waited_s == 0


def test_a_retry_is_told_only_while_it_is_waited_for() -> None:
    assert view(due_ms=5_000, state=JobState.DELAYED).retry_at is not None
    assert view(due_ms=5_000, state=JobState.RUNNING).retry_at is None


def test_a_lease_token_and_a_worker_are_never_shown_but_batches_can_be_told_apart() -> None:
    one, same, other = (ResultView.of(JobResult(batch=f, worker="gpu-host-7")) for f in ("1-aa", "1-aa", "2-bb"))
    assert one.batch == same.batch != other.batch
    assert "1-aa" not in one.model_dump_json()
    assert "gpu-host-7" not in one.model_dump_json()


def test_the_message_of_a_failure_that_is_the_servers_is_not_shown() -> None:
    raw = JobError(
        code="store_unavailable", message="http://10.0.0.7:9000/bucket refused AKIA-some-key", retryable=True
    )
    shown = view(error=raw).error
    assert shown == JobError(
        code="store_unavailable",
        message="The store did not answer, or answered with a server error.",
        retryable=True,
        blame="server",
    )


def test_a_failure_of_the_server_that_has_no_class_shows_nothing_of_itself() -> None:
    shown = view(error=JobError(code="of_a_later_version", message="CUDA error at /srv/x.cu:7")).error
    assert shown is not None
    assert (shown.code, shown.message) == ("of_a_later_version", "The service failed.")


def test_a_job_that_killed_its_workers_is_told_so() -> None:
    assert view(error=WORKER_LOST).error == WORKER_LOST


def test_the_message_of_a_failure_that_is_the_clients_is_shown() -> None:
    told = JobError(code="lora_shape_mismatch", message="'ink' does not fit", blame="client")
    assert view(error=told).error == told


# --- problems ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", list(errors()), ids=lambda error: error.code)
def test_every_error_has_a_status_that_fits_it(error: type[FuselineError]) -> None:
    status = status_of(error)
    assert 400 <= status < 500 if error.blame == "client" else status >= 500 or status == 404
    if status in {429, 503} and error.code != "store_denied":
        assert error.retryable


def test_the_table_names_no_error_that_does_not_exist() -> None:
    assert set(STATUS) <= {error.code for error in errors()}


# --- access -----------------------------------------------------------------------------------------------------


def test_a_tenant_may_have_several_tokens() -> None:
    access = Access.parse("ann=old-token-1, ann=new-token=2,bob=some-token")
    assert [access.tenant_of(token) for token in ("old-token-1", "new-token=2", "some-token")] == ["ann", "ann", "bob"]
    assert not access.may_publish()


@pytest.mark.parametrize("token", [None, "", "old-token", "old-token-11", "OLD-TOKEN-1", "ann"])
def test_any_other_token_is_refused(token: str | None) -> None:
    with pytest.raises(Unauthorized):
        Access.parse("ann=old-token-1").tenant_of(token)


def test_no_tokens_mean_one_tenant_for_all() -> None:
    assert Access.parse("").tenant_of(None) == OPEN_TENANT
    assert Access.parse(" , ").is_open


@pytest.mark.parametrize("text", ["ann", "=some-token", "ann=short", "a/b=some-token", "public=some-token", "ann=a,b"])
def test_a_token_list_that_cannot_be_meant_is_refused_without_showing_it(text: str) -> None:
    with pytest.raises(ValueError, match="api_tokens, entry") as caught:
        Access.parse(text)
    assert "some-token" not in str(caught.value)


def test_tokens_do_not_show() -> None:
    assert "secret" not in repr(Access.parse("ann=ann-secret-token"))
