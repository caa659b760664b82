"""The embedded stack keeps its directory to itself and leaves no process behind. Real processes, real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import save
from typer.testing import CliRunner

from cli import demo
from cli.bundle import register_lora, running
from cli.main import app
from cli.stack import DirectoryInUse, Stack
from core.errors import EngineFailed, LoraError, NameTaken, QueueUnavailable
from core.store.open import open_store
from tests.conftest import ROOT
from tests.e2e.test_main_job import left_behind

NOOP = {"FUSELINE_ENGINE": "noop"}


def write_lora(path: Path, value: float) -> None:
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    ones = np.full((4, 4), value, np.float16)
    path.write_bytes(save({f"{name}.lora_down.weight": ones, f"{name}.lora_up.weight": ones}))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A model that no engine would load, and one LoRA."""
    folder = tmp_path / "bundle"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "model_index.json").write_text("{}")
    (folder / "loras").mkdir()
    write_lora(folder / "loras" / "stripes.safetensors", 1)
    return folder


@pytest.fixture
def served(tmp_path: Path, bundle: Path) -> Iterator[subprocess.Popen[bytes]]:
    """``fuseline serve`` with one worker, ready."""
    folders = ["--dir", str(tmp_path / "state"), "--bundle", str(bundle)]
    process = subprocess.Popen(
        [sys.executable, "-m", "cli.main", "serve", "--port", "0", *folders],
        cwd=ROOT,
        env=os.environ | NOOP,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdout is not None
    lines: list[bytes] = []
    while not any(b"Ctrl-C stops everything" in line for line in lines):
        lines.append(process.stdout.readline())
        assert lines[-1], b"".join(lines).decode()
    yield process
    process.kill()
    process.communicate()


def wait_until(holds: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- one stack on a directory -----------------------------------------------------------------------------------


def test_a_second_stack_on_a_directory_is_refused_and_touches_nothing(tmp_path: Path) -> None:
    # Given a stack that holds its directory
    directory = tmp_path / "state"
    first, second = Stack(directory, workers=0), Stack(directory, workers=0, fresh=True)
    with first.held():
        directory.mkdir()
        (directory / "kept").touch()
        # If another one that empties its directory wants the same
        # Expect a refusal that names the directory, and nothing to be deleted
        with pytest.raises(DirectoryInUse, match=str(directory)), second.held():
            pass
        assert (directory / "kept").exists()
    # and the second to have its turn after the first
    with second.held():
        assert not directory.exists()


def test_the_command_refuses_in_a_sentence(tmp_path: Path) -> None:
    directory = tmp_path / "state"
    with Stack(directory, workers=0).held():
        directory.mkdir()
        result = CliRunner().invoke(app, ["demo", "--dir", str(directory), "--out", str(tmp_path / "out")])
        assert directory.exists()
    assert result.exit_code == 1
    assert f"directory_in_use: another stack runs on {directory}" in result.output


def test_a_valkey_that_outlives_its_stack_keeps_the_directory(tmp_path: Path) -> None:
    # Given a stack whose Valkey still runs when the stack has let go of the directory
    first = Stack(tmp_path / "state", workers=0)
    with first.held():
        first.start_valkey()
    try:
        # Expect the directory to be refused to others as long as that lives
        with pytest.raises(DirectoryInUse), Stack(tmp_path / "state", workers=0).held():
            pass
    finally:
        first.stop()
    with Stack(tmp_path / "state", workers=0).held():
        pass


# --- LoRAs that the API does not take ---------------------------------------------------------------------------


def test_a_lora_that_is_not_taken_is_named_with_what_to_do(tmp_path: Path, bundle: Path) -> None:
    # Given a stack that knows the bundle's LoRA
    lora, page = bundle / "loras" / "stripes.safetensors", tmp_path / "page.safetensors"
    with running(Stack(tmp_path / "state", workers=0, fresh=True), bundle) as stack:
        store = open_store(stack.store_url)
        stored = {path: path.read_bytes() for path in (tmp_path / "state/store/public").rglob("*.safetensors")}
        # If the same file is registered again, nothing happens; if the file changed
        register_lora(stack, store, lora)
        write_lora(lora, 2)
        # Expect advice, and the registered object to be as it was
        with pytest.raises(NameTaken, match=f"'stripes'; delete {tmp_path / 'state'}"):
            register_lora(stack, store, lora)
        assert len(stored) == 1
        assert {path: path.read_bytes() for path in stored} == stored
        # and of a file that is no LoRA the API's own words
        page.write_bytes(b"<!DOCTYPE html><html></html>")
        with pytest.raises(LoraError, match=r"'page'.*lora_file_invalid"):
            register_lora(stack, store, page)
    # and of an API that is gone where to look
    with pytest.raises(QueueUnavailable, match=f"see {stack.log('api')}"):
        register_lora(stack, store, lora)


# --- nothing stays behind ---------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children of their parent's death")
def test_a_killed_command_leaves_no_process(tmp_path: Path, served: subprocess.Popen[bytes]) -> None:
    commands = " ".join(left_behind(tmp_path / "state").values())
    assert all(name in commands for name in ("cli.main", "api.main", "worker.main", "valkey"))
    served.kill()
    wait_until(lambda: not left_behind(tmp_path / "state"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_impatience_ends_everything_at_once(tmp_path: Path, served: subprocess.Popen[bytes]) -> None:
    # Given a service whose worker cannot drain
    processes = left_behind(tmp_path / "state").items()
    for process_id in [process_id for process_id, command in processes if "worker.main" in command]:
        os.kill(process_id, signal.SIGSTOP)
    # If it is interrupted, and again and again while it waits for that worker
    served.send_signal(signal.SIGINT)
    deadline = time.monotonic() + 25
    while served.poll() is None:
        assert time.monotonic() < deadline
        served.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    # Expect it to end well before the drain's time is over, with nothing left;
    # the last signal may have come when all was stopped and the command on its way out
    assert served.returncode in {130, -signal.SIGTERM}
    assert left_behind(tmp_path / "state") == {}


# --- the demo and an API that is away ---------------------------------------------------------------------------


def test_the_demo_waits_for_an_api_that_is_away(tmp_path: Path) -> None:
    # Given an API that gives no answer at first
    answers = iter([httpx.ConnectError("refused"), httpx.ReadError("reset")])

    def answer(request: httpx.Request) -> httpx.Response:
        for error in answers:
            raise error
        return httpx.Response(200, json={"state": "succeeded"})

    jobs = demo.demo_jobs("m")
    # If the demo watches its jobs, expect it to see them all through
    with httpx.Client(base_url="http://api", transport=httpx.MockTransport(answer)) as client:
        demo._watch(client, Stack(tmp_path, workers=0), jobs, Console(quiet=True))
    assert all(job.is_over for job in jobs)


def test_the_demo_names_an_api_that_stays_away(tmp_path: Path) -> None:
    stack = Stack(tmp_path / "state", workers=0)
    with pytest.raises(EngineFailed, match=f"see {stack.log('api')}"):
        demo.run_demo(stack, "m", tmp_path / "out", Console(quiet=True))
