"""Dark objects on a bright sheet, by local contrast and connected components; needs no weights.

Does not tell an insect from a screw or a scale bar, and finds little where there is no bright background.
"""

from __future__ import annotations

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

# Lengths are in working pixels: the image is shrunk until its longer side is at most this (4096 wide: to a quarter).
WORKING_SIDE_PX = 1024
SAMPLES_PER_STEP = 4  # along each axis; 16 samples of 255 fit in int16 and average the sensor noise away
CELL_PX = 8  # grain of the background estimate
# The background is bridged over objects up to 2 * radius + 1 cells broad: the first follows shadows and vignettes, the
# second spans luna moths (a fifth of the photograph's width in the Vermont photographs).
BRIDGE_RADII_CELLS = (3, 13)
DARKEST_SHEET = 25.0  # of 255; below it there is no lit sheet to stand out from

# The next five were chosen by eye on five light-trap photographs from four countries; the unit tests hold their effect.
PIXEL_CONTRAST = 0.16  # share of the background's brightness that is missing
BLOB_CONTRAST = 0.22  # the same as a blob's mean: stains and dirt stay below it
RIM_SHARE = 0.5  # of the threshold, gained across the rim: shadows fade in, insects do not
MIN_AREA_PX = 14
MIN_LONG_SIDE_PX = 6  # 24 source pixels at 4096 wide: smaller ones are dust as often as insects
NOISE_SIGMAS = 6.0  # one pixel in a billion by chance; photographs shrink to half a million
RIM_PX = 2  # the shrunk image's edges are as wide as its smoothing
SAME_OBJECT_SHARE = 0.6  # of a box inside a larger one: a patch of the same wing
MAX_DETECTIONS = 500  # what Antenna's present detector returns at most (its box_detections_per_img)

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
Blobs = tuple[Integers, Floats]  # boxes [n, 4] in working pixels, scores [n]


class LightSheetBlobs:
    algorithm = ALGORITHM

    def detect(self, images: torch.Tensor) -> list[Detections]:
        return [_detect(image) for image in images]


