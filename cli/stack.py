"""The embedded stack: Valkey, API and workers as child processes on loopback, on a directory of their own."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from cli.embedded import EmbeddedValkey, free_port
from core.errors import QueueUnavailable

READY_TIMEOUT_S = 60.0
DRAIN_TIMEOUT_S = 30.0
_PR_SET_PDEATHSIG = 1


@dataclass
class Stack:
    """Valkey, one API and ``workers`` workers. State, logs and stored objects lie under ``directory``."""

    directory: Path
    workers: int = 1
    api_port: int = 0
    """0 = any free port."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Further environment variables of API and workers, such as ``FUSELINE_LEASE_S``."""
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    """By name: ``api``, ``worker-1``, ``worker-2``…"""
    worker_ports: tuple[int, ...] = ()
    """Metrics ports of the workers."""

    def __post_init__(self) -> None:
        self.directory = self.directory.resolve()
        self.api_port = self.api_port or free_port()
        self.worker_ports = tuple(free_port() for _ in range(self.workers))
        self.valkey = EmbeddedValkey(self.directory / "valkey")
        self._secret = secrets.token_hex(32)

    @property
    def api_url(self) -> str:
        """Base URL of the API."""
        return f"http://127.0.0.1:{self.api_port}"

    @property
    def store_url(self) -> str:
        """URL of the local-directory store."""
        return f"file://{self.directory / 'store'}"

    @property
    def environment(self) -> dict[str, str]:
        """The settings that API and workers share."""
        threads = max(1, (os.cpu_count() or 1) // max(1, self.workers))
        return {
            "FUSELINE_REDIS_URL": self.valkey.url,
            "FUSELINE_STORE_URL": self.store_url,
            "FUSELINE_URL_SECRET": self._secret,
            "FUSELINE_CACHE_DIR": str(self.directory / "cache"),
            "FUSELINE_API_PORT": str(self.api_port),
            "FUSELINE_THREADS": str(threads),
            **self.settings,
        }

    def start_valkey(self) -> None:
        """Start the queue's server."""
        self.valkey.start()

    def start(self) -> None:
        """Start API and workers on the running Valkey; return when the API answers."""
        for number in range(1, self.workers + 1):
            self.start_worker(number)
        self._spawn("api", [sys.executable, "-m", "api.main"], {})
        self._wait_ready()

    def start_worker(self, number: int) -> None:
        """Start worker ``number``, counted from 1."""
        name = f"worker-{number}"
        own = {"FUSELINE_WORKER_NAME": name, "FUSELINE_WORKER_METRICS_PORT": str(self.worker_ports[number - 1])}
        self._spawn(name, [sys.executable, "-m", "worker.main"], own)

    def dead(self) -> list[str]:
        """Name the processes that have ended by themselves."""
        return [name for name, process in self.processes.items() if process.poll() is not None]

    def log(self, name: str) -> Path:
        """Path of a process' log."""
        return self.directory / "logs" / f"{name}.log"

    def stop(self) -> None:
        """Drain the workers, then stop the API, then Valkey. Whoever does not end in time is killed."""
        workers = {name: process for name, process in self.processes.items() if name != "api"}
        for processes in (workers, {"api": self.processes.get("api")}):
            running = [process for process in processes.values() if process is not None]
            for process in running:
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)
            for process in running:
                _end(process)
        self.processes.clear()
        self.valkey.stop()

    def _spawn(self, name: str, command: list[str], own: Mapping[str, str]) -> None:
        log = self.log(name)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            # a session of its own, so that Ctrl-C reaches this process alone, which then stops the others in order
            self.processes[name] = subprocess.Popen(  # noqa: S603 - our own modules
                command,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **self.environment, **own},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent,  # noqa: PLW1509 - no thread runs yet
            )

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline:
            for name in self.dead():
                msg = f"{name} ended at its start; see {self.log(name)}:\n{self.log(name).read_text()[-2000:]}"
                raise QueueUnavailable(msg)
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.api_url}/readyz", timeout=2).is_success:
                    return
            time.sleep(0.1)
        msg = f"the API did not become ready in {READY_TIMEOUT_S:.0f} s; see {self.log('api')}"
        raise QueueUnavailable(msg)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Make SIGTERM end a ``with`` block as Ctrl-C does, so that whatever it started is stopped."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(DRAIN_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _die_with_parent() -> None:
    """Ask Linux to end this child if its parent is killed; elsewhere do nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
