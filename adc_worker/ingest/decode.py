"""From a staged file to uint8 rows in a region of the arena.

JPEG goes through a decoder that releases the GIL and writes in place; everything else through Pillow.

A region held another photograph before, so a decode counts only with proof that every row of it was written:

* simplejpeg in strict mode returns only where libjpeg wrote all rows and complained of nothing. (Its lenient mode is no
  proof: it returns also where libjpeg gave up for good after a warning.) A JPEG with a complaint is decoded once more,
  over the inverse of what the first time left: the bytes that are equal both times were written both times. libjpeg
  writes whole rows, so the first and the last pixel stand for their row. One row without proof makes the image an
  error.
* Pillow decodes into an image of its own, which it makes of zeros, and all of its rows are then copied. Whether Pillow
  wrote them is asked of those that are all zeros, by a second decode over ones.

Where a file ends early, the rows that did not come are filled: with 128 in a JPEG, which is what libjpeg makes of
coefficients that it does not know, and with zeros in the file's own mode elsewhere.
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
from adc_worker.ingest.header import FORMATS, JPEG_FORMATS, ImageHeader, is_sideways, stored_size, unreadable
from adc_worker.ingest.jpeg_segments import END_OF_IMAGE, Cut, find_cut

_Rows = npt.NDArray[np.uint8]

_FILE_ENDED = "premature end of jpeg file"  # that of a data segment is damage, not an end
_NOTHING_CAME = "the file ends before its first pixel"
_ONES = 1
_EDGES = (0, -1)  # first and last pixel of a row
_BAND_PIXELS = 1 << 17
_BYTE_MAX = 255
_FLOATING_POINT = "F"
_MODES_OF_ANY_SCALE = frozenset({_FLOATING_POINT, "I"})  # Pillow's names; "I" is of 32-bit integers


@dataclass(frozen=True, slots=True)
class DecodeReport:
    """What one decode took, and what was wrong with the file.

    Attributes:
        truncated: the file ended before its image did.
        damaged: the decoder found damage elsewhere than at the end; what it shows there is made up.
        complaint: what the decoder said of it.
    """

    decode_s: float
    truncated: bool
    damaged: bool = False
    complaint: str = ""


@dataclass(frozen=True, slots=True)
class _Damage:
    """What was wrong with a file that was decoded all the same."""

    truncated: bool = False
    damaged: bool = False
    complaint: str = ""


_UNDAMAGED = _Damage()


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


def decode(path: Path, header: ImageHeader, out: _Rows) -> DecodeReport:
    """Decode `path` into `out`, uint8 [height, width, 3]; a truncated file as far as it goes.

    Every byte of `out` is written, or an exception raised.

    Raises:
        ImageUnreadable: the file cannot be decoded, or is not what its header said.
        ImageTooLarge: the decoder found no memory.
    """
    started = time.perf_counter()
    with unreadable(f"cannot be decoded as {header.format}"):
        found = _decode_jpeg(path, out) if header.jpeg_in_place else _decode_pillow(path, header, out)
    decode_s = time.perf_counter() - started
    return DecodeReport(decode_s, found.truncated, found.damaged, found.complaint)


def _decode_jpeg(path: Path, out: _Rows) -> _Damage:
    with _mapped(path) as data:
        data.madvise(mmap.MADV_WILLNEED)  # it may have been dropped from the page cache
        complaint = _complaint(data, out)
        if complaint is None:
            return _UNDAMAGED
        with memoryview(data) as whole:
            return _decode_damaged(whole, find_cut(data), complaint, out)


def _decode_damaged(data: memoryview, cut: Cut | None, complaint: str, out: _Rows) -> _Damage:
    """Take what a decode that ended with a complaint left in `out`, or raise ValueError."""
    missing = _missing_rows(data, out)
    if missing and cut is not None and cut.usable_bytes < len(data):
        # The file ends in the middle of a table, at which libjpeg gives up: what stands before is a picture.
        with data[: cut.usable_bytes] as usable:
            complaint = _complaint(usable, out) or ""
            missing = _missing_rows(usable, out)
    if missing:
        raise ValueError(f"{complaint}: {missing} of {len(out)} rows cannot be decoded")
    file_ended = _FILE_ENDED in complaint.lower()
    # Libjpeg tells of the first fault alone: the end may be missing as well.
    truncated = file_ended or (cut is not None and cut.usable_bytes == len(data))
    if truncated and cut is not None and not cut.has_pixels:
        raise ValueError(_NOTHING_CAME)
    return _Damage(truncated, not file_ended, complaint)


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data


def _complaint(data: mmap.mmap | memoryview, out: _Rows) -> str | None:
    """Decode a JPEG and return what libjpeg says is wrong with it; None proves that every row was written."""
    try:
        decoded = simplejpeg.decode_jpeg(data, "RGB", buffer=out, strict=True)
    except ValueError as error:
        return str(error)
    _check_shape(decoded.shape, out)
    return None


def _missing_rows(data: memoryview, out: _Rows) -> int:
    """Decode a JPEG again, over the inverse of what its last decode left, and return how many rows were not written."""
    height, width, *_kind = simplejpeg.decode_jpeg_header(data)
    _check_shape((height, width, out.shape[2]), out)
    edges = out[:, _EDGES].copy()
    np.invert(out, out=out)
    _complaint(data, out)
    return int(np.count_nonzero((out[:, _EDGES] != edges).any(axis=(1, 2))))


def _check_shape(shape: tuple[int, ...], out: _Rows) -> None:
    if shape != out.shape:
        raise ValueError(f"decoded to {shape}, its header said {out.shape}")


def _decode_pillow(path: Path, header: ImageHeader, out: _Rows) -> _Damage:
    """Decode by Pillow, which does not tell of damage that it decodes around."""
    stored = _as_stored(out, header.orientation)
    truncated, blank_rows = _load_rows(path, stored)
    if blank_rows.any():
        missing = int(np.count_nonzero(blank_rows & ~_written_rows(path, stored)))
        if missing == len(blank_rows):
            raise ValueError(_NOTHING_CAME)
        truncated = truncated or missing > 0
    if truncated and header.is_jpeg and not _has_pixels(path):
        raise ValueError(_NOTHING_CAME)
    return _Damage(truncated)


def _has_pixels(path: Path) -> bool:
    """Whether something of a JPEG's coded data is there."""
    with _mapped(path) as data:
        cut = find_cut(data)
    return cut is None or cut.has_pixels


