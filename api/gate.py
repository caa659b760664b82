"""A bound on calls that hold a thread for long: so many at once, so that threads are left for all others."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from core.errors import Busy


class Gate:
    """Has places for ``most`` calls of this process at once."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._places = threading.BoundedSemaphore(most)

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place while the block runs. Raises ``Busy`` without waiting if all are taken."""
        if not self._places.acquire(blocking=False):
            msg = f"{self._most} calls of this kind are under way in this process; try again when one is done"
            raise Busy(msg)
        try:
            yield
        finally:
            self._places.release()
