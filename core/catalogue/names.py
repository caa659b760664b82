"""Which names a LoRA may have: what can stand in a ``<lora:…>`` tag and in a URL, and is never a path."""

from __future__ import annotations

import unicodedata

from core.errors import InvalidRequest

NAME_CHARS = 128
"""Longest name."""

_PUNCTUATION = frozenset(" ._-()+")
_SHOWN_CHARS = 40


def check_name(name: str) -> None:
    """Raise ``InvalidRequest`` unless ``name`` is one: letters of any script, digits, space and ``. _ - ( ) +``.

    Names are compared exactly: no case folding, no normalisation.
    """
    if not 1 <= len(name) <= NAME_CHARS:
        msg = f"a LoRA name has 1 to {NAME_CHARS} characters; this one has {len(name)}"
        raise InvalidRequest(msg)
    wrong = next((char for char in name if not _may_stand(char)), None)
    if wrong is not None:
        msg = (
            f"{_shown(name)} is no LoRA name: {wrong!a} may not stand in it; use letters, digits, space and . _ - ( ) +"
        )
        raise InvalidRequest(msg)
    if name != name.strip() or not name.strip(". "):
        msg = f"{_shown(name)} is no LoRA name: it begins or ends with a space, or has only dots"
        raise InvalidRequest(msg)


def _may_stand(char: str) -> bool:
    # L letters, M marks that letters of many scripts carry, N digits
    return char in _PUNCTUATION or unicodedata.category(char)[0] in "LMN"


def _shown(name: str) -> str:
    return ascii(name if len(name) <= _SHOWN_CHARS else name[: _SHOWN_CHARS - 3] + "...")
