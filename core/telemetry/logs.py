"""Logging: one line a record, as text or JSON, with credentials struck out.

Prompts are personal data: no event carries one, and nothing here logs one. ``redact`` is applied to every line that is
written, whoever logged it, because URLs with passwords and signatures turn up in other libraries' messages.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import sys
from datetime import UTC, datetime
from typing import Any, TextIO, assert_never

from core.events import (
    BatchClaimed,
    BatchSampled,
    CacheEvicted,
    CacheSized,
    CacheUsed,
    Event,
    FileFetched,
    Fused,
    JobFinished,
    JobRetried,
    JobsReleased,
    JobSubmitted,
    LeaseExpired,
    ModelLoaded,
    StageTimed,
    StaleFinish,
    StepDone,
    SubmitRejected,
)

STRUCK = "***"
"""What stands in a line where a credential stood."""

LOUD = ("boto3", "botocore", "s3transfer", "urllib3", "PIL", "filelock")
"""Libraries that log requests with their headers, or much else, below WARNING."""

_SECRETS: tuple[tuple[re.Pattern[str], str], ...] = (
    # linear time each: a pattern starts at a fixed text and no repetition holds another
    (re.compile(r"://[^\s/\"']*@"), f"://{STRUCK}@"),  # user:password@ of a URL
    (re.compile(r"\?[^\s\"'<>?=]*=[^\s\"'<>]*"), f"?{STRUCK}"),  # a query: presigned URLs sign there
    (re.compile(r"(?i)\b(authorization[\"']?\s?[:=]\s?b?[\"']?)[^\"'\r\n]+"), rf"\1{STRUCK}"),
    (re.compile(r"(?i)\b((?:bearer|basic)\s)[\w.~+/=-]{8,}"), rf"\1{STRUCK}"),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"), STRUCK),  # AWS access key id
    (re.compile(r"\bwhsec_[\w+/=-]+"), STRUCK),  # webhook secret
    (
        re.compile(
            r"(?i)((?:secret(?:_?access)?(?:_?key)?|access_?key(?:_?id)?|api_?key|passw(?:or)?d|tokens?|requirepass)"
            r"[\"']?\s?[:=]\s?[\"']?)[^\s\"';&}\])]+"
        ),
        rf"\1{STRUCK}",
    ),
)

_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))} | {9: "\\t", 10: "\\n", 13: "\\r"}


def redact(text: str) -> str:
    """Strike out what looks like a credential: URL passwords and queries, Authorization, keys, tokens, passwords."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


class TextFormatter(logging.Formatter):
    """``2026-01-02T03:04:05.678Z INFO core.x message``. A message cannot break out of its line."""

    def format(self, record: logging.LogRecord) -> str:
        """Write one record. A traceback follows on lines of its own."""
        message = redact(record.getMessage()).translate(_CONTROL)
        line = f"{_time(record)} {record.levelname} {record.name} {message}"
        trace = _trace(record)
        return f"{line}\n{trace}" if trace else line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, an event's fields, and a traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """Write one record."""
        fields: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname,
            "logger": record.name,
            "message": redact(record.getMessage()),
        }
        fields |= getattr(record, "event_fields", {})
        trace = _trace(record)
        if trace:
            fields["traceback"] = trace
        return json.dumps(fields, ensure_ascii=False, default=str)


def configure(level: str = "INFO", *, json_lines: bool = False, stream: TextIO | None = None) -> None:
    """Send every logger's records to one stream (standard error by default). Calling it again replaces the first."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if json_lines else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(capture=True)
    for name in LOUD:
        logging.getLogger(name).setLevel(logging.WARNING)


class EventLog:
    """An observer that logs events, with the jobs' ids, as ``job_finished job_id=… pool=…``."""

    def __init__(self, logger: logging.Logger | None = None) -> None:
        self._logger = logger or logging.getLogger("fuseline.events")

    def __call__(self, event: Event) -> None:
        """Log one event at its level."""
        level = level_of(event)
        if not self._logger.isEnabledFor(level):
            return
        fields = {field.name: getattr(event, field.name) for field in dataclasses.fields(event)}
        name = _snake(type(event).__name__)
        text = " ".join((name, *(f"{key}={_plain(value)}" for key, value in fields.items())))
        self._logger.log(level, "%s", text, extra={"event_fields": {"event": name, **fields}})


def level_of(event: Event) -> int:
    """WARNING for what an operator should see, INFO for a job's way, DEBUG for what comes many times a job."""
    match event:
        case LeaseExpired() | StaleFinish() | JobRetried():
            return logging.WARNING
        case JobFinished(outcome=outcome):
            return logging.WARNING if outcome == "failed" else logging.INFO
        case JobSubmitted() | SubmitRejected() | BatchClaimed() | JobsReleased() | BatchSampled():
            return logging.INFO
        case FileFetched() | ModelLoaded() | Fused() | CacheEvicted():
            return logging.INFO
        case CacheUsed() | CacheSized() | StageTimed() | StepDone():
            return logging.DEBUG
        case _:
            assert_never(event)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _trace(record: logging.LogRecord) -> str:
    return redact(logging.Formatter().formatException(record.exc_info)) if record.exc_info else ""


def _plain(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(_plain(item) for item in value)
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
