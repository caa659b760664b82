"""A job as Redis holds it: a hash of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from core.job import Job, JobError, JobResult, JobSpec, JobState


def pairs(flat: Sequence[str]) -> dict[str, str]:
    """Read a hash as a script gives it: field, value, field, value."""
    return dict(zip(flat[::2], flat[1::2], strict=True))


def job_from_hash(fields: Mapping[str, str]) -> Job:
    """Read a job. Fields of a later release are ignored, those that are not there yet have their default."""
    error, result = fields.get("error"), fields.get("result")
    return Job(
        id=fields["id"],
        tenant=fields["tenant"],
        pool=fields["pool"],
        group=fields["group"],
        spec=JobSpec.from_json(fields["spec"]),
        state=JobState(fields["state"]),
        priority=int(fields.get("priority", 0)),
        tag=float(fields["tag"]),
        seq=int(fields["seq"]),
        attempt=int(fields.get("attempt", 0)),
        crashes=int(fields.get("crashes", 0)),
        max_attempts=int(fields["max_attempts"]),
        suspect=fields.get("suspect") == "1",
        fence=fields.get("fence", ""),
        worker=fields.get("worker", ""),
        cancel_requested=fields.get("cancel") == "1",
        overtaken_by=float(fields.get("overtaken_by", 0)),
        progress=float(fields.get("progress", 0)),
        created_ms=int(fields.get("created_ms", 0)),
        ready_ms=int(fields.get("ready_ms", 0)),
        started_ms=int(fields.get("started_ms", 0)),
        finished_ms=int(fields.get("finished_ms", 0)),
        due_ms=int(fields.get("due_ms", 0)),
        error=JobError.model_validate_json(error) if error else None,
        result=JobResult.model_validate_json(result) if result else None,
    )
