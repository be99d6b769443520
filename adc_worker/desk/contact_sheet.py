"""One picture of many photographs with the boxes found on them, for people to look at."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

# The layout was chosen by eye.
MARGIN_PX = 16
TITLE_PX = 34
FONT_PX = 18
LINE_SPACING_PX = 8
MAX_COLUMNS = 6  # a narrower tile has no room for its title
ASPECT = 9 / 16  # of a tile; taller photographs get bars at their sides
PAGE_COLOUR = "#ffffff"
TILE_COLOUR = "#e4e4e2"
TEXT_COLOUR = "#1d1d1f"
ERROR_COLOUR = "#a8321f"
# Lines around an insect, so that a tiny one is seen: distance in the tile's pixels, and colour.
BOX_LINES = ((2, "#e5001f"), (3, "#e5001f"), (4, "#ffffff"))

_FONT = ImageFont.load_default(size=FONT_PX)


@dataclass(frozen=True, slots=True)
class ContactItem:
    image_path: Path
    boxes: Sequence[tuple[int, ...]] = ()  # x1, y1, x2, y2 in the photograph's pixels
    error: str | None = None


@dataclass(frozen=True, slots=True)
class _Tile:
    """A photograph, or a grey field with the reason why there is none, below a line of text."""

    caption: str  # at the right of that line, behind the file's name
    photograph: Image.Image | None = None
    reason: str = ""


def write_contact_sheet(items: Sequence[ContactItem], path: Path, *, width_px: int = 2400) -> None:
    """Write a PNG of `width_px` with one tile for each item, in the order given."""
    columns = min(MAX_COLUMNS, max(1, math.ceil(math.sqrt(len(items)))))
    rows = math.ceil(len(items) / columns)
    pitch_x = (width_px - MARGIN_PX) // columns
    width = pitch_x - MARGIN_PX
    height = round(width * ASPECT)
    pitch_y = TITLE_PX + height + MARGIN_PX
    page = Image.new("RGB", (width_px, MARGIN_PX + rows * pitch_y), PAGE_COLOUR)
    for index, item in enumerate(items):
        row, column = divmod(index, columns)
        left = MARGIN_PX + column * pitch_x
        top = MARGIN_PX + row * pitch_y
        tile = _make_tile(item, (width, height))
        _draw_title(page, (left, top + TITLE_PX // 2), width, item.image_path.stem, tile.caption)
        _draw_tile(page, (left, top + TITLE_PX), (width, height), tile)
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path, "PNG")


def _make_tile(item: ContactItem, size: tuple[int, int]) -> _Tile:
    if item.error:
        return _Tile("error", reason=item.error)
    try:
        with Image.open(item.image_path) as image:
            full_width, full_height = image.size
            image.draft("RGB", size)  # decodes a JPEG at a reduced size that is still large enough
            photograph = ImageOps.contain(image.convert("RGB"), size, Image.Resampling.LANCZOS)
    except OSError as error:
        return _Tile("unreadable", reason=str(error))
    _draw_boxes(photograph, item.boxes, photograph.width / full_width)
    caption = f"{len(item.boxes)} found · {full_width} x {full_height}"
    return _Tile(caption, ImageOps.pad(photograph, size, color=TILE_COLOUR))


def _draw_boxes(photograph: Image.Image, boxes: Sequence[tuple[int, ...]], scale: float) -> None:
    draw = ImageDraw.Draw(photograph)
    for box in boxes:
        x1, y1, x2, y2 = (round(value * scale) for value in box)
        for margin, colour in BOX_LINES:
            frame = (x1 - margin, y1 - margin, x2 + margin, y2 + margin)
            draw.rectangle(frame, outline=colour)


def _draw_title(page: Image.Image, left_middle: tuple[int, int], width: int, title: str, caption: str) -> None:
    """Draw the file's name at the left, shortened if it must be, and the caption at the right."""
    left, middle = left_middle
    room_px = width - _FONT.getlength(caption) - FONT_PX
    while len(title) > 1 and _FONT.getlength(title) > room_px:
        title = f"{title[:-2]}…"
    draw = ImageDraw.Draw(page)
    draw.text((left, middle), title, TEXT_COLOUR, _FONT, anchor="lm")
    draw.text((left + width, middle), caption, TEXT_COLOUR, _FONT, anchor="rm")


def _draw_tile(page: Image.Image, left_top: tuple[int, int], size: tuple[int, int], tile: _Tile) -> None:
    left, top = left_top
    width, height = size
    page.paste(tile.photograph or TILE_COLOUR, (left, top, left + width, top + height))
    if not tile.reason:
        return
    letters = int(width / _FONT.getlength("n")) - 4
    lines = height // FONT_PX // 2
    text = textwrap.fill(tile.reason, letters, max_lines=lines, placeholder=" …")
    ImageDraw.Draw(page).text(
        (left + width / 2, top + height / 2),
        text,
        ERROR_COLOUR,
        _FONT,
        anchor="mm",
        align="center",
        spacing=LINE_SPACING_PX,
    )
