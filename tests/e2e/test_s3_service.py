"""The whole service with a real S3 server as its store."""

from pathlib import Path

import httpx
import pytest

from cli.bundle import running
from cli.stack import Stack
from core.store.open import open_store
from tests.e2e.conftest import Service
from tests.s3_gateway import S3Gateway


@pytest.mark.timeout(240)
def test_jobs_run_from_s3_to_s3(tmp_path: Path, s3_gateway: S3Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = s3_gateway.make_bucket("service")
    for name, value in s3_gateway.env.items():
        monkeypatch.setenv(name, value)
    url = f"s3://{bucket}/fleet"
    settings = {"FUSELINE_STORE_URL": url, "FUSELINE_S3_ENDPOINT": s3_gateway.endpoint}
    store = open_store(url, s3_endpoint=s3_gateway.endpoint)
    with running(Stack(tmp_path, settings=settings), store=store) as stack, Service(stack) as service:
        views = service.wait([service.submit(), service.submit("a star <lora:stripes:1> <lora:outline:0.5>")])
        for view in views:
            assert view["state"] == "succeeded", view["error"]
            image = view["images"][0]
            assert image["url"].startswith(s3_gateway.endpoint)
            data = httpx.get(image["url"]).raise_for_status().content
            assert data.startswith(b"\x89PNG")
            assert len(data) == image["size_bytes"]
            # a presigned URL is good for its own object only
            assert httpx.get(image["url"].replace("0.png", "1.png")).status_code in {403, 404}
