"""Generated photographs like those of a light trap: an unevenly lit sheet, insects, sensor noise.

They are drawn from a seed: the same arguments give the same pixels. They are close enough to real
photographs for a blob detector and a JPEG decoder. No classifier would know a species on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops, ImageDraw

Box = tuple[int, int, int, int]  # x1, y1, x2, y2 in pixels
Pixels = npt.NDArray[np.uint8]

# Every number of the drawing was chosen by eye, beside photographs of real light traps.
INSECT_LENGTHS = (30 / 4096, 400 / 4096)  # shortest and longest, as shares of the width
CLEARANCE = 0.25  # of its length stays free around an insect, so that one insect is one blob
PLACING_TRIES = 30
NOISE_TILE_PX = 512  # side of the square of noise that is repeated over the photograph
NOISE_LIMIT_SIGMAS = 2

WING_COLOUR_CELLS = 14  # cells of one colour along a wing's side
BODY_COLOUR = (46, 37, 31)
OPAQUE = 255
VISIBLE_OPACITY = 128  # of 255; what is fainter does not belong to an insect's box


class Grain(NamedTuple):
    """What makes a file large."""

    noise_sigma: float  # of the sensor's noise in each pixel and channel, of 255
    quality: int  # of the JPEG, 1 to 100
    subsampling: str = "4:2:0"


TYPICAL = Grain(noise_sigma=6.0, quality=89)  # 1.6 MB at 4096 x 2160
LARGE = Grain(noise_sigma=26.0, quality=98, subsampling="4:4:4")  # 28 MB at 4096 x 3072


class Sheet(NamedTuple):
    image: Pixels  # uint8 [H, W, 3]
    boxes: list[Box]  # one for each insect


def write_sheets(
    folder: Path,
    count: int,
    seed: int,
    *,
    sizes: Sequence[tuple[int, int]] = ((4096, 2160), (4096, 3072)),
    grain: Grain = TYPICAL,
) -> list[Path]:
    """Write `count` JPEG files; the `sizes` (width, height) take turns."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(count):
        size = sizes[number % len(sizes)]
        sheet = draw_sheet(size, (seed, number), noise_sigma=grain.noise_sigma)
        photograph = Image.fromarray(sheet.image)
        path = folder / f"sheet-{seed}-{number:03d}.jpg"
        photograph.save(path, quality=grain.quality, subsampling=grain.subsampling)
        paths.append(path)
    return paths


def draw_sheet(
    size: tuple[int, int],
    seed: int | tuple[int, ...],
    *,
    insects: int = 24,
    noise_sigma: float = TYPICAL.noise_sigma,
) -> Sheet:
    """Draw a photograph of `size` (width, height).

    It has fewer insects where no more of them fit without touching.
    """
    rng = np.random.default_rng(seed)
    headroom = int(NOISE_LIMIT_SIGMAS * noise_sigma)
    image = _draw_lit_sheet(rng, size, headroom)
    boxes: list[Box] = []
    for _ in range(insects):
        length = _choose_length(rng, size[0])
        place = _find_free_place(rng, size, length, boxes)
        if place is not None:
            insect = _draw_insect(rng, length)
            boxes.append(_paste(insect, image, place, headroom))
    _add_noise(image, rng, noise_sigma)
    return Sheet(image, boxes)


def _draw_lit_sheet(rng: np.random.Generator, size: tuple[int, int], headroom: int) -> Pixels:
    """Draw a white cloth with a lamp near its middle, dim corners and folds.

    It is drawn small and enlarged. No pixel is nearer to 0 and 255 than `headroom`.
    """
    y, x = np.mgrid[-1:1:36j, -1:1:64j]
    dimming = rng.uniform(0.08, 0.2)
    lamp_x = rng.uniform(-0.3, 0.3)
    lamp_y = rng.uniform(-0.3, 0.3)
    light = 1 - dimming * ((x - lamp_x) ** 2 + (y - lamp_y) ** 2)

    fold_depth = rng.uniform(0, 0.02)
    folds_across = rng.uniform(4, 12)
    folds_down = rng.uniform(-4, 4)
    light *= 1 + fold_depth * np.sin(x * folds_across + y * folds_down)

    brightness = rng.uniform(205, 235)
    tint = rng.uniform(0.95, 1, 3)
    pixels = light[:, :, None] * brightness * tint
    pixels = pixels.clip(headroom, 255 - headroom)
    small = Image.fromarray(pixels.astype(np.uint8))
    return np.array(small.resize(size, Image.Resampling.BILINEAR))


def _choose_length(rng: np.random.Generator, width: int) -> int:
    """Choose an insect's length in pixels, at least 4; each factor of two is equally likely."""
    shortest, longest = np.log(INSECT_LENGTHS)
    share = float(np.exp(rng.uniform(shortest, longest)))
    return max(4, round(width * share))


