"""Logs: one line a record, credentials struck out, events with their jobs' ids."""

from __future__ import annotations

import io
import json
import logging
import time
import warnings
from collections.abc import Iterator

import pytest

from core.events import BatchClaimed, Event, JobFinished, LeaseExpired, StepDone
from core.telemetry import logs


@pytest.fixture(autouse=True)
def root_logger_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers = []
    yield
    logging.captureWarnings(capture=False)
    root.handlers, root.level = handlers, level


def configured(level: str = "INFO", *, json_lines: bool = False) -> io.StringIO:
    stream = io.StringIO()
    logs.configure(level, json_lines=json_lines, stream=stream)
    return stream


SECRET = "Zm9vYmFyLXNlY3JldA"


@pytest.mark.parametrize(
    "text",
    [
        f"connecting to redis://:{SECRET}@valkey:6379/0",
        f"connecting to rediss://default:{SECRET}@host/0 (try 2)",
        f"password with an at sign redis://u:{SECRET}@{SECRET}@host/0",
        f"GET https://s3.example/b/k.png?X-Amz-Credential=AK&X-Amz-Signature={SECRET} 200",
        f'"GET /v1/files/a.png?expires=1&signature={SECRET} HTTP/1.1" 200',
        f"Authorization: Bearer {SECRET}",
        f"{{'Authorization': 'Basic {SECRET}', 'Accept': '*/*'}}",
        f"Authorization: AWS4-HMAC-SHA256 Credential=x/y, SignedHeaders=host, Signature={SECRET}",
        f"sent bearer {SECRET} to the server",
        f"AWS_SECRET_ACCESS_KEY={SECRET}",
        f'{{"SecretAccessKey": "{SECRET}"}}',
        f"x-amz-security-token: {SECRET}",
        f"FUSELINE_API_TOKENS='a=x,b={SECRET}'",
        f'{{"password": "{SECRET}"}}',
        f"whsec_{SECRET}",
    ],
)
def test_a_credential_never_reaches_the_line(text: str) -> None:
    # Given both formats
    for json_lines in (False, True):
        stream = configured(json_lines=json_lines)
        # If a message holds a credential
        logging.getLogger("other.library").warning("%s", text)
        # Expect the line without it, marked
        assert SECRET not in stream.getvalue()
        assert logs.STRUCK in stream.getvalue()


def test_an_access_key_id_is_struck_out() -> None:
    assert logs.redact("denied for AKIAIOSFODNN7EXAMPLE today") == "denied for *** today"


@pytest.mark.parametrize(
    "text",
    [
        "job 01J0000000 finished in 3.2 s",
        "LoRA 'ink:style' fits no module; see docs/errors.md#lora_unmatched",
        "listening on http://127.0.0.1:8000/v1",
        "why? because",
        "basic size is 64x64",
    ],
)
def test_plain_text_stays_as_it_is(text: str) -> None:
    assert logs.redact(text) == text


@pytest.mark.parametrize("unit", ["a", "?", "?a", "://", "://a", "@", "token", "bearer ", "secret_access_", "='\""])
def test_redaction_takes_linear_time(unit: str) -> None:
    # Given 400 kB of what patterns begin with
    text = unit * (400_000 // len(unit))
    started = time.process_time()
    # If it is redacted
    logs.redact(text)
    # Expect it done in a fraction of what quadratic time would take (minutes)
    assert time.process_time() - started < 2.0


def test_a_traceback_is_redacted_too() -> None:
    stream = configured()
    error = ConnectionError(f"cannot reach redis://:{SECRET}@host")
    logging.getLogger("x").error("failed", exc_info=error)
    assert "ConnectionError: cannot reach redis://***@host" in stream.getvalue()
    assert SECRET not in stream.getvalue()


def test_a_message_cannot_forge_a_second_line() -> None:
    # Given a name that a client chose
    name = "nice\n2026-01-01T00:00:00.000Z INFO core.queue job j1 succeeded\x1b[2J"
    stream = configured()
    # If it is logged
    logging.getLogger("x").info("unknown LoRA %s", name)
    # Expect one line, with the line break and the terminal's escape written out
    assert stream.getvalue().count("\n") == 1
    assert "\\n2026" in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


def test_json_lines_are_objects_with_the_events_fields() -> None:
    stream = configured(json_lines=True)
    logs.EventLog()(JobFinished("j1", "default", "failed", "lora_not_finite", 1.5))
    line = json.loads(stream.getvalue())
    assert line["event"] == "job_finished"
    assert line["job_id"] == "j1"
    assert line["code"] == "lora_not_finite"
    assert line["level"] == "WARNING"
    assert line["time"].endswith("Z")


def test_text_lines_name_the_jobs() -> None:
    stream = configured()
    logs.EventLog()(BatchClaimed("default", "g" * 32, "7-x", ("j1", "j2"), (0.25, 1.0)))
    assert "INFO fuseline.events batch_claimed pool=default" in stream.getvalue()
    assert "job_ids=j1,j2 waited_s=0.250,1.000" in stream.getvalue()


@pytest.mark.parametrize(
    ("event", "level"),
    [
        (LeaseExpired("default", 2), logging.WARNING),
        (JobFinished("j", "default", "succeeded", "", 1.0), logging.INFO),
        (StepDone("7-x", 1, 20), logging.DEBUG),
    ],
)
def test_an_event_has_the_level_of_its_weight(event: Event, level: int) -> None:
    assert logs.level_of(event) == level


def test_steps_are_not_logged_at_info() -> None:
    stream = configured()
    logs.EventLog()(StepDone("7-x", 1, 20))
    assert stream.getvalue() == ""


def test_configuring_again_does_not_double_the_lines() -> None:
    configured()
    stream = configured()
    logging.getLogger("x").info("once")
    assert stream.getvalue().count("once") == 1


def test_debug_does_not_open_the_libraries_that_log_headers() -> None:
    stream = configured("DEBUG")
    logging.getLogger("botocore.auth").debug("CanonicalRequest: ...")
    logging.getLogger("x").debug("ours")
    assert "CanonicalRequest" not in stream.getvalue()
    assert "ours" in stream.getvalue()


def test_warnings_become_records() -> None:
    stream = configured()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(capture=False)
        logging.captureWarnings(capture=True)
        warnings.warn("old call", DeprecationWarning, stacklevel=1)
    assert "py.warnings" in stream.getvalue()
