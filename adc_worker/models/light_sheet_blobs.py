"""Dark objects on a bright sheet, by local contrast and connected components; needs no weights.

It does not tell an insect from a screw or a scale bar, and finds little where there is no bright
background.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812 -- the name all torch code uses

from adc_worker.models.pipeline import Algorithm, Detections

ALGORITHM = Algorithm(
    name="Light sheet blobs",
    key="light_sheet_blobs",
    task_type="localization",
    description="Dark objects on a bright sheet, by local contrast and connected components.",
)

# Every number below was chosen by eye on light-trap photographs from four countries. The unit tests
# hold their effect. Lengths are in working pixels: the image is shrunk until its longer side is at
# most WORKING_SIDE_PX, which takes a width of 4096 to a quarter.
WORKING_SIDE_PX = 1024
SAMPLES_PER_STEP = 4  # along each axis; 16 samples fit in int16 and average the sensor noise away
CELL_PX = 8  # grain of the background estimate
# The background is bridged over objects up to 2 * radius + 1 cells broad. The first radius follows
# shadows and vignettes. The second spans luna moths: a fifth of the width of a photograph.
BRIDGE_RADII_CELLS = (3, 13)
DARKEST_SHEET = 25.0  # of 255; below it there is no lit sheet to stand out from

PIXEL_CONTRAST = 0.16  # share of the background's brightness that is missing
BLOB_CONTRAST = 0.22  # the same as a blob's mean: stains and dirt stay below it
RIM_SHARE = 0.5  # of the threshold, gained across the rim: shadows fade in, insects do not
MIN_AREA_PX = 14
MIN_LONG_SIDE_PX = 6  # 24 source pixels at 4096 wide: smaller ones are dust as often as insects
NOISE_SIGMAS = 6.0  # one pixel in a billion by chance; photographs shrink to half a million
RIM_PX = 2  # the shrunk image's edges are as wide as its smoothing
SAME_OBJECT_SHARE = 0.6  # of a box inside a larger one: a patch of the same wing
MAX_DETECTIONS = 500  # Antenna's present detector returns no more (its box_detections_per_img)

SIGMAS_PER_MEDIAN_DEVIATION = 1.4826  # of a normal distribution

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


class _Blobs(NamedTuple):
    boxes: Integers  # [blobs, 4]: x1, y1, x2, y2 in working pixels
    scores: Floats  # [blobs]: mean contrast


class _Runs(NamedTuple):
    """Runs of consecutive pixels in a flattened image, ordered by connected component."""

    starts: Integers  # [runs]: position of the first pixel
    ends: Integers  # [runs]: position behind the last pixel
    firsts: Integers  # [components]: index of the component's first run


class LightSheetBlobs:
    algorithm = ALGORITHM

    def detect(self, images: torch.Tensor) -> list[Detections]:
        return [_detect(image) for image in images]


def _detect(image: torch.Tensor) -> Detections:
    _, height, width = image.shape
    step = max(1, -(-max(height, width) // WORKING_SIDE_PX))
    if min(height, width) // step < MIN_LONG_SIDE_PX:
        return Detections(np.empty((0, 4), np.int32), np.empty(0, np.float32))
    sheet = _shrink(image, step)
    found = []
    for radius in BRIDGE_RADII_CELLS:
        contrast = _contrast(sheet, radius).cpu().numpy()
        found.append(_find_blobs(contrast, radius))
    boxes = np.concatenate([blobs.boxes for blobs in found])
    scores = np.concatenate([blobs.scores for blobs in found])
    outermost = _outermost(boxes)
    best = _best(scores[outermost], MAX_DETECTIONS)
    chosen = outermost[best]
    boxes_px = boxes[chosen] * step
    return Detections(boxes_px.astype(np.int32), scores[chosen])


def _shrink(image: torch.Tensor, step: int) -> torch.Tensor:
    """Return smoothed block means of the darkest channel, which orange and green wings have too.

    Args:
        image: uint8 [3, H, W].
        step: side of a block in pixels.

    Returns:
        float32 [1, H // step, W // step].
    """
    _, height, width = image.shape
    height -= height % step
    width -= width % step
    offsets = range(0, step, -(-step // SAMPLES_PER_STEP))
    # Rows are added first. In interleaved memory they are whole runs of bytes, and only a quarter
    # of the sums is strided.
    rows = image[:, 0:height:step, :width].to(torch.int16)
    for offset in offsets[1:]:
        rows += image[:, offset:height:step, :width]
    columns = torch.stack([rows[:, :, offset::step] for offset in offsets])
    blocks = columns.sum(0, dtype=torch.int16)
    darkest = blocks.amin(0, keepdim=True).to(torch.float32)
    means = darkest / len(offsets) ** 2
    return F.avg_pool2d(means, 3, stride=1, padding=1, count_include_pad=False)


def _contrast(sheet: torch.Tensor, radius_cells: int) -> torch.Tensor:
    """Return the share of the background's brightness that is missing: float32 [h, w] in 0 to 1."""
    _, height, width = sheet.shape
    cells = F.avg_pool2d(sheet, CELL_PX, ceil_mode=True)
    bridged = _bridge(cells, radius_cells)
    enlarged = F.interpolate(bridged[None], scale_factor=CELL_PX, mode="bilinear")
    background = enlarged[0, :, :height, :width]
    missing = torch.where(background > DARKEST_SHEET, 1 - sheet / background, 0)
    return missing.clamp(min=0)[0]


def _bridge(cells: torch.Tensor, radius: int) -> torch.Tensor:
    """Fill valleys that are narrower than 2 * radius + 1 cells and keep slopes: a grey closing."""
    _, height, width = cells.shape
    radius = min(radius, height - 1, width - 1)
    side = 2 * radius + 1
    pads = [radius] * 4
    replicated = F.pad(cells, pads, mode="replicate")
    reflected = F.pad(cells, pads, mode="reflect")
    # Outside the image the sheet goes on getting darker as it did inside. Otherwise every vignette
    # would be a valley.
    closed = torch.minimum(2 * replicated - reflected, replicated)
    # The first turn takes the maximum. As it changes the sign, the second takes the minimum.
    # Columns come first, for speed.
    for _ in range(2):
        columns = F.max_pool2d(closed, (side, 1), stride=1, padding=(radius, 0))
        closed = -F.max_pool2d(columns, (1, side), stride=1, padding=(0, radius))
    return F.pad(closed, [-radius] * 4)


def _find_blobs(contrast: Floats, radius_cells: int) -> _Blobs:
    """Return what is large enough, narrow enough for the bridge and has a sharp rim, best first."""
    threshold = _threshold(contrast)
    # A margin of NaN keeps a row's runs apart from the next row's, and marks rims without outside.
    padded = np.pad(contrast, ((0, 0), (0, RIM_PX)), constant_values=np.nan)
    pitch = padded.shape[1]
    flat = padded.ravel()
    runs = _connected_runs(flat > threshold, pitch)
    if runs.starts.size == 0:
        return _Blobs(np.empty((0, 4), np.int64), np.empty(0, np.float32))
    boxes = _bounding_boxes(runs, pitch)
    areas = np.add.reduceat(runs.ends - runs.starts, runs.firsts)
    scores = _mean_contrasts(flat, runs, areas)
    sides = boxes[:, 2:] - boxes[:, :2]
    bridge_px = (2 * radius_cells + 1) * CELL_PX
    keep = areas >= MIN_AREA_PX
    keep &= sides.max(axis=1) >= MIN_LONG_SIDE_PX
    keep &= sides.min(axis=1) <= bridge_px
    keep &= scores >= BLOB_CONTRAST
    keep &= _rim_gains(flat, runs) >= RIM_SHARE * threshold
    kept = np.flatnonzero(keep)
    best = kept[_best(scores[kept], MAX_DETECTIONS)]
    return _Blobs(boxes[best], scores[best])


def _best(scores: Floats, count: int) -> Integers:
    """Return the indices of the highest scores, best first; equal ones keep their order."""
    return np.argsort(-scores, kind="stable")[:count]


def _threshold(contrast: Floats) -> float:
    """Return the contrast of a blob's pixels: PIXEL_CONTRAST, or more where the sheet is noisy."""
    sample = contrast[::4, ::4]
    median = np.median(sample)
    median_deviation = np.median(np.abs(sample - median))
    sigma = SIGMAS_PER_MEDIAN_DEVIATION * median_deviation
    return max(PIXEL_CONTRAST, float(median + NOISE_SIGMAS * sigma))


def _connected_runs(mask: Mask, pitch: int) -> _Runs:
    """Return the runs of a flattened mask whose rows are `pitch` pixels apart."""
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False))
    starts, ends = edges.reshape(-1, 2).T
    labels = _label(starts, ends, pitch)
    order = np.argsort(labels, kind="stable")
    firsts = np.flatnonzero(np.diff(labels[order], prepend=-1))
    return _Runs(starts[order], ends[order], firsts)


