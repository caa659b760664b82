"""What ``lora_adapter_metadata``, the JSON that diffusers writes from PEFT's configuration, says of scaling."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from core.errors import LoraFileInvalid, LoraUnsupported
from worker.lora.adapters.base import Declared

METADATA_KEY = "lora_adapter_metadata"
_PREFIXES = {"unet": "unet.", "te": "text_encoder.", "te2": "text_encoder_2.", "te3": "text_encoder_3."}
_RESIDUAL_STARTS = ("pissa", "olora", "corda", "loftq")
"""Initialisations after which the file's change belongs to a residual of the base, not to the base itself."""
_PLAIN_NAME = re.compile(r"[\w.]+")


class Declarations:
    """The declared alphas of a file's modules.

    Raises:
        LoraFileInvalid: the JSON is not what diffusers writes.
        LoraUnsupported: it declares something that changes the meaning of the tensors.
    """

    def __init__(self, metadata: Mapping[str, str]) -> None:
        try:
            self._entries = json.loads(metadata.get(METADATA_KEY, "{}"))
        except (ValueError, RecursionError) as error:
            msg = f"the metadata entry {METADATA_KEY} is no valid JSON"
            raise LoraFileInvalid(msg) from error
        if not isinstance(self._entries, dict):
            msg = f"the metadata entry {METADATA_KEY} is no JSON object"
            raise LoraFileInvalid(msg)
        for name, value in self._entries.items():
            if name.endswith("init_lora_weights") and str(value).lower().startswith(_RESIDUAL_STARTS):
                msg = f"the file is an unconverted {str(value)[:20]} LoRA: convert it to plain LoRA first"
                raise LoraUnsupported(msg)

    def of(self, component: str, stem: str) -> Declared:
        """Read what is declared for the module of ``component`` that the file calls ``stem``."""
        prefix = _PREFIXES[component]
        alpha = self._pattern(prefix, stem, self._entries.get(f"{prefix}lora_alpha"))
        if alpha is None:
            return Declared()
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            msg = f"{METADATA_KEY} declares the alpha {str(alpha)[:40]!r}, which is no number"
            raise LoraFileInvalid(msg)
        return Declared(float(alpha), bool(self._entries.get(f"{prefix}use_rslora")))

    def _pattern(self, prefix: str, stem: str, otherwise: Any) -> Any:
        """Find the module's own alpha: PEFT's patterns end a module's path. Only literal ones are read."""
        patterns = self._entries.get(f"{prefix}alpha_pattern") or {}
        if not isinstance(patterns, dict):
            msg = f"{METADATA_KEY}: alpha_pattern is no JSON object"
            raise LoraFileInvalid(msg)
        for pattern, alpha in patterns.items():
            path = pattern.removeprefix("^").replace("\\.", ".")
            if not _PLAIN_NAME.fullmatch(path):
                msg = f"alpha_pattern {pattern[:80]!r} is a regular expression; only module names are supported"
                raise LoraUnsupported(msg)
            if stem in {path, prefix + path} or (pattern[:1] != "^" and stem.endswith("." + path)):
                return alpha
        return otherwise
