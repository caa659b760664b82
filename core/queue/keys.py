"""Every Redis key of the queue: its name, its type and how long it lives. Also the bounds on what keys may hold.

Lua gets the same names from here (``lua_names``), so that a name is written once. ``{}`` stands for an id, pool,
group, tenant or token; a pattern with two has a fixed-length second part, so that two owners never share a key.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

PREFIX = "fuse:"
"""Default prefix: separates the queue from whatever else the server holds."""

IDEMPOTENCY_TTL_S = 24 * 3600
"""How long an idempotency key is remembered at most; never longer than a result, so that its job is still there."""

REQUEST_GRACE_S = 60.0
"""How much longer than its lease a claim's request id is remembered, should nobody ever end that lease."""

DEAD_MAX = 10_000
"""Most dead letters that are listed; the oldest give way."""

OUT_MAX = 100_000
"""About how many state changes the outbox stream keeps."""

WORKERS_MAX = 10_000
"""Most workers that one look at the registry lists."""


class Lifetime(enum.StrEnum):
    """When a key goes away."""

    PERSISTENT = "persistent"
    """Never; its size is bounded by something other than the number of jobs ever taken."""
    WITH_WORK = "with work"
    """With its last entry: nothing is left of it when no job waits or runs."""
    EXPIRES = "expires"
    """It carries an expiry from its first write on."""
    AFTER_END = "after the end"
    """It gets its expiry when the job reaches a terminal state."""


@dataclass(frozen=True, slots=True)
class Key:
    """One kind of key."""

    word: str
    """What Python and Lua call it."""
    pattern: str
    type: str
    """As Redis' TYPE says."""
    lifetime: Lifetime
    holds: str

    def at(self, prefix: str, *parts: str) -> str:
        """Give the name of one such key."""
        return prefix + self.pattern.format(*parts)

    def matches(self, prefix: str, name: str) -> bool:
        """Tell whether a key of the server is of this kind."""
        shape = re.escape(self.pattern).replace(re.escape("{}"), ".+")
        return re.fullmatch(re.escape(prefix) + shape, name) is not None


_P, _W, _E, _A = Lifetime.PERSISTENT, Lifetime.WITH_WORK, Lifetime.EXPIRES, Lifetime.AFTER_END

JOB = Key("job", "j:{}", "hash", _A, "one job, every field of it")
READY = Key("ready", "ready:{}", "zset", _W, "a pool's line: 'seq:id' by fair tag; equal tags keep the order of seq")
LEASES = Key("leases", "leases", "zset", _W, "fence by expiry in ms")
OUT = Key("out", "out", "stream", _P, "every state change; bounded by OUT_MAX")
DEAD = Key("dead", "dead", "zset", _P, "failed jobs by time in ms; bounded by DEAD_MAX and the life of a result")
WORKERS = Key("workers", "workers", "zset", _P, "worker id by lapse in ms; lapsed ones leave when another is seen")
WORKER = Key("worker", "w:{}", "hash", _E, "what a worker says of itself")

KEYS = (
    JOB,
    READY,
    Key("groups", "groups:{}", "hash", _W, "of a pool: group -> its ready jobs"),
    Key("lined", "lined:{}", "hash", _W, "of a pool: tenant -> its ready jobs"),
    Key("taken", "taken:{}", "hash", _W, "of a pool: group -> live leases on it"),
    Key("count", "count:{}", "hash", _W, "of a pool: delayed, running, leases"),
    Key("totals", "totals:{}", "hash", _P, "of a pool: leases that ever expired, jobs that ever became dead letters"),
    Key("waiting", "waiting", "hash", _W, "tenant -> its jobs that are queued or delayed, in all pools"),
    Key("inflight", "inflight", "hash", _W, "tenant -> its jobs that run, in all pools"),
    Key("delayed", "delayed", "zset", _W, "job id by due time in ms"),
    LEASES,
    Key("lease", "l:{}", "hash", _W, "of a fence: pool, group, worker, request"),
    Key("leased", "lj:{}", "zset", _W, "of a fence: its jobs, as they stood in the line"),
    Key("request", "req:{}", "string", _E, "the fence that a claim's request id got"),
    Key("idem", "idem:{}:{}", "string", _E, "of a tenant and a hashed idempotency key: body hash, ':', job id"),
    Key("vt", "vt:{}", "hash", _P, "of a pool: tenant -> virtual finish time; forgotten once the pool has passed it"),
    Key("v", "V:{}", "string", _P, "of a pool: its virtual time"),
    Key("seq", "seq", "string", _P, "order of submission"),
    Key("fence", "fence", "string", _P, "counter of leases"),
    Key("pools", "pools", "set", _P, "names of pools: operators make them, not tenants"),
    DEAD,
    OUT,
    WORKERS,
    WORKER,
)
"""All of them."""


def kind_of(prefix: str, name: str) -> Key | None:
    """Find the kind of a key that the server holds; ``None`` = the queue made no such key."""
    return next((kind for kind in KEYS if kind.matches(prefix, name)), None)


def lua_names() -> str:
    """Write the Lua table ``key`` of functions that name keys; the prefix is ``KEYS[1]``."""
    lines = ["local key = {}"]
    for kind in KEYS:
        head, *tails = kind.pattern.split("{}")
        parameters = [f"part{index}" for index in range(len(tails))]
        pieces = ["KEYS[1]", f"'{head}'"]
        for parameter, tail in zip(parameters, tails, strict=True):
            pieces += [parameter, f"'{tail}'"] if tail else [parameter]
        lines.append(f"function key.{kind.word}({', '.join(parameters)}) return {' .. '.join(pieces)} end")
    return "\n".join(lines) + "\n"


def member(seq: int, job_id: str) -> str:
    """Name a job in its line: equal tags sort by sequence."""
    return f"{seq:016d}:{job_id}"
