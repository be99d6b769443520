"""A contact sheet shows every item, its boxes or its reason, and stays a file one can mail."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from PIL import Image

from adc_worker.desk.contact_sheet import ContactItem, write_contact_sheet

if TYPE_CHECKING:
    from pathlib import Path

RED, TILE = (229, 0, 31), (228, 228, 226)


@pytest.fixture
def photograph(tmp_path: Path) -> Path:
    path = tmp_path / "white.jpg"
    Image.new("RGB", (1600, 900), "white").save(path)
    return path


def colours(path: Path) -> dict[tuple[int, ...], int]:
    with Image.open(path) as page:
        counted = page.convert("RGB").getcolors(maxcolors=1 << 24) or []
    return {colour: count for count, colour in counted if isinstance(colour, tuple)}


def write(tmp_path: Path, items: list[ContactItem], width_px: int = 600) -> Path:
    path = tmp_path / "deep" / "contact.png"
    write_contact_sheet(items, path, width_px=width_px)
    return path


def test_boxes_are_drawn_and_even_a_tiny_one_is_visible(tmp_path: Path, photograph: Path) -> None:
    """A 30 px insect is a few pixels on a tile; its frame is larger."""
    page = write(tmp_path, [ContactItem(photograph, [(800, 450, 802, 452)])])
    assert colours(page)[RED] >= 40


def test_no_box_is_drawn_where_nothing_was_found(tmp_path: Path, photograph: Path) -> None:
    """Red means found."""
    assert RED not in colours(write(tmp_path, [ContactItem(photograph)]))


def test_an_error_is_a_grey_tile_with_its_reason(tmp_path: Path, photograph: Path) -> None:
    """The reason is shown instead of the photograph, however long it is."""
    page = write(tmp_path, [ContactItem(photograph, error="404 Not Found " * 60)])
    seen = colours(page)
    assert seen[TILE] > 20_000
    assert len(seen) > 20  # the letters' edges


def test_a_file_that_is_no_photograph_is_shown_as_such(tmp_path: Path) -> None:
    """One bad file does not cost the page."""
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8 not a jpeg")
    page = write(tmp_path, [ContactItem(broken), ContactItem(tmp_path / "gone.jpg")])
    assert colours(page)[TILE] > 20_000


def test_every_item_has_its_tile_in_the_order_given(tmp_path: Path, photograph: Path) -> None:
    """Row by row: the item with a box is the second of four."""
    items = [ContactItem(photograph) for _ in range(4)]
    items[1] = ContactItem(photograph, [(100, 100, 1500, 800)])
    with Image.open(write(tmp_path, items)) as page:
        pixels = page.convert("RGB")
    quarters = [(0, 0), (300, 0), (0, pixels.height // 2), (300, pixels.height // 2)]
    red = [
        any(
            colour == RED for _, colour in pixels.crop((x, y, x + 300, y + pixels.height // 2)).getcolors(1 << 20) or []
        )
        for x, y in quarters
    ]
    assert red == [False, True, False, False]


def test_no_items_give_an_empty_page(tmp_path: Path) -> None:
    """A job without images is no crash."""
    with Image.open(write(tmp_path, [])) as page:
        assert page.width == 600
