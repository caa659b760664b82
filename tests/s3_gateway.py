"""A real S3 server for tests: JuiceFS' gateway over a local directory, as a child process."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
import httpx
from botocore.config import Config

from cli.embedded import free_port

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class S3Gateway:
    """A running server."""

    endpoint: str
    access_key: str = "tester"
    secret_key: str = "tester-secret"

    @property
    def env(self) -> dict[str, str]:
        """Environment variables with which boto3 reaches it as its owner."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    @functools.cached_property
    def client(self) -> S3Client:
        """A plain client, for what the store under test does not do itself."""
        return boto3.session.Session(self.access_key, self.secret_key, region_name="us-east-1").client(
            "s3", endpoint_url=self.endpoint, config=Config(s3={"addressing_style": "path"})
        )

    def make_bucket(self, name: str) -> str:
        """Make an empty bucket and give its name back."""
        self.client.create_bucket(Bucket=name)
        return name


def find_juicefs() -> Path | None:
    """Find the program on the path or beside this Python."""
    beside = Path(sys.executable).parent / "juicefs"
    found = shutil.which("juicefs") or (beside if beside.exists() else None)
    return Path(found) if found else None


@contextlib.contextmanager
def running_s3_gateway(binary: Path, directory: Path) -> Iterator[S3Gateway]:
    """Run a server with its data in ``directory`` for the length of a ``with`` block."""
    meta = f"sqlite3://{directory / 'meta.db'}"
    subprocess.run(
        [binary, "format", "--storage", "file", "--bucket", f"{directory / 'blocks'}/", meta, "tests"],
        check=True,
        capture_output=True,
    )
    port = free_port()
    gateway = S3Gateway(f"http://127.0.0.1:{port}")
    log = directory / "gateway.log"
    options = ["--no-banner", "--keep-etag", "--multi-buckets", "--object-meta", "--no-bgjob"]
    options += ["--log", str(log), "--cache-dir", str(directory / "cache"), "--backup-meta", "0"]
    environment = os.environ | {"MINIO_ROOT_USER": gateway.access_key, "MINIO_ROOT_PASSWORD": gateway.secret_key}
    process = subprocess.Popen(
        [binary, "gateway", *options, meta, f"127.0.0.1:{port}"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        _wait_ready(gateway, process, log)
        yield gateway
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_ready(gateway: S3Gateway, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{gateway.endpoint}/minio/health/live", timeout=1).is_success:
                return
        time.sleep(0.05)
    tail = log.read_text(errors="replace")[-1000:] if log.exists() else ""
    msg = f"the S3 gateway did not start; its log ends:\n{tail}"
    raise RuntimeError(msg)
