"""One picture of many photographs with the boxes found on them: what a person looks at after a run."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

Box = tuple[int, int, int, int]  # x1, y1, x2, y2 in the photograph's pixels

MARGIN_PX = 16
TITLE_PX = 34
FONT_PX = 18
MAX_COLUMNS = 6  # a narrower tile has no room for its title
ASPECT = 9 / 16  # of a tile; taller photographs get bars at their sides
PAGE, TILE, INK, FAINT, FAULT = "#ffffff", "#e4e4e2", "#1d1d1f", "#6e6e73", "#a8321f"
# Distance from the insect in pixels of the tile, and colour: lines beside it, so that a tiny one stays visible.
BOX_LINES = ((2, "#e5001f"), (3, "#e5001f"), (4, "#ffffff"))


@dataclass(frozen=True, slots=True)
class ContactItem:
    image_path: Path | None
    title: str
    boxes: list[Box] = field(default_factory=list)
    error: str | None = None


def write_contact_sheet(items: Sequence[ContactItem], path: Path, *, width_px: int = 2400) -> None:
    """Write a PNG of `width_px` with one tile per item, in the order given."""
    columns = min(MAX_COLUMNS, max(1, math.ceil(math.sqrt(len(items)))))
    pitch_x = (width_px - MARGIN_PX) // columns
    width, height = pitch_x - MARGIN_PX, round((pitch_x - MARGIN_PX) * ASPECT)
    pitch_y = TITLE_PX + height + MARGIN_PX
    page = Image.new("RGB", (width_px, MARGIN_PX + math.ceil(len(items) / columns) * pitch_y), PAGE)
    for index, item in enumerate(items):
        left, top = MARGIN_PX + index % columns * pitch_x, MARGIN_PX + index // columns * pitch_y
        tile, caption = _tile(item, (width, height))
        page.paste(tile, (left, top + TITLE_PX))
        _title(ImageDraw.Draw(page), (left, top), width, item.title, caption)
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path, "PNG")


def _tile(item: ContactItem, size: tuple[int, int]) -> tuple[Image.Image, str]:
    """The tile, and what its title line says at the right."""
    if item.error is not None or item.image_path is None:
        return _reason_tile(item.error or "no photograph kept", size), "error" if item.error else ""
    try:
        with Image.open(item.image_path) as photograph:
            full = photograph.size
            photograph.draft("RGB", size)  # a JPEG is decoded at 1/8 to 1/1 of its size, whatever is just enough
            small = photograph.convert("RGB")
    except OSError as error:
        return _reason_tile(f"{item.image_path.name}: {error}", size), "unreadable"
    small = ImageOps.contain(small, size, Image.Resampling.LANCZOS)
    _draw_boxes(small, item.boxes, small.width / full[0])
    return ImageOps.pad(small, size, color=TILE), f"{len(item.boxes)} found · {full[0]} x {full[1]}"


def _draw_boxes(image: Image.Image, boxes: Sequence[Box], scale: float) -> None:
    draw = ImageDraw.Draw(image)
    for x1, y1, x2, y2 in boxes:
        for margin, colour in BOX_LINES:
            corners = (round(x1 * scale) - margin, round(y1 * scale) - margin)
            draw.rectangle((*corners, round(x2 * scale) + margin, round(y2 * scale) + margin), outline=colour)


def _reason_tile(reason: str, size: tuple[int, int]) -> Image.Image:
    tile = Image.new("RGB", size, TILE)
    font = ImageFont.load_default(size=FONT_PX)
    columns = max(8, int((size[0] - 2 * MARGIN_PX) / font.getlength("n")))
    text = textwrap.fill(reason, columns, max_lines=max(1, size[1] // FONT_PX // 2), placeholder=" …")
    ImageDraw.Draw(tile).text((size[0] / 2, size[1] / 2), text, FAULT, font, anchor="mm", align="center", spacing=8)
    return tile


def _title(draw: ImageDraw.ImageDraw, corner: tuple[int, int], width: int, title: str, caption: str) -> None:
    """Title at the left, shortened in its middle where it would run into the caption at the right."""
    font = ImageFont.load_default(size=FONT_PX)
    middle, room, kept = corner[1] + TITLE_PX // 2, width - font.getlength(caption) - MARGIN_PX, len(title)
    while kept > 1 and font.getlength(title) > room:
        kept -= 1
        title = f"{title[: kept // 2]}…{title[-(kept // 2) :]}"
    draw.text((corner[0], middle), title, INK, font, anchor="lm")
    draw.text((corner[0] + width, middle), caption, FAINT, font, anchor="rm")
