"""What counts as an object key. Every store checks with the same two functions."""

from __future__ import annotations

import unicodedata

from core.errors import InvalidKey

MAX_KEY_BYTES = 1024
"""S3's limit, in UTF-8 bytes."""
MAX_SEGMENT_BYTES = 255
"""A file name's limit on common file systems, in UTF-8 bytes."""


def check_key(key: str) -> str:
    """Give the key back if every store can hold it, else raise ``InvalidKey``."""
    check_prefix(key)
    if not key or key.endswith("/"):
        raise _invalid(key, "it is empty or ends with '/'")
    return key


def check_prefix(prefix: str) -> str:
    """Give the prefix back if a key may begin with such text, else raise ``InvalidKey``. It may end anywhere."""
    if "\\" in prefix or any(unicodedata.category(char) in {"Cc", "Cs"} for char in prefix):
        raise _invalid(prefix, "it has a backslash, a control character or half a surrogate pair")
    if len(prefix.encode()) > MAX_KEY_BYTES:
        raise _invalid(prefix, f"it is longer than {MAX_KEY_BYTES} bytes")
    *folders, last = prefix.split("/")
    if "" in folders or not {".", ".."}.isdisjoint([*folders, last]):
        raise _invalid(prefix, "it begins with '/' or has an empty, '.' or '..' segment")
    if any(len(segment.encode()) > MAX_SEGMENT_BYTES for segment in (*folders, last)):
        raise _invalid(prefix, f"a segment is longer than {MAX_SEGMENT_BYTES} bytes")
    return prefix


def _invalid(key: str, why: str) -> InvalidKey:
    shown = key if len(key) <= 80 else f"{key[:77]}..."  # noqa: PLR2004 - enough to recognise it by
    return InvalidKey(f"{shown!r} is no object key: {why}")
