"""Adapter types and other files that are recognised by their tensors' names and refused by name."""

from __future__ import annotations

import re
from collections.abc import Iterable

from core.errors import LoraUnsupported

REFUSED = (
    ("the layout of cloneofsimo's lora (unet:N:up)", r"^(?:unet|text_encoder):\d+:(?:up|down)$"),
    ("textual inversion", r"^emb_params$|string_to_param|^<[^>]*>$|^bundle_emb\.|^clip_[lg]$"),
    ("ControlNet-LLLite", r"lllite"),
    ("Control-LoRA", r"^lora_controlnet$"),
    ("IP-Adapter", r"^(?:image_proj|ip_adapter)(?:_model)?\."),
    ("a whole checkpoint", r"^(?:model\.diffusion_model|first_stage_model|cond_stage_model|conditioner)\."),
    ("DoRA (dora_scale)", r"\.dora_scale$|\.lora_magnitude_vector|\.magnitude$"),
    ("LoHa (hada_*)", r"\.hada_(?:w[12]|t[12])"),
    ("LoKr (lokr_*)", r"\.lokr_(?:w[12]|t[12])"),
    ("LoCon with a Tucker core (lora_mid)", r"\.lora_mid\.weight$"),
    ("OFT or BOFT (oft_*, boft_*)", r"\.oft_(?:blocks|diag|R)|\.boft_|^oft_unet_"),
    ("GLoRA (a1, a2, b1, b2)", r"\.(?:a1|a2|b1|b2|bm)\.weight$|\.glora_"),
    ("IA3", r"\.on_input$|\.ia3_l"),
    ("full weight changes (diff)", r"\.diff(?:_b)?$|\.set_weight$"),
    ("norm changes (w_norm, b_norm)", r"\.[wb]_norm$"),
    ("LoRA with bias changes", r"\.lora_B\.(?:[^.]+\.)?bias$|\.bias_(?:indices|values|size)$"),
    ("LoRA that reshapes its weight (reshape_weight)", r"\.reshape_weight$"),
    ("T-LoRA (lambda_layer)", r"\.lambda_layer$"),
    ("VeRA", r"\.vera_"),
    ("DeLoRA", r"\.delora_"),
    ("XLabs' FLUX LoRA", r"\.processor\.(?:qkv|proj)_lora\d?\."),
)
"""What a file is, for the message, and the pattern that any one of its tensors' names shows."""

_PATTERNS = tuple((kind, re.compile(pattern)) for kind, pattern in REFUSED)
_NAMED_ADAPTER = re.compile(r"\.lora_[AB]\.([^.]+)\.weight$")


def refuse_unsupported(keys: Iterable[str]) -> None:
    """Raise ``LoraUnsupported``, naming the type, when any tensor of the file belongs to a refused one."""
    keys = list(keys)
    for kind, pattern in _PATTERNS:
        found = [key for key in keys if pattern.search(key)]
        if found:
            msg = (
                f"this file is or holds {kind}, which is not supported: {found[0]!r} and {len(found) - 1} more tensors"
            )
            raise LoraUnsupported(msg)
    adapters = {match[1] for key in keys if (match := _NAMED_ADAPTER.search(key))}
    if len(adapters) > 1:
        msg = f"the file holds {len(adapters)} adapters ({', '.join(sorted(adapters)[:4])}); save one adapter to a file"
        raise LoraUnsupported(msg)
