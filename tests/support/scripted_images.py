"""Photographs whose right reading is known, and an image host that a test scripts.

Each photograph is a file of its own kind: whole, damaged, cut off, missing, or no image at all. Its reading is a
checksum of the decoded pixels. A damaged file has a right reading only where what is decoded depends on nothing but
the file: two buffers with different bytes in them must give the same pixels.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from adc_worker.errors import ImageError, ImageMissing, LinkError
from adc_worker.ingest.addresses import AddressPolicy
from adc_worker.ingest.decode import decode
from adc_worker.ingest.download import DownloadStats, ImageClient
from adc_worker.ingest.header import read_header
from tests.support.images import by_pillow, encoded, picture, written
from tests.support.readings import reading
from tests.support.scripted_antenna import PORTAL

WIDTH_PX, HEIGHT_PX = 64, 48
MAX_PIXELS = 1_000_000
MAX_BYTES = 1_000_000
SIGNATURE = "X-Signature=scripted"
WHOLE = ("jpeg", "progressive", "png")
# `cut_`: the file ends early. `holed_`: bytes in its middle are overwritten. `spliced_`: another file begins in its
# middle. `page`: the stored file is an HTML page. `missing`: the host has no such file.
FAULTY = (
    "cut_jpeg", "cut_progressive", "cut_png", "holed_jpeg", "holed_progressive", "spliced_jpeg",
    "spliced_progressive", "page",
)  # fmt: skip
KINDS = (*WHOLE, *FAULTY, "missing")
# What the host does in place of handing out a file, once each; none of it is in the image.
FAULTS_A_PHOTOGRAPH = 2
LINK_FAULTS = ("503", "403", "timeout", "cut", "portal", "json")


@dataclass(frozen=True, slots=True)
class Photograph:
    """One file and what is right to say of it."""

    number: int
    kind: str
    data: bytes
    reading: int | None  # None: no result of it can be right

    @property
    def is_whole(self) -> bool:
        return self.kind in WHOLE


@cache
def photograph(number: int, kind: str, size_px: tuple[int, int] = (WIDTH_PX, HEIGHT_PX)) -> Photograph:
    """Return photograph `number` of a kind, of that width and height."""
    data = _file(number, kind, size_px)
    right = _by_pillow(data) if kind in WHOLE else _by_the_file_alone(data, size_px)
    return Photograph(number, kind, data, right)


def _file(number: int, kind: str, size_px: tuple[int, int]) -> bytes:
    if kind == "missing":
        return b""
    if kind == "page":
        return b"<!DOCTYPE html><html><body>report %d of the camera</body></html>" % number
    damage, _, name = kind.rpartition("_")
    image = picture(*size_px, seed=number)
    options = {"progressive": True} if name == "progressive" else {}
    data = encoded(image, "PNG" if name == "png" else "JPEG", **options)
    if damage == "cut":
        return data[: len(data) * 3 // 5]
    if damage == "holed":
        middle = len(data) // 2
        return data[:middle] + b"\xff\xd9\x00\xff" * 8 + data[middle + 32 :]
    if damage == "spliced":
        place = len(data) * 2 // 3
        return data[:place] + data[:400] + data[place:]
    return data


def _by_pillow(data: bytes) -> int:
    """Return the reading of a whole file as another program has it, so that the truth is not this worker's word."""
    return reading(by_pillow(data))


def _by_the_file_alone(data: bytes, size_px: tuple[int, int]) -> int | None:
    """Decode into buffers that differ in every byte; only what they agree on comes from the file."""
    width_px, height_px = size_px
    found: set[int] = set()
    with tempfile.TemporaryDirectory() as folder:
        path = written(Path(folder) / "one.img", data)
        for filling in (0x00, 0xFF, 0x5A):
            pixels = np.full((height_px, width_px, 3), filling, np.uint8)
            try:
                decode(path, read_header(path, MAX_PIXELS), pixels)
            except ImageError:
                return None
            found.add(reading(pixels))
    return found.pop() if len(found) == 1 else None


class ScriptedImages(ImageClient):
    """An image client whose host is a table of photographs; `faults` meet the next downloads, one each.

    It is the host that fails: no photograph meets a fault more than twice, as if it were its own.

    Attributes:
        failed: how often each photograph's download met a fault that was not its own.
    """

    def __init__(self, photographs: dict[int, Photograph], faults: deque[str]) -> None:
        super().__init__(MAX_BYTES, AddressPolicy("antenna.test"))
        self._photographs = photographs
        self._faults = faults
        self._lock = threading.Lock()
        self.failed: Counter[int] = Counter()

    def download(self, url: str, fd: int, cancelled: Callable[[], bool]) -> DownloadStats:
        if cancelled():
            raise LinkError("download cancelled")
        path, _, query = url.partition("?")
        number = int(path.rpartition("/")[2].removesuffix(".jpg"))
        with self._lock:
            may_fail = bool(self._faults) and self.failed[number] < FAULTS_A_PHOTOGRAPH
            fault = self._faults.popleft() if may_fail else None
            if fault is not None:
                self.failed[number] += 1
        if query != SIGNATURE:
            raise LinkError("the image's host answered 403")
        data = self._photographs[number].data if fault is None else _body_or_raise(fault)
        if fault is None and self._photographs[number].kind == "missing":
            raise ImageMissing("the image's host answered 404: the image does not exist")
        os.write(fd, data)
        return DownloadStats(0.001, 0.002, len(data))


def _body_or_raise(fault: str) -> bytes:
    """Return what a host at fault sends with status 200, or raise what the client makes of its failure."""
    if fault in {"503", "403"}:
        raise LinkError(f"the image's host answered {fault}")
    if fault == "timeout":
        raise LinkError("the image did not come in time: its host, or the link to it, is too slow")
    if fault == "cut":
        raise LinkError("download broke off: IncompleteRead: 10 bytes read, 90 more expected")
    return PORTAL if fault == "portal" else b'{"error": "rate limit exceeded"}'


def url_of(number: int) -> str:
    return f"https://images.test/{number}.jpg?{SIGNATURE}"