def _detect(image: torch.Tensor) -> Detections:
    height, width = image.shape[1:]
    step = max(1, -(-max(height, width) // WORKING_SIDE_PX))
    if min(height, width) // step < MIN_LONG_SIDE_PX:
        return Detections(np.empty((0, 4), np.int32), np.empty(0, np.float32))
    sheet = _shrunk(image, step)
    found = [_blobs(_contrast(sheet, radius).cpu().numpy(), radius) for radius in BRIDGE_RADII_CELLS]
    boxes, scores = _outermost(*(np.concatenate(parts) for parts in zip(*found, strict=True)))
    best = np.argsort(-scores, kind="stable")[:MAX_DETECTIONS]
    return Detections((boxes[best] * step).astype(np.int32), scores[best])


def _shrunk(image: torch.Tensor, step: int) -> torch.Tensor:
    """Float32 [1, h, w]: smoothed block means of the darkest channel, which orange and green wings have too."""
    height, width = (side - side % step for side in image.shape[1:])
    offsets = range(0, step, -(-step // SAMPLES_PER_STEP))
    # Rows first: in interleaved memory they are whole runs of bytes, and only a quarter of the sums is strided.
    rows = image[:, 0:height:step, :width].to(torch.int16)
    for offset in offsets[1:]:
        rows += image[:, offset:height:step, :width]
    blocks = torch.stack([rows[:, :, offset::step] for offset in offsets]).sum(0, dtype=torch.int16)
    darkest = blocks.amin(0, keepdim=True).to(torch.float32) / len(offsets) ** 2
    return F.avg_pool2d(darkest, 3, stride=1, padding=1, count_include_pad=False)


def _contrast(sheet: torch.Tensor, radius_cells: int) -> torch.Tensor:
    """Float32 [h, w] in 0..1: how much of the background's brightness is missing."""
    _, height, width = sheet.shape
    cells = _bridged(F.avg_pool2d(sheet, CELL_PX, ceil_mode=True), radius_cells)
    background = F.interpolate(cells[None], scale_factor=CELL_PX, mode="bilinear")[0, :, :height, :width]
    return torch.where(background > DARKEST_SHEET, 1 - sheet / background, 0).clamp(min=0)[0]


def _bridged(cells: torch.Tensor, radius: int) -> torch.Tensor:
    """Grey closing: valleys narrower than 2 * radius + 1 cells are filled, slopes stay as they are."""
    radius = min(radius, *(side - 1 for side in cells.shape[1:]))
    pads, side = [radius] * 4, 2 * radius + 1
    edge = F.pad(cells, pads, mode="replicate")
    # Outside the image the sheet goes on getting darker as it did inside; otherwise every vignette would be a valley.
    closed = torch.minimum(2 * edge - F.pad(cells, pads, mode="reflect"), edge)
    for _ in range(2):  # the maximum, then, as the sign has turned, the minimum: over columns first, for speed
        columns = F.max_pool2d(closed, (side, 1), stride=1, padding=(radius, 0))
        closed = -F.max_pool2d(columns, (1, side), stride=1, padding=(0, radius))
    return F.pad(closed, [-radius] * 4)


def _blobs(contrast: Floats, radius_cells: int) -> Blobs:
    """Boxes and mean contrasts of what is large enough, narrow enough for the bridge, and has a sharp rim."""
    threshold = _threshold(contrast)
    # A margin of NaN keeps a row's runs apart from the next row's, and says where a rim has no outside.
    flat, pitch = np.pad(contrast, ((0, 0), (0, RIM_PX)), constant_values=np.nan).ravel(), contrast.shape[1] + RIM_PX
    starts, ends, first = _components(flat > threshold, pitch)
    if not starts.size:
        return np.empty((0, 4), np.int64), np.empty(0, np.float32)
    rows, left = np.divmod(starts, pitch)
    upper_left = np.minimum.reduceat((left, rows), first, axis=1)
    lower_right = np.maximum.reduceat((left + ends - starts, rows + 1), first, axis=1)
    boxes = np.concatenate((upper_left, lower_right)).T
    area = np.add.reduceat(ends - starts, first)
    sums = np.concatenate(([0.0], np.nancumsum(flat, dtype=np.float64)))
    scores = (np.add.reduceat(sums[ends] - sums[starts], first) / area).astype(np.float32)
    short, long = np.sort(boxes[:, 2:] - boxes[:, :2], axis=1).T
    keep = (area >= MIN_AREA_PX) & (long >= MIN_LONG_SIDE_PX) & (short <= (2 * radius_cells + 1) * CELL_PX)
    keep &= (scores >= BLOB_CONTRAST) & (_rims(flat, starts, ends, first) >= RIM_SHARE * threshold)
    best = np.argsort(-np.where(keep, scores, 0), kind="stable")[: min(keep.sum(), MAX_DETECTIONS)]
    return boxes[best], scores[best]


def _threshold(contrast: Floats) -> float:
    sample = contrast[::4, ::4]
    sigma = 1.4826 * np.median(np.abs(sample - np.median(sample)))  # a normal distribution's, from its median deviation
    return max(PIXEL_CONTRAST, float(np.median(sample) + NOISE_SIGMAS * sigma))


def _components(mask: npt.NDArray[np.bool_], pitch: int) -> tuple[Integers, Integers, Integers]:
    """Starts and ends of the mask's runs, ordered by component, and where each component begins among them."""
    starts, ends = np.flatnonzero(np.diff(mask, prepend=False, append=False)).reshape(-1, 2).T
    labels = _labels(starts, ends, pitch)
    order = np.argsort(labels, kind="stable")
    return starts[order], ends[order], np.flatnonzero(np.diff(labels[order], prepend=-1))


def _labels(starts: Integers, ends: Integers, pitch: int) -> Integers:
    """One label per run of pixels; runs that touch, also at a corner, share theirs."""
    below_first = np.searchsorted(ends, starts + pitch)
    counts = np.searchsorted(starts, ends + pitch, side="right") - below_first
    upper = np.repeat(np.arange(starts.size), counts)
    lower = np.arange(upper.size) + np.repeat(below_first - np.cumsum(counts) + counts, counts)
    labels = np.arange(starts.size)
    pairs = np.concatenate((upper, lower)), np.concatenate((lower, upper))
    while ((roots := labels[pairs[0]]) != (others := labels[pairs[1]])).any():
        np.minimum.at(labels, roots, others)
        while (labels[labels] != labels).any():
            labels = labels[labels]
    return labels


def _rims(flat: Floats, starts: Integers, ends: Integers, first: Integers) -> Floats:
    """Mean contrast gained across each component's left and right rims, where these are inside the image."""
    last = ends - 1
    inner = flat[[np.minimum(starts + RIM_PX - 1, last), np.maximum(last - RIM_PX + 1, starts)]]
    gains = inner - flat[[starts - RIM_PX, last + RIM_PX]]
    counted = np.add.reduceat(np.isfinite(gains).sum(axis=0), first)
    gained = np.add.reduceat(np.nan_to_num(gains).sum(axis=0), first)
    return np.asarray(gained / np.maximum(counted, 1), np.float32)


def _outermost(boxes: Integers, scores: Floats) -> Blobs:
    """Drop boxes that lie for the most part inside a larger one."""
    sizes = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    kept: list[int] = []
    for i in np.argsort(-sizes, kind="stable"):
        larger = boxes[kept]
        sides = np.minimum(boxes[i, 2:], larger[:, 2:]) - np.maximum(boxes[i, :2], larger[:, :2])
        if not (sides.clip(min=0).prod(axis=1) > SAME_OBJECT_SHARE * sizes[i]).any():
            kept.append(i)
    return boxes[kept], scores[kept]