def _as_stored(out: _Rows, orientation: int) -> _Rows:
    """Return a view of `out` in which the rows lie as the file has them (TIFF 6.0, Orientation)."""
    if orientation in {2, 3, 7, 6}:
        out = out[:, ::-1]
    if orientation in {3, 4, 7, 8}:
        out = out[::-1]
    return out.transpose(1, 0, 2) if is_sideways(orientation) else out


@contextmanager
def _opened(path: Path, stored: _Rows) -> Iterator[ImageFile.ImageFile]:
    # By file, not by path: a TIFF that Pillow maps is shown with the turned size and scrambled.
    with path.open("rb") as file, Image.open(file, formats=FORMATS) as image:
        width, height = stored_size(image)
        if (height, width) != stored.shape[:2]:
            raise ValueError(f"has {width}x{height} pixels, its header said {stored.shape[1]}x{stored.shape[0]}")
        # Else Pillow would make a second image to turn a TIFF, and read what stands behind a PNG's pixels.
        image.load_end = lambda: None  # type: ignore[method-assign]
        yield image


def _load_rows(path: Path, stored: _Rows) -> tuple[bool, npt.NDArray[np.bool_]]:
    """Decode and copy all rows as RGB; say whether the file ended early, and which rows are all zeros in its own mode.

    Band by band: a whole conversion would need the image three times more.
    """
    blank_rows = np.zeros(len(stored), np.bool_)
    with _opened(path, stored) as image:
        truncated = _load(image)
        _check_scale(image, stored)
        for rows, band in _bands(image, stored):
            blank_rows[rows] = ~np.asarray(band).reshape(band.height, -1).any(axis=1)
            stored[rows] = np.asarray(_as_rgb(band))
    return truncated, blank_rows


