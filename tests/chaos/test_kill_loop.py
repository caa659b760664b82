"""A long, seeded run of kills and freezes under load, with a ledger. ``make test-long``."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest

from cli.bundle import MODEL, running
from cli.stack import Stack
from tests.chaos.test_kills import NOOP, endings
from tests.e2e.conftest import Service

SECONDS = float(os.environ.get("CHAOS_SECONDS", "120"))
SEED = int(os.environ.get("CHAOS_SEED", "1"))
LORAS = ("stripes", "outline", "heart", "dusk")


@pytest.mark.long
@pytest.mark.timeout(SECONDS + 600)
def test_nothing_is_lost_or_doubled_in_a_long_run_of_faults(tmp_path: Path) -> None:
    draw, faults, acknowledged = random.Random(SEED), Counter[str](), list[str]()
    settings = {**NOOP, "FUSELINE_LEASE_S": "3"}
    with running(Stack(tmp_path, workers=3, settings=settings)) as stack, Service(stack) as service:
        stop = threading.Event()
        submitter = threading.Thread(target=submit, args=(stack.api_url, acknowledged, stop))
        submitter.start()
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            time.sleep(draw.uniform(0.5, 3.0))
            fault = draw.choice(["kill", "kill", "freeze", "valkey"])
            strike(stack, draw, fault)
            faults[fault] += 1
        stop.set()
        submitter.join()
        views = service.wait(acknowledged, 300)
        assert Counter(view["state"] for view in views) == {"succeeded": len(acknowledged)}
        counted = endings(stack)
        assert {counted[job_id] for job_id in acknowledged} == {1}
        attempts = sum(view["attempt"] for view in views)
    print(
        f"covered: seed {SEED}, {SECONDS:.0f} s, {len(acknowledged)} jobs, faults {dict(faults)}: 0 lost, 0 doubled, "
        f"{attempts} counted runs"
    )


def submit(url: str, acknowledged: list[str], stop: threading.Event) -> None:
    """Submit over five LoRA sets until told to stop; keep the ids that were acknowledged."""
    with httpx.Client(base_url=url, timeout=10) as client:
        number = 0
        while not stop.is_set():
            number += 1
            loras = [{"name": LORAS[number % 5], "scale": 1}] if number % 5 < len(LORAS) else []
            with contextlib.suppress(httpx.TransportError):
                answer = client.post("/v1/jobs", json={"model": MODEL, "prompt": f"job {number}", "loras": loras})
                if answer.status_code == 202:
                    acknowledged.append(answer.json()["id"])
                else:
                    assert answer.status_code == 503, answer.text
            time.sleep(0.02)


def strike(stack: Stack, draw: random.Random, fault: str) -> None:
    """Kill a worker and start another, freeze one for longer than its lease, or kill Valkey and start it again."""
    if fault == "valkey":
        stack.valkey.stop(signal.SIGKILL)
        stack.valkey.start()
        return
    number = draw.randint(1, stack.workers)
    process = stack.processes[f"worker-{number}"]
    if fault == "freeze":
        os.killpg(process.pid, signal.SIGSTOP)
        time.sleep(4.0)
        os.killpg(process.pid, signal.SIGCONT)
        return
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    stack.start_worker(number)
