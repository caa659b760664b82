"""The embedded stack: Valkey, API and workers as child processes on loopback, on a directory of their own."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from cli.embedded import EmbeddedValkey, die_with_parent, free_port
from core.errors import FuselineError, QueueUnavailable

READY_TIMEOUT_S = 60.0
DRAIN_TIMEOUT_S = 30.0
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM)


class DirectoryInUse(FuselineError):
    """Another stack runs on the directory: two Valkeys would write one append-only file."""

    code = "directory_in_use"
    blame = "client"


@dataclass
class Stack:
    """Valkey, one API and ``workers`` workers. State, logs and stored objects lie under ``directory``.

    Started and stopped from the main thread, on a directory that is ``held``.
    """

    directory: Path
    workers: int = 1
    api_port: int = 0
    """0 = any free port."""
    fresh: bool = False
    """Whether the directory is emptied once it is held."""
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

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep other stacks off the directory for the length of a ``with`` block, and empty it first if ``fresh``.

        The lock is a file beside the directory. Valkey holds it too: should it outlive this process, the directory
        stays locked. Raises ``DirectoryInUse`` if another stack holds it.
        """
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        with self.directory.with_name(f"{self.directory.name}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                msg = f"another stack runs on {self.directory}; stop it, or name another directory with --dir"
                raise DirectoryInUse(msg) from error
            self.valkey.kept_open = (lock.fileno(),)
            if self.fresh:
                shutil.rmtree(self.directory, ignore_errors=True)
            yield

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
        """Drain the workers, then stop the API, then Valkey. Whoever does not end in time is killed.

        Ctrl-C and SIGTERM do not break this off: they kill all that still run, and so end the waiting.
        """
        everyone = [process for process in (*self.processes.values(), self.valkey.process) if process is not None]
        with _interrupted_by(lambda: _kill(everyone)):
            api = self.processes.pop("api", None)
            _end(list(self.processes.values()))
            _end([api] if api is not None else [])
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
                preexec_fn=die_with_parent,  # noqa: PLW1509 - one call into a library that is loaded already
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
    """Make Ctrl-C and SIGTERM end a ``with`` block by ``KeyboardInterrupt``, so that what it started is stopped.

    Only once: what comes between the first and ``Stack.stop`` must not keep that from being reached.
    """

    def interrupt() -> None:
        for number in _INTERRUPTS:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    with _interrupted_by(interrupt):
        yield


@contextlib.contextmanager
def _interrupted_by(act: Callable[[], None]) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM call ``act`` for the length of a ``with`` block."""
    before = [(number, signal.signal(number, lambda _number, _frame: act())) for number in _INTERRUPTS]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Tell processes to end, wait until they have, and kill those that take too long."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + DRAIN_TIMEOUT_S
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _kill([process])
            process.wait()


def _kill(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Kill the processes that still run, each with its whole group."""
    for process in processes:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
