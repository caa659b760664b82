"""The adapter types, one file each. A new type is a file here and an entry in ``TYPES``.

``refused`` names those that are recognised but not fused: a type that becomes an entry here leaves that list.
"""

from __future__ import annotations

from worker.lora.adapters.base import Adapter
from worker.lora.adapters.lora import LowRank

TYPES: tuple[type[Adapter], ...] = (LowRank,)
