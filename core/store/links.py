"""Signed links to the objects of a store that has no web server of its own."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, field
from urllib.parse import quote

ROUTE = "/v1/files/"
"""Path of the API's route that serves such links."""


@dataclass(frozen=True, slots=True)
class LinkSigner:
    """Makes and checks links ``{public_url}/v1/files/{key}?expires=...&signature=...``."""

    public_url: str
    """Base URL by which clients reach the API."""
    secret: str = field(repr=False)

    def link(self, key: str, expires: int) -> str:
        """Make a link that is good until ``expires``, in seconds since the epoch."""
        signature = self._signature(key, expires)
        return f"{self.public_url.rstrip('/')}{ROUTE}{quote(key)}?expires={expires}&signature={signature}"

    def verify(self, key: str, expires: int, signature: str, now: float) -> bool:
        """Say whether the signature is ours for this key and time, and the time has not come yet."""
        genuine = hmac.compare_digest(self._signature(key, expires).encode(), signature.encode(errors="replace"))
        return genuine and now < expires

    def _signature(self, key: str, expires: int) -> str:
        return hmac.new(self.secret.encode(), f"{expires}:{key}".encode(), hashlib.sha256).hexdigest()
