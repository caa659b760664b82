"""A labelled contact sheet."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

CELL = 128
"""Pixels of a picture's side on the sheet."""
CAPTION = 40
"""Pixels of the text beneath a picture."""
MARGIN = 12
LABEL = 150
"""Pixels of the column of row labels."""


def contact_sheet(rows: Sequence[tuple[str, Sequence[tuple[str, Path]]]], path: Path) -> None:
    """Lay out rows of (label, [(caption, picture)…]) as one PNG."""
    columns = max(len(pictures) for _, pictures in rows)
    width = LABEL + columns * (CELL + MARGIN) + MARGIN
    height = len(rows) * (CELL + CAPTION + MARGIN) + MARGIN
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    bold, small = ImageFont.load_default(size=15), ImageFont.load_default(size=11)
    for row, (label, pictures) in enumerate(rows):
        top = MARGIN + row * (CELL + CAPTION + MARGIN)
        draw.multiline_text((MARGIN, top + CELL // 2 - 16), textwrap.fill(label, 16), fill="black", font=bold)
        for column, (caption, picture) in enumerate(pictures):
            left = LABEL + column * (CELL + MARGIN)
            with Image.open(picture) as image:
                sheet.paste(image.convert("RGB").resize((CELL, CELL), Image.Resampling.NEAREST), (left, top))
            draw.multiline_text(
                (left, top + CELL + 3), textwrap.fill(caption, 22), fill="#444444", font=small, spacing=2
            )
    sheet.save(path)
