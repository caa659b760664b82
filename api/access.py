"""Who calls: bearer tokens name tenants; with no tokens set the API is open to one tenant on loopback."""

from __future__ import annotations

import hashlib
import hmac
import re
from dataclasses import dataclass, field
from typing import Self

from core.catalogue.records import PUBLIC
from core.errors import Unauthorized

OPEN_TENANT = "default"
"""The tenant of every caller while no tokens are set."""

_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_TOKEN_CHARS_MIN = 8


@dataclass(frozen=True, slots=True)
class Access:
    """The tokens that are known, as SHA-256 digests, each with its tenant."""

    tokens: tuple[tuple[str, bytes], ...] = field(default=(), repr=False)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``tenant=token,tenant=token``. A tenant may have several tokens. Raises ``ValueError``."""
        pairs = [piece.strip().partition("=") for piece in text.split(",") if piece.strip()]
        for place, (tenant, _, token) in enumerate(pairs, start=1):
            if not _TENANT.fullmatch(tenant) or tenant == PUBLIC:
                msg = f"api_tokens, entry {place}: a tenant is 1 to 64 of A-Z a-z 0-9 _ - and is not {PUBLIC!r}"
                raise ValueError(msg)
            if len(token) < _TOKEN_CHARS_MIN:
                msg = f"api_tokens, entry {place}: a token has {_TOKEN_CHARS_MIN} characters or more"
                raise ValueError(msg)
        return cls(tuple((tenant, _digest(token)) for tenant, _, token in pairs))

    @property
    def is_open(self) -> bool:
        """Whether anybody may call."""
        return not self.tokens

    def tenant_of(self, token: str | None) -> str:
        """Name the tenant of a token. Raises ``Unauthorized``.

        Takes the same time whichever token matches, or none.
        """
        if self.is_open:
            return OPEN_TENANT
        given = _digest(token or "")
        matches = [tenant for tenant, known in self.tokens if hmac.compare_digest(known, given)]
        if not matches:
            msg = "send the header 'Authorization: Bearer <token>' with a token of this service"
            raise Unauthorized(msg)
        return matches[0]

    def may_publish(self) -> bool:
        """Whether callers may register LoRAs for everybody: only the operator of an open API, who is its sole user."""
        return self.is_open


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
