"""The whole service on real parts: Valkey, API, Celery workers, the bundled model."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self

import httpx
import pytest
from PIL import Image

from cli.bundle import MODEL, running
from cli.stack import Stack
from core.queue.redis import RedisQueue

OVER = {"succeeded", "failed", "cancelled"}


class Service:
    """A running stack, as its clients see it."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.http = httpx.Client(base_url=stack.api_url, timeout=10)
        self.queue = RedisQueue(stack.valkey.url)
        """The queue itself, for what the API does not show."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        self.queue.client.close()

    def submit(self, prompt: str = "a red circle on a blue background", **fields: Any) -> str:
        body = {"model": MODEL, "prompt": prompt, "seed": 7, **fields}
        answer = self.http.post("/v1/jobs", json=body)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def view(self, job_id: str) -> dict[str, Any]:
        view: dict[str, Any] = self.http.get(f"/v1/jobs/{job_id}").raise_for_status().json()
        return view

    def wait(self, job_ids: Iterable[str], timeout_s: float = 90) -> list[dict[str, Any]]:
        """Read the jobs until all are over."""
        return [self.wait_for(job_id, lambda view: view["state"] in OVER, timeout_s) for job_id in job_ids]

    def wait_for(self, job_id: str, holds: Callable[[dict[str, Any]], bool], timeout_s: float = 90) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        while True:
            view = self.view(job_id)
            if holds(view):
                return view
            assert time.monotonic() < deadline, f"not so after {timeout_s} s: {view}"
            time.sleep(0.05)

    def images(self, view: dict[str, Any]) -> list[Image.Image]:
        """Fetch a job's images by their URLs."""
        assert view["state"] == "succeeded", view["error"]
        return [
            Image.open(io.BytesIO(self.http.get(image["url"]).raise_for_status().content)) for image in view["images"]
        ]

    def draw(self, *args: Any, **fields: Any) -> Image.Image:
        """Submit one job and give its first image."""
        return self.images(self.wait([self.submit(*args, **fields)])[0])[0]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One stack with one worker for a module's tests."""
    with running(Stack(tmp_path_factory.mktemp("stack"))) as stack, Service(stack) as service:
        yield service
