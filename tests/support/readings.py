"""Readings: checksums of pixels that travel through a result as its one box: it proves what it was made from."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

_HALF_BITS = 16
_HALF_MASK = 0xFFFF
NO_READING = -1


def reading(pixels: npt.NDArray[np.uint8]) -> int:
    """Return the checksum of pixels, uint8 [height, width, 3], in 32 bits."""
    return zlib.crc32(pixels.tobytes())


def box_of(value: int) -> tuple[int, int, int, int]:
    """Return the box that carries a reading through a result."""
    return 0, 0, (value >> _HALF_BITS) + 1, (value & _HALF_MASK) + 1


def reading_of(detections: Sequence[Mapping[str, Any]]) -> int:
    """Return the reading in a posted result; `NO_READING` when it has none."""
    if len(detections) != 1:
        return NO_READING
    box = detections[0]["bbox"]
    return ((int(box["x2"]) - 1) << _HALF_BITS) + int(box["y2"]) - 1
