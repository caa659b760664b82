"""An image as bytes, with the parameters that made it in A1111's infotext form.

The text stands in the PNG chunk ``parameters``: prompt, ``Negative prompt:`` line, one line of settings. Values that
hold a comma, a colon or a line break are JSON-quoted (A1111 ``infotext_utils.py``).
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from core.job import JobSpec


def infotext(spec: JobSpec, index: int, short_hashes: Mapping[str, str]) -> str:
    """Write the parameters of image ``index``. ``short_hashes``: LoRA digest → 12 hex digits of its AutoV3 hash."""
    tags = "".join(_tag(ref.name, ref.te, ref.unet) for ref in spec.loras)
    settings = {
        "Steps": spec.steps,
        "Sampler": spec.sampler,
        "CFG scale": f"{spec.guidance:g}",
        "Seed": spec.seed + index,
        "Size": f"{spec.width}x{spec.height}",
        "Model hash": spec.model_digest[:10],
        "Model": spec.model,
    }
    hashes = ", ".join(
        f"{_plain(ref.name)}: {short_hashes[ref.digest]}" for ref in spec.loras if ref.digest in short_hashes
    )
    if hashes:
        settings["Lora hashes"] = hashes
    lines = [f"{spec.prompt}{' ' if spec.prompt and tags else ''}{tags}"]
    if spec.negative_prompt:
        lines.append(f"Negative prompt: {spec.negative_prompt}")
    lines.append(", ".join(f"{name}: {_quoted(str(value))}" for name, value in settings.items()))
    return "\n".join(lines)


def png(image: Image.Image, text: str) -> bytes:
    """Encode an image as PNG with its infotext."""
    info = PngInfo()
    info.add_text("parameters", text) if text.isascii() else info.add_itxt("parameters", text)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def _tag(name: str, te: float, unet: float) -> str:
    return f"<lora:{name}:{unet:g}>" if te == unet else f"<lora:{name}:{te:g}:{unet:g}>"


def _plain(name: str) -> str:
    return name.replace(":", "").replace(",", "")


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ",:\n") else value
