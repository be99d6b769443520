"""One picture of many photographs with the boxes found on them: what a person looks at after a run."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

MARGIN_PX = 16
TITLE_PX = 34
FONT_PX = 18
MAX_COLUMNS = 6  # a narrower tile has no room for its title
ASPECT = 9 / 16  # of a tile; taller photographs get bars at their sides
PAGE, TILE, INK, FAULT = "#ffffff", "#e4e4e2", "#1d1d1f", "#a8321f"
# Distance from the insect in pixels of the tile, and colour: lines beside it, so that a tiny one stays visible.
BOX_LINES = ((2, "#e5001f"), (3, "#e5001f"), (4, "#ffffff"))


@dataclass(frozen=True, slots=True)
class ContactItem:
    image_path: Path
    boxes: Sequence[tuple[int, ...]] = ()  # x1, y1, x2, y2 in the photograph's pixels
    error: str | None = None


def write_contact_sheet(items: Sequence[ContactItem], path: Path, *, width_px: int = 2400) -> None:
    """Write a PNG of `width_px` with one tile per item, in the order given."""
    columns = min(MAX_COLUMNS, max(1, math.ceil(math.sqrt(len(items)))))
    pitch_x = (width_px - MARGIN_PX) // columns
    size = width, height = pitch_x - MARGIN_PX, round((pitch_x - MARGIN_PX) * ASPECT)
    pitch_y = TITLE_PX + height + MARGIN_PX
    page = Image.new("RGB", (width_px, MARGIN_PX + math.ceil(len(items) / columns) * pitch_y), PAGE)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=FONT_PX)
    letters = int(width / font.getlength("n"))
    for index, item in enumerate(items):
        left, top = MARGIN_PX + index % columns * pitch_x, MARGIN_PX + index // columns * pitch_y
        try:
            tile, caption = (None, "error") if item.error else _photograph(item, size)
            reason = item.error
        except OSError as error:
            tile, caption, reason = None, "unreadable", str(error)
        page.paste(tile or TILE, (left, top + TITLE_PX, left + width, top + TITLE_PX + height))
        if reason:
            text = textwrap.fill(reason, letters - 4, max_lines=height // FONT_PX // 2, placeholder=" …")
            middle = (left + width / 2, top + TITLE_PX + height / 2)
            draw.text(middle, text, FAULT, font, anchor="mm", align="center", spacing=8)
        title, room_px = item.image_path.stem, width - font.getlength(caption) - FONT_PX
        while len(title) > 1 and font.getlength(title) > room_px:
            title = f"{title[:-2]}…"
        draw.text((left, top + TITLE_PX // 2), title, INK, font, anchor="lm")
        draw.text((left + width, top + TITLE_PX // 2), caption, INK, font, anchor="rm")
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path, "PNG")


def _photograph(item: ContactItem, size: tuple[int, int]) -> tuple[Image.Image, str]:
    """Return the photograph with its boxes, padded to the tile, and what its title line says at the right."""
    with Image.open(item.image_path) as photograph:
        full = photograph.size
        photograph.draft("RGB", size)  # a JPEG is decoded at 1/8 to 1/1 of its size, whatever is just enough
        small = ImageOps.contain(photograph.convert("RGB"), size, Image.Resampling.LANCZOS)
    draw, scale = ImageDraw.Draw(small), small.width / full[0]
    for box in item.boxes:
        for margin, colour in BOX_LINES:
            x1, y1, x2, y2 = (round(value * scale) for value in box)
            draw.rectangle((x1 - margin, y1 - margin, x2 + margin, y2 + margin), outline=colour)
    return ImageOps.pad(small, size, color=TILE), f"{len(item.boxes)} found · {full[0]} x {full[1]}"