def _check_scale(image: Image.Image, stored: _Rows) -> None:
    """Refuse numbers on another scale than 0 to 255: Pillow clips them, and a photograph is all white or all black.

    No header tells the scale of 32-bit integers and of floating-point numbers.
    """
    if image.mode not in _MODES_OF_ANY_SCALE:
        return
    lowest = np.inf
    highest = -np.inf
    for _rows, band in _bands(image, stored):
        numbers = np.asarray(band)
        lowest = np.minimum(lowest, numbers.min())  # a NaN stays one, and is in no range
        highest = np.maximum(highest, numbers.max())
    fits_a_byte = lowest >= 0 and highest <= _BYTE_MAX
    is_from_0_to_1 = image.mode == _FLOATING_POINT and 0 < highest <= 1
    if not fits_a_byte or is_from_0_to_1:
        raise ValueError(f"its pixels are numbers from {lowest:.6g} to {highest:.6g}, on no scale from 0 to 255")


def _written_rows(path: Path, stored: _Rows) -> npt.NDArray[np.bool_]:
    """Decode once more over ones, and return which of the rows are not all ones then."""
    written_rows = np.zeros(len(stored), np.bool_)
    with _opened(path, stored) as image:
        _prepare_with_ones(image)
        _load(image)
        for rows, band in _bands(image, stored):
            written_rows[rows] = (np.asarray(band) != _ONES).reshape(band.height, -1).any(axis=1)
    return written_rows


def _bands(image: Image.Image, stored: _Rows) -> Iterator[tuple[slice, Image.Image]]:
    """Yield the image a few rows at a time, with the place of these rows."""
    height, width = stored.shape[:2]
    step = max(1, _BAND_PIXELS // width)
    for top in range(0, height, step):
        bottom = min(top + step, height)
        yield slice(top, bottom), image.crop((0, top, width, bottom))


def _load(image: ImageFile.ImageFile) -> bool:
    """Decode as far as the file goes, and say whether it ended early."""
    if image.format in JPEG_FORMATS:
        return _load_jpeg(image)
    try:
        image.load()
    except OSError as error:
        if not str(error).startswith("image file is truncated"):
            raise
        image.tile = []  # nothing left to load: the rows that came stay
        return True
    return False


def _load_jpeg(image: ImageFile.ImageFile) -> bool:
    """Give the decoder an end where the file has none: of several scans Pillow shows nothing before it."""
    file = image.fp
    assert file is not None  # an image that is not loaded has its file
    ended = False

    def read(size: int) -> bytes:
        nonlocal ended
        data = file.read(size)
        ended = ended or not data
        return data or END_OF_IMAGE

    image.load_read = read  # type: ignore[attr-defined]
    image.load()
    return ended


def _prepare_with_ones(image: ImageFile.ImageFile) -> None:
    """Make Pillow decode over ones instead of zeros."""
    prepare = image.load_prepare
    # A GIF's first frame may be smaller than the GIF; what is around it is background, and no decoder's business.
    extents = image.tile[0].extents if image.format == "GIF" and image.tile else None
    bands = len(image.getbands())
    ones = (_ONES,) * bands if bands > 1 else _ONES

    def prepare_with_ones() -> None:
        prepare()
        image.im.paste(ones, extents or (0, 0, *image.im.size))

    image.load_prepare = prepare_with_ones  # type: ignore[method-assign]


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        # Pillow clips 16-bit values at 255 when it converts; the upper byte is what an 8-bit camera would have stored.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")
