"""From a staged file to uint8 rows in a region of the arena.

JPEG goes through a decoder that releases the GIL and writes in place; everything else through Pillow.
"""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, ImageFile

from adc_worker.errors import ImageTooLarge
from adc_worker.ingest.arena import Arena, Region
from adc_worker.ingest.header import FORMATS, ImageHeader, stored_size, unreadable

_TRUNCATED = "premature end of jpeg file"  # that of a data segment is damage, not an end
_BAND_PIXELS = 1 << 17


@dataclass(frozen=True, slots=True)
class DecodeReport:
    """What one decode took, and whether the file ended before its image did."""

    decode_s: float
    truncated: bool


class DecodeEngine(Protocol):
    """Decodes images into regions, several at a time."""

    workers: int
    pids: list[int]  # the processes that decode, for whoever adds up memory

    def submit(self, path: Path, header: ImageHeader, target: Region) -> Future[DecodeReport]:
        """Decode `path` into `target`; the future raises ImageError when that fails."""
        ...

    def close(self) -> None: ...


class ScratchLedger:
    """Bounds the decoders' own memory: a decode starts when its share fits, or when it is alone."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._used_bytes = 0
        self._changed = threading.Condition()

    @contextmanager
    def charge(self, size_bytes: int) -> Iterator[None]:
        with self._changed:
            while self._used_bytes and self._used_bytes + size_bytes > self.limit_bytes:
                self._changed.wait()
            self._used_bytes += size_bytes
        try:
            yield
        finally:
            with self._changed:
                self._used_bytes -= size_bytes
                self._changed.notify_all()


class ThreadEngine:
    """Decode threads of this process; the decoder releases the GIL."""

    def __init__(self, arena: Arena, workers: int, scratch_bytes: int) -> None:
        self.workers = workers
        self.pids: list[int] = []
        self._arena = arena
        self._ledger = ScratchLedger(scratch_bytes)
        self._executor = ThreadPoolExecutor(workers, thread_name_prefix="decode")

    def submit(self, path: Path, header: ImageHeader, target: Region) -> Future[DecodeReport]:
        return self._executor.submit(self._decode_charged, path, header, target)

    def close(self) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _decode_charged(self, path: Path, header: ImageHeader, target: Region) -> DecodeReport:
        try:
            with self._ledger.charge(header.scratch_bytes):
                return self._decode(path, header, target)
        except ImageTooLarge:  # for its decoder's memory: perhaps it was the others' beside it
            with self._ledger.charge(self._ledger.limit_bytes):
                return self._decode(path, header, target)

    def _decode(self, path: Path, header: ImageHeader, target: Region) -> DecodeReport:
        return decode(path, header, self._arena.view(target, header.shape))


def decode(path: Path, header: ImageHeader, out: npt.NDArray[np.uint8]) -> DecodeReport:
    """Decode `path` into `out`, uint8 [height, width, 3], orientation as stored; a truncated file as far as it goes.

    Raises:
        ImageUnreadable: the file cannot be decoded, or is not what its header said.
        ImageTooLarge: the decoder found no memory.
    """
    started = time.perf_counter()
    with unreadable(f"cannot be decoded as {header.format}"):
        truncated = _decode_jpeg(path, out) if header.jpeg_in_place else _decode_pillow(path, out)
    return DecodeReport(time.perf_counter() - started, truncated)


def _decode_jpeg(path: Path, out: npt.NDArray[np.uint8]) -> bool:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        data.madvise(mmap.MADV_WILLNEED)  # it may have been dropped from the page cache
        try:
            decoded = simplejpeg.decode_jpeg(data, "RGB", buffer=out, strict=True)
            truncated = False
        except ValueError as error:
            # libjpeg's warnings, of which a missing end is one, are errors in strict mode: take what there is.
            truncated = _TRUNCATED in str(error).lower()
            decoded = simplejpeg.decode_jpeg(data, "RGB", buffer=out, strict=False)
        if decoded.shape != out.shape:
            raise ValueError(f"decoded to {decoded.shape}, its header said {out.shape}")
    return truncated


def _decode_pillow(path: Path, out: npt.NDArray[np.uint8]) -> bool:
    # By file, not by path: a TIFF that Pillow maps is shown with the turned size and scrambled.
    with path.open("rb") as file, Image.open(file, formats=FORMATS) as image:
        width, height = stored_size(image)
        if (height, width) != out.shape[:2]:
            raise ValueError(f"has {width}x{height} pixels, its header said {out.shape[1::-1]}")
        # Else Pillow would turn a TIFF as its orientation says, and read what stands behind a PNG's pixels.
        image.load_end = lambda: None  # type: ignore[method-assign]
        truncated = _load(image)
        # Band by band: a whole conversion would need the image three times more.
        rows = max(1, _BAND_PIXELS // width)
        for top in range(0, height, rows):
            band = image.crop((0, top, width, min(top + rows, height)))
            out[top : top + rows] = np.asarray(_as_rgb(band))
    return truncated


def _load(image: ImageFile.ImageFile) -> bool:
    """Decode as far as the file goes, and say whether it ended early."""
    try:
        image.load()
    except OSError as error:
        if not str(error).startswith("image file is truncated"):
            raise
        image.tile = []  # nothing left to load: the rows that came stay
        return True
    return False


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        # Pillow clips 16-bit values at 255 when it converts; the upper byte is what an 8-bit camera would have stored.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")