def _find_free_place(
    rng: np.random.Generator,
    size: tuple[int, int],
    length: int,
    taken: list[Box],
) -> Box | None:
    """Try some places at random; None where each of them is too near to what is there."""
    if length >= min(size):
        return None
    width, height = size
    gap = CLEARANCE * length
    for _ in range(PLACING_TRIES):
        x = int(rng.integers(0, width - length))
        y = int(rng.integers(0, height - length))
        place = (x, y, x + length, y + length)
        if not any(_is_near(place, other, gap) for other in taken):
            return place
    return None


def _is_near(one: Box, other: Box, gap: float) -> bool:
    near_in_x = other[0] <= one[2] + gap and one[0] - gap <= other[2]
    near_in_y = other[1] <= one[3] + gap and one[1] - gap <= other[3]
    return near_in_x and near_in_y


def _draw_insect(rng: np.random.Generator, length: int) -> Image.Image:
    """Draw wings of a mottled earth colour and a dark body with antennae, turned by any angle.

    Returns:
        RGBA, a square of `length` pixels; the opacity is 0 beside the insect.
    """
    side = 2 * length  # it is drawn at twice the size and then reduced, for smooth edges
    wings = _draw_wings(rng, side)
    body = _draw_body(side)
    insect = _draw_mottle(rng).resize((side, side))
    insect.paste(BODY_COLOUR, mask=body)
    insect.putalpha(ImageChops.lighter(wings, body))
    turned = insect.rotate(rng.uniform(0, 360), Image.Resampling.BILINEAR)
    return turned.reduce(2)


def _draw_wings(rng: np.random.Generator, side: int) -> Image.Image:
    wings = Image.new("L", (side, side))
    draw = ImageDraw.Draw(wings)
    span = rng.uniform(0.32, 0.44)
    hind_top = rng.uniform(0.2, 0.35)
    for top, bottom in ((0.2, 0.55), (hind_top, hind_top + 0.4)):
        for left, right in ((0.5 - span, 0.54), (0.46, 0.5 + span)):
            draw.ellipse((left * side, top * side, right * side, bottom * side), fill=OPAQUE)
    return wings


def _draw_body(side: int) -> Image.Image:
    body = Image.new("L", (side, side))
    draw = ImageDraw.Draw(body)
    draw.ellipse((0.44 * side, 0.14 * side, 0.56 * side, 0.84 * side), fill=OPAQUE)
    for tip in (0.4, 0.6):
        antenna = (tip * side, 0.06 * side, side / 2, 0.17 * side)
        draw.line(antenna, fill=OPAQUE, width=max(1, side // 120))
    return body


def _draw_mottle(rng: np.random.Generator) -> Image.Image:
    brightness = rng.uniform(70, 150)
    green = rng.uniform(0.65, 0.85)
    blue = rng.uniform(0.4, 0.7)
    earth_colour = brightness * np.array([1, green, blue])
    shades = rng.uniform(0.5, 1.3, (WING_COLOUR_CELLS, WING_COLOUR_CELLS, 1))
    pixels = (shades * earth_colour).clip(0, 255)
    return Image.fromarray(pixels.astype(np.uint8))


def _paste(insect: Image.Image, image: Pixels, place: Box, headroom: int) -> Box:
    """Blend an insect into the photograph; returns the box around its visible part."""
    x1, y1, x2, y2 = place
    pixels = np.asarray(insect, np.float32)
    colours = pixels[:, :, :3]
    opacity = pixels[:, :, 3:] / OPAQUE
    region = image[y1:y2, x1:x2]
    blended = region * (1 - opacity) + colours * opacity
    region[:] = blended.clip(headroom, 255 - headroom)

    table = [0] * VISIBLE_OPACITY + [OPAQUE] * (256 - VISIBLE_OPACITY)
    visible = insect.getchannel("A").point(table)
    left, top, right, bottom = visible.getbbox() or (0, 0, 1, 1)
    return x1 + left, y1 + top, x1 + right, y1 + bottom


@lru_cache(maxsize=2)
def _noise_tile(sigma: float) -> Pixels:
    """Return noise in two's complement; bytes that keep their distance from 0 and 255 take it."""
    limit = int(NOISE_LIMIT_SIGMAS * sigma)
    rng = np.random.default_rng(0)
    noise = rng.normal(0, sigma, (NOISE_TILE_PX, NOISE_TILE_PX, 3))
    limited = noise.round().clip(-limit, limit)
    return limited.astype(np.int8).view(np.uint8)


def _add_noise(image: Pixels, rng: np.random.Generator, sigma: float) -> None:
    height, width, _ = image.shape
    offsets = rng.integers(0, NOISE_TILE_PX, 2)
    tile = np.roll(_noise_tile(sigma), offsets, axis=(0, 1))
    repeats = -(-width // NOISE_TILE_PX)
    strip = np.tile(tile, (1, repeats, 1))[:, :width]
    for top in range(0, height, NOISE_TILE_PX):
        image[top : top + NOISE_TILE_PX] += strip[: height - top]
