"""Drawn photographs are reproducible, have true boxes, and files as large as a camera's."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from adc_worker.desk.sheets import LARGE, TYPICAL, Grain, draw_sheet, write_sheets

if TYPE_CHECKING:
    from pathlib import Path


def test_a_seed_gives_one_photograph() -> None:
    """The same seed the same pixels, another seed others."""
    first, again, other = (draw_sheet((512, 270), seed) for seed in (7, 7, 8))
    np.testing.assert_array_equal(first.image, again.image)
    assert first.boxes == again.boxes
    assert (first.image != other.image).any()


def test_boxes_hold_dark_insects_and_do_not_touch() -> None:
    """Ground truth is inside the photograph, darker than the sheet, one box per insect."""
    sheet = draw_sheet((1024, 540), 3)
    assert sheet.image.shape == (540, 1024, 3)
    assert sheet.image.dtype == np.uint8
    assert len(sheet.boxes) == 24
    lit = np.median(sheet.image)
    for x1, y1, x2, y2 in sheet.boxes:
        assert 0 <= x1 < x2 <= 1024
        assert 0 <= y1 < y2 <= 540
        assert np.percentile(sheet.image[y1:y2, x1:x2], 30) < 0.8 * lit
    for a, b in combinations(sheet.boxes, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_noise_never_wraps_around() -> None:
    """Bytes keep their distance from 0 and 255 before noise is added to them."""
    image = draw_sheet((512, 270), 1, insects=0, noise_sigma=LARGE.noise_sigma).image.astype(int)
    assert np.abs(image - image.mean()).max() < 130


def test_a_tiny_photograph_stays_without_insects() -> None:
    """Nothing fits on three pixels."""
    assert draw_sheet((4, 3), 0).boxes == []


@pytest.mark.parametrize(
    ("grain", "least", "most"),
    # 1.5-2 MB at 4096x2160 and 26-30 MB at 4096x3072, in bytes per pixel
    [(TYPICAL, 0.17, 0.23), (LARGE, 2.06, 2.39)],
    ids=["typical", "large"],
)
def test_files_have_the_bytes_per_pixel_of_their_grain(tmp_path: Path, grain: Grain, least: float, most: float) -> None:
    """Held at a quarter of the size: bytes per pixel hardly depend on it."""
    (path,) = write_sheets(tmp_path, 1, 0, sizes=((1024, 768),), grain=grain)
    assert least < path.stat().st_size / (1024 * 768) < most


def test_sizes_take_turns_and_files_are_what_was_asked_for(tmp_path: Path) -> None:
    """Names sort in order of writing."""
    written = write_sheets(tmp_path / "sheets", 3, 0, sizes=((256, 135), (256, 192)))
    assert written == sorted((tmp_path / "sheets").iterdir())
    opened = []
    for path in written:
        with Image.open(path) as image:
            opened.append(image.size)
    assert opened == [(256, 135), (256, 192), (256, 135)]


def test_the_same_arguments_write_the_same_bytes(tmp_path: Path) -> None:
    """A benchmark can be repeated elsewhere."""
    (a,), (b,) = (write_sheets(tmp_path / name, 1, 4, sizes=((256, 135),)) for name in "ab")
    assert a.read_bytes() == b.read_bytes()
