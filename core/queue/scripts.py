"""The queue's Lua verbs: one file each in ``scripts/``, run as one atomic move on the server.

A verb's text is the names of the keys (from ``keys.py``), the bounds, ``lib.lua`` and the verb's own file. The server
keeps it by its hash; when it has forgotten (a restart), the client sends it again.
"""

from __future__ import annotations

from importlib import resources
from typing import Any

import redis

from core.queue import keys

VERBS = (
    "submit",
    "snapshot",
    "claim",
    "heartbeat",
    "finish",
    "fail",
    "cancelled",
    "release",
    "cancel",
    "reap",
    "promote",
    "see",
    "forget",
    "workers",
    "stats",
)
"""Names of the verbs: their files without ``.lua``."""


def source(verb: str) -> str:
    """Give the whole text of a verb as the server runs it."""
    folder = resources.files("core.queue") / "scripts"
    bounds = f"local limits = {{ dead = {keys.DEAD_MAX}, out = {keys.OUT_MAX} }}\n"
    return "\n".join([keys.lua_names(), bounds, *((folder / f"{name}.lua").read_text() for name in ("lib", verb))])


class Scripts:
    """The verbs, ready to be called on one server under one prefix."""

    def __init__(self, client: redis.Redis, prefix: str) -> None:
        self._prefix = prefix
        self._scripts = {verb: client.register_script(source(verb)) for verb in VERBS}

    def run(self, verb: str, now: str, *args: str | float) -> Any:
        """Run a verb at a time in ms, or at the server's own if ``now`` is empty. Raises what redis-py raises."""
        return self._scripts[verb](keys=[self._prefix], args=[now, *args])