def _label(starts: Integers, ends: Integers, pitch: int) -> Integers:
    """Give each run the lowest index of all runs it is connected with, also at corners."""
    upper, lower = _touching_pairs(starts, ends, pitch)
    one = np.concatenate((upper, lower))
    other = np.concatenate((lower, upper))
    labels = np.arange(starts.size)
    while True:
        labels_of_one = labels[one]
        labels_of_other = labels[other]
        if (labels_of_one == labels_of_other).all():
            return labels
        np.minimum.at(labels, labels_of_one, labels_of_other)
        while (labels[labels] != labels).any():
            labels = labels[labels]


def _touching_pairs(starts: Integers, ends: Integers, pitch: int) -> tuple[Integers, Integers]:
    """Return the indices of runs and of those that touch them in the row below, pair by pair."""
    first_below = np.searchsorted(ends, starts + pitch)
    end_below = np.searchsorted(starts, ends + pitch, side="right")
    counts = end_below - first_below
    upper = np.repeat(np.arange(starts.size), counts)
    pairs_before = np.cumsum(counts) - counts
    lower = np.arange(upper.size) + np.repeat(first_below - pairs_before, counts)
    return upper, lower


def _bounding_boxes(runs: _Runs, pitch: int) -> Integers:
    top, left = np.divmod(runs.starts, pitch)
    right = left + runs.ends - runs.starts
    upper_left = np.minimum.reduceat((left, top), runs.firsts, axis=1)
    lower_right = np.maximum.reduceat((right, top + 1), runs.firsts, axis=1)
    return np.concatenate((upper_left, lower_right)).T


