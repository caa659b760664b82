"""Fixtures that more than one folder uses: real servers, started once, emptied before each test."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from cli.embedded import EmbeddedValkey, running_valkey

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"


def need(present: object, what: str) -> None:
    """Skip with a reason for a user; fail where CI promised that it is there."""
    if present:
        return
    reason = f"{what} is not here"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedValkey]:
    """One Valkey server for the whole run. Tests that kill a server start their own."""
    with running_valkey(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture
def redis_url(valkey: EmbeddedValkey) -> str:
    """URL of an empty Valkey."""
    with redis.Redis.from_url(valkey.url) as client:
        client.flushall()
    return valkey.url
