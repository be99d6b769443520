"""Photographs like a light trap's, drawn from a seed: an unevenly lit sheet, insects on it, sensor noise.

Close enough to the real thing for a blob detector and a JPEG decoder; no classifier would know a species on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops, ImageDraw

Box = tuple[int, int, int, int]  # x1, y1, x2, y2
Bytes = npt.NDArray[np.uint8]
INSECT_LENGTHS = (30 / 4096, 400 / 4096)  # of the photograph's width
CLEARANCE = 0.25  # of its length is kept free around an insect, so that one insect is one blob
PLACING_TRIES = 30
NOISE_TILE_PX, NOISE_LIMIT_SIGMAS = 512, 2


class Grain(NamedTuple):
    """What makes a file large: sensor noise (sigma of 255, per pixel and channel) and JPEG quality (1..100)."""

    noise_sigma: float
    quality: int
    subsampling: str = "4:2:0"


TYPICAL = Grain(noise_sigma=6.0, quality=89)  # 1.6 MB at 4096x2160; test_sheets.py holds the bytes per pixel
LARGE = Grain(noise_sigma=26.0, quality=98, subsampling="4:4:4")  # 28 MB at 4096x3072


class Sheet(NamedTuple):
    image: Bytes  # [H, W, 3]
    boxes: list[Box]  # one per insect


def write_sheets(
    folder: Path,
    count: int,
    seed: int,
    *,
    sizes: Sequence[tuple[int, int]] = ((4096, 2160), (4096, 3072)),
    grain: Grain = TYPICAL,
) -> list[Path]:
    """Write `count` JPEGs of `sizes` (width, height) in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"sheet-{seed}-{i:03d}.jpg" for i in range(count)]
    for i, path in enumerate(paths):
        sheet = draw_sheet(sizes[i % len(sizes)], (seed, i), noise_sigma=grain.noise_sigma)
        Image.fromarray(sheet.image).save(path, "JPEG", quality=grain.quality, subsampling=grain.subsampling)
    return paths


def draw_sheet(
    size: tuple[int, int], seed: int | tuple[int, ...], *, insects: int = 24, noise_sigma: float = TYPICAL.noise_sigma
) -> Sheet:
    """Draw a photograph of `size` (width, height); fewer insects where no more fit without touching."""
    rng, headroom = np.random.default_rng(seed), int(NOISE_LIMIT_SIGMAS * noise_sigma)
    image = _lit_sheet(rng, size, headroom)
    boxes: list[Box] = []
    for _ in range(insects):
        length = max(4, round(size[0] * float(np.exp(rng.uniform(*np.log(INSECT_LENGTHS))))))
        place = _free_place(rng, size, length, boxes)
        if place is not None:
            boxes.append(_lay(image, _insect(rng, length), place, headroom))
    _add_noise(image, rng, noise_sigma)
    return Sheet(image, boxes)


def _lit_sheet(rng: np.random.Generator, size: tuple[int, int], headroom: int) -> Bytes:
    """A lamp near the middle, dim corners, folds in the cloth: drawn small and enlarged."""
    y, x = np.mgrid[-1:1:36j, -1:1:64j]
    light = 1 - rng.uniform(0.08, 0.2) * ((x - rng.uniform(-0.3, 0.3)) ** 2 + (y - rng.uniform(-0.3, 0.3)) ** 2)
    light *= 1 + rng.uniform(0, 0.02) * np.sin(x * rng.uniform(4, 12) + y * rng.uniform(-4, 4))
    pixels = light[:, :, None] * rng.uniform(205, 235) * rng.uniform(0.95, 1, 3)
    small = Image.fromarray(pixels.clip(headroom, 255 - headroom).astype(np.uint8))
    return np.array(small.resize(size, Image.Resampling.BILINEAR))


def _free_place(rng: np.random.Generator, size: tuple[int, int], length: int, taken: list[Box]) -> Box | None:
    gap, reach = CLEARANCE * length, (1 + CLEARANCE) * length
    for _ in range(PLACING_TRIES if length < min(size) else 0):
        x, y = (int(rng.integers(0, side - length)) for side in size)
        if all(x + reach < b[0] or b[2] < x - gap or y + reach < b[1] or b[3] < y - gap for b in taken):
            return x, y, x + length, y + length
    return None


def _insect(rng: np.random.Generator, length: int) -> Image.Image:
    """RGBA, square: mottled wings of an earth colour, a dark body, antennae, turned by any angle."""
    side = 2 * length  # drawn at twice the size and reduced, for smooth edges
    outline, dark = Image.new("L", (side, side)), Image.new("L", (side, side))
    span, back = rng.uniform(0.32, 0.44), rng.uniform(0.2, 0.35)
    for top, bottom in ((0.2, 0.55), (back, back + 0.4)):
        for left, right in ((0.5 - span, 0.54), (0.46, 0.5 + span)):
            ImageDraw.Draw(outline).ellipse((left * side, top * side, right * side, bottom * side), fill=255)
    ImageDraw.Draw(dark).ellipse((0.44 * side, 0.14 * side, 0.56 * side, 0.84 * side), fill=255)
    for tip in (0.4, 0.6):
        feeler = (tip * side, 0.06 * side, side / 2, 0.17 * side)
        ImageDraw.Draw(dark).line(feeler, fill=255, width=max(1, side // 120))
    earth = rng.uniform(70, 150) * np.array([1, rng.uniform(0.65, 0.85), rng.uniform(0.4, 0.7)])
    mottle = Image.fromarray((rng.uniform(0.5, 1.3, (14, 14, 1)) * earth).clip(0, 255).astype(np.uint8))
    insect = mottle.resize((side, side))
    insect.paste((46, 37, 31), mask=dark)
    insect.putalpha(ImageChops.lighter(outline, dark))
    return insect.rotate(rng.uniform(0, 360), Image.Resampling.BILINEAR).reduce(2)


def _lay(image: Bytes, insect: Image.Image, place: Box, headroom: int) -> Box:
    """Blend the insect into the photograph; returns the box around what can be seen of it."""
    x, y, _, _ = place
    region = image[y : place[3], x : place[2]]
    pixels = np.asarray(insect, np.float32)
    opacity = pixels[:, :, 3:] / 255
    region[:] = (region * (1 - opacity) + pixels[:, :, :3] * opacity).clip(headroom, 255 - headroom)
    left, top, right, bottom = insect.getchannel("A").point([0] * 128 + [255] * 128).getbbox() or (0, 0, 1, 1)
    return x + left, y + top, x + right, y + bottom


@lru_cache(maxsize=2)
def _noise_tile(sigma: float) -> Bytes:
    """Noise in two's complement: bytes that keep that far from 0 and 255 take it without clipping."""
    limit = int(NOISE_LIMIT_SIGMAS * sigma)
    noise = np.random.default_rng(0).normal(0, sigma, (NOISE_TILE_PX, NOISE_TILE_PX, 3))
    return noise.round().clip(-limit, limit).astype(np.int8).view(np.uint8)


def _add_noise(image: Bytes, rng: np.random.Generator, sigma: float) -> None:
    tile = np.roll(_noise_tile(sigma), rng.integers(0, NOISE_TILE_PX, 2), axis=(0, 1))
    strip = np.tile(tile, (1, -(-image.shape[1] // NOISE_TILE_PX), 1))[:, : image.shape[1]]
    for top in range(0, len(image), NOISE_TILE_PX):
        image[top : top + NOISE_TILE_PX] += strip[: len(image) - top]
