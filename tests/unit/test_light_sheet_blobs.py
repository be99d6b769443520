"""Boxes sit on insects, drawn and real, and on nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from adc_worker.desk.sheets import draw_sheet
from adc_worker.models.light_sheet_blobs import ALGORITHM, MAX_DETECTIONS, LightSheetBlobs
from adc_worker.models.pipeline import Detections, Detector

PHOTOGRAPHS = Path(__file__).parents[3] / "shared" / "images"
# Insects, screws, scale bars and crumbs that a person counts at a glance, widely.
PLAUSIBLE_COUNTS = {
    "cyprus-1": (15, 30),
    "denmark-1": (2, 5),
    "dslr-1": (0, 3),
    "panama-1": (40, 75),
    "vermont-1": (18, 35),
    "vermont-2": (18, 40),
}


def detect(image: npt.NDArray[np.uint8]) -> Detections:
    """Run on one [H, W, 3] photograph, as a permuted view of interleaved memory."""
    (found,) = LightSheetBlobs().detect(torch.from_numpy(image[None]).permute(0, 3, 1, 2))
    return found


def overlaps(found: Detections, truth: list[tuple[int, int, int, int]]) -> npt.NDArray[np.float64]:
    """Intersection over union, [found, truth]."""
    a, b = found.boxes_px[:, None].astype(np.int64), np.array(truth)[None]
    shared = (np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])).clip(min=0).prod(-1)
    areas = [(box[..., 2:] - box[..., :2]).prod(-1) for box in (a, b)]
    return np.asarray(shared / (areas[0] + areas[1] - shared))


def grey(height: int, width: int, value: int) -> npt.NDArray[np.uint8]:
    return np.full((height, width, 3), value, np.uint8)


def test_it_is_a_detector_with_an_algorithm() -> None:
    """The port is kept and results can be named."""
    detector: Detector = LightSheetBlobs()
    assert detector.algorithm is ALGORITHM
    assert ALGORITHM.key == "light_sheet_blobs"


@pytest.mark.parametrize("size", [(1024, 540), (1024, 768), (2048, 1080)])
def test_drawn_insects_are_found_one_box_each(size: tuple[int, int]) -> None:
    """Nine in ten with IoU 0.3 or better, and at most one box in ten elsewhere."""
    found_insects = insects = false_boxes = boxes = 0
    for seed in range(4):
        sheet = draw_sheet(size, seed)
        found = detect(sheet.image)
        good = overlaps(found, sheet.boxes) >= 0.3
        found_insects, insects = found_insects + int(good.any(axis=0).sum()), insects + len(sheet.boxes)
        false_boxes, boxes = false_boxes + int((~good.any(axis=1)).sum()), boxes + len(good)
    assert insects > 60
    assert found_insects >= 0.9 * insects
    assert false_boxes <= 0.1 * boxes


def test_boxes_are_whole_pixels_inside_the_image_best_first() -> None:
    """What Detections promises, also for an image whose sides are no multiple of the shrinking step."""
    image = draw_sheet((2051, 1087), 5).image
    found = detect(image)
    x1, y1, x2, y2 = found.boxes_px.T
    assert found.boxes_px.dtype == np.int32
    assert found.scores.dtype == np.float32
    assert len(found.scores) == len(found.boxes_px) > 10
    assert (x1 >= 0).all()
    assert (y1 >= 0).all()
    assert (x1 < x2).all()
    assert (y1 < y2).all()
    assert (x2 <= 2051).all()
    assert (y2 <= 1087).all()
    assert (np.diff(found.scores) <= 0).all()
    assert 0 < found.scores.min() <= found.scores.max() <= 1


@pytest.mark.parametrize(
    "image",
    [grey(1, 1, 255), grey(3, 5, 90), grey(1, 4000, 200), grey(9, 9, 200)]
    + [grey(270, 512, value) for value in (0, 128, 255)],
    ids=lambda image: f"{image.shape[1]}x{image.shape[0]}-{image[0, 0, 0]}",
)
def test_an_even_image_of_any_size_holds_nothing(image: npt.NDArray[np.uint8]) -> None:
    """No crash on a single pixel, no box on black, grey or white."""
    assert len(detect(image).boxes_px) == 0


def test_an_empty_sheet_holds_nothing() -> None:
    """Uneven light, folds and sensor noise are no insects."""
    assert [len(detect(draw_sheet((1024, 540), seed, insects=0).image).boxes_px) for seed in range(3)] == [0, 0, 0]


@pytest.mark.parametrize("size", [(270, 512), (540, 1024), (1080, 2048)])
def test_pure_noise_holds_nothing(size: tuple[int, int]) -> None:
    """Neither all bytes alike nor a normal distribution on grey."""
    rng = np.random.default_rng(1)
    assert len(detect(rng.integers(0, 256, (*size, 3), np.uint8)).boxes_px) == 0
    assert len(detect(rng.normal(180, 25, (*size, 3)).clip(0, 255).astype(np.uint8)).boxes_px) == 0


def test_a_soft_shadow_is_no_insect_but_hides_none() -> None:
    """Shadows fade in; an insect inside one keeps its own sharp rim."""
    y, x = np.mgrid[0:540, 0:1024]
    image = np.repeat((220 - 130 * np.exp(-((x - 700) ** 2 + (y - 250) ** 2) / 120**2))[:, :, None], 3, axis=2)
    assert len(detect(image.astype(np.uint8)).boxes_px) == 0
    image[240:252, 690:714] *= 0.4
    (box,) = detect(image.astype(np.uint8)).boxes_px
    assert np.abs(box - (690, 240, 714, 252)).max() <= 3


def test_a_crowded_sheet_is_capped() -> None:
    """The strongest boxes are kept, so that one image cannot fill the result queue."""
    image = grey(540, 1024, 220)
    for top in range(4, 520, 16):
        for left in range(4, 1000, 16):
            image[top : top + 7, left : left + 7] = 40
    assert len(detect(image).boxes_px) == MAX_DETECTIONS


def test_an_image_gets_the_same_boxes_alone_and_in_company() -> None:
    """A chunk of three equals three chunks of one."""
    images = np.stack([draw_sheet((512, 270), seed).image for seed in range(3)])
    together = LightSheetBlobs().detect(torch.from_numpy(images).permute(0, 3, 1, 2))
    for image, found in zip(images, together, strict=True):
        alone = detect(image)
        np.testing.assert_array_equal(alone.boxes_px, found.boxes_px)
        np.testing.assert_array_equal(alone.scores, found.scores)


def test_memory_layout_does_not_matter() -> None:
    """Interleaved, planar, and cut out of a larger buffer: the same pixels give the same boxes."""
    image = torch.from_numpy(draw_sheet((1200, 634), 2).image).permute(2, 0, 1)[None]
    roomy = torch.zeros((1, 3, 700, 1300), dtype=torch.uint8)
    roomy[:, :, 10:644, 50:1250] = image
    results = [LightSheetBlobs().detect(x)[0] for x in (image, image.contiguous(), roomy[:, :, 10:644, 50:1250])]
    assert len(results[0].boxes_px) > 0
    for other in results[1:]:
        np.testing.assert_array_equal(results[0].boxes_px, other.boxes_px)
        np.testing.assert_array_equal(results[0].scores, other.scores)


@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason="the photographs are not in this checkout")
@pytest.mark.parametrize("name", sorted(PLAUSIBLE_COUNTS))
def test_real_photographs_get_a_plausible_number_of_boxes_on_dark_objects(name: str) -> None:
    """Each box is darker in its middle range than the sheet around it."""
    image = np.array(Image.open(PHOTOGRAPHS / f"{name}.jpg").convert("RGB"))
    found = detect(image)
    low, high = PLAUSIBLE_COUNTS[name]
    assert low <= len(found.boxes_px) <= high
    darkest = image.min(axis=2)
    for x1, y1, x2, y2 in found.boxes_px:
        around = darkest[max(0, y1 - 40) : y2 + 40, max(0, x1 - 40) : x2 + 40]
        assert np.percentile(darkest[y1:y2, x1:x2], 25) < 0.9 * np.percentile(around, 90)