def _mean_contrasts(flat: Floats, runs: _Runs, areas: Integers) -> Floats:
    sums = np.concatenate(([0.0], np.nancumsum(flat, dtype=np.float64)))
    run_sums = sums[runs.ends] - sums[runs.starts]
    means = np.add.reduceat(run_sums, runs.firsts) / areas
    return np.asarray(means, np.float32)


def _rim_gains(flat: Floats, runs: _Runs) -> Floats:
    """Return the mean contrast gained across each component's left and right rims.

    Rims without an outside, at the image's edge, do not count.
    """
    first = runs.starts
    last = runs.ends - 1
    inside_left = np.minimum(first + RIM_PX - 1, last)
    inside_right = np.maximum(last - RIM_PX + 1, first)
    gains = flat[[inside_left, inside_right]] - flat[[first - RIM_PX, last + RIM_PX]]
    counted = np.add.reduceat(np.isfinite(gains).sum(axis=0), runs.firsts)
    gained = np.add.reduceat(np.nan_to_num(gains).sum(axis=0), runs.firsts)
    return np.asarray(gained / np.maximum(counted, 1), np.float32)


def _outermost(boxes: Integers) -> Integers:
    """Return the indices of the boxes that do not lie for the most part inside a larger one."""
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    kept: list[int] = []
    for i in np.argsort(-areas, kind="stable"):
        larger = boxes[kept]
        right_bottom = np.minimum(boxes[i, 2:], larger[:, 2:])
        left_top = np.maximum(boxes[i, :2], larger[:, :2])
        shared = (right_bottom - left_top).clip(min=0).prod(axis=1)
        if not (shared > SAME_OBJECT_SHARE * areas[i]).any():
            kept.append(i)
    return np.array(kept, np.int64)
