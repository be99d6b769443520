"""What the header of a staged file tells before a pixel is decoded: shape, kind, and the cost of decoding it.

Nothing in the file decides how much memory that takes: one header is read at a time, and so much of it and no more.
"""

from __future__ import annotations

import errno
import io
import mmap
import re
import struct
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from adc_worker.errors import ImageError, ImageTooLarge, ImageUnreadable
from adc_worker.redaction import redact

FORMATS = ("JPEG", "PNG", "TIFF", "WEBP")
CHANNELS = 3
_SNIFF_BYTES = 64
_SUBSAMPLED_420 = (2, 2)

# Decoder's own memory in bytes per pixel, beside the output; measured figures from benchmarks/decode.py in brackets.
SCRATCH_BASELINE = 0.4  # [0.0]
# A decoder that meets its components one scan after the other keeps every coefficient until the last.
SCRATCH_BUFFERED_420 = 3.3  # [progressive 3.0]
SCRATCH_BUFFERED_444 = 6.4  # [progressive 4:2:2 4.0, 4:4:4 6.0, baseline with a scan per component 6.0]
SCRATCH_PILLOW = 8.0  # [PNG 1.2-4.3, CMYK 4.3]
SCRATCH_PILLOW_BUFFERED = 12.5  # [progressive CMYK 12.0]
SCRATCH_TIFF = 10.5  # [strips 4.3, one strip of 16 bits 10.0]
SCRATCH_WEBP = 17.5  # [16.1, with alpha 16.8]

_START_OF_SCAN = b"\xff\xda"
# Pillow keeps what stands before the pixels; the most a camera was seen to write there are depth maps of a few MB.
METADATA_BYTES = 16_000_000
# Each scan is a pass over the whole image, however few bytes it has; cameras and encoders write about ten.
PROGRESSIVE_SCANS = 100
# Of each strip's offset, 1 to 8 bytes in the file, Pillow makes 300: 4 MB of them took 1.3 GB and 7 s.
TIFF_VALUES = 1 << 16
_TIFF_WIDTH, _TIFF_HEIGHT, _TIFF_OFFSETS, _TIFF_TILE = 256, 257, {273, 324}, (322, 323)
_TIFF_BYTES = {1, 2, 7}  # types that Pillow leaves as they are
_TILE_PIXELS = 1 << 20  # libtiff allocates a tile whole, also where the image is smaller
_one_at_a_time = threading.Lock()

# The check is ours and comes with both numbers; Pillow's only warns at 89 Mpx and knows no reason.
Image.MAX_IMAGE_PIXELS = None


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """The header of one image file, as stored: EXIF orientation is not applied, so boxes match what Antenna shows."""

    format: str
    width_px: int
    height_px: int
    mode: str
    buffered: bool  # progressive, or a scan per component: decoding keeps all coefficients
    chroma_halved: bool
    compressed_bytes: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width, channels of the decoded rows."""
        return (self.height_px, self.width_px, CHANNELS)

    @property
    def pixel_bytes(self) -> int:
        """Bytes of the decoded image: uint8 RGB."""
        return CHANNELS * self.width_px * self.height_px

    @property
    def jpeg_in_place(self) -> bool:
        """Whether the fast JPEG decoder takes it; everything else goes through Pillow."""
        return self.format in {"JPEG", "MPO"} and self.mode in {"L", "RGB"}

    @property
    def scratch_bytes(self) -> int:
        """Memory one decode needs beside its output."""
        pixels = self.width_px * self.height_px
        if self.format == "WEBP":
            return int(SCRATCH_WEBP * pixels)
        if self.format == "TIFF":
            return int(SCRATCH_TIFF * pixels)
        if not self.jpeg_in_place:
            return int((SCRATCH_PILLOW_BUFFERED if self.buffered else SCRATCH_PILLOW) * pixels)
        if not self.buffered:
            return int(SCRATCH_BASELINE * pixels)
        return int((SCRATCH_BUFFERED_420 if self.chroma_halved else SCRATCH_BUFFERED_444) * pixels)


def read_header(path: Path, max_pixels: int) -> ImageHeader:
    """Read the header of a downloaded file.

    Raises:
        ImageUnreadable: it is empty, not an image, or of a format we do not take.
        ImageTooLarge: it has more than `max_pixels`.
    """
    size_bytes = path.stat().st_size
    if size_bytes == 0:
        raise ImageUnreadable("the downloaded file is empty (0 bytes)")
    with unreadable("broken image header"):
        try:
            with _one_at_a_time:
                header = _webp_header(path, size_bytes) or _header_by_pillow(path, size_bytes)
        except UnidentifiedImageError:
            raise ImageUnreadable(_what_it_is(path, size_bytes)) from None
    pixels = header.width_px * header.height_px
    if pixels > max_pixels:
        raise ImageTooLarge(
            f"{header.width_px}x{header.height_px} is {pixels} pixels;"
            f" this worker takes {max_pixels} (AMI_IMAGE_MAX_PIXELS)"
        )
    return header


@contextmanager
def unreadable(what: str) -> Iterator[None]:
    """Make ImageUnreadable of whatever a decoder raises on strange bytes, and ImageTooLarge where it lacks memory.

    Faults of this machine pass unchanged.
    """
    try:
        yield
    except ImageError:
        raise
    except Exception as error:
        # "Insufficient memory" of libjpeg, "out of memory error" of Pillow's decoders.
        if isinstance(error, MemoryError) or "memory" in str(error):
            raise ImageTooLarge(f"{what}: it takes more memory than this worker's process can have") from error
        # The system's have a number, those of Pillow none; a seek to where no file reaches is the image's, too.
        if isinstance(error, OSError) and error.errno not in {None, errno.EINVAL, errno.EOVERFLOW}:
            raise
        raise ImageUnreadable(f"{what}: {redact(str(error))}") from error


def stored_size(image: Image.Image) -> tuple[int, int]:
    """Return width and height as the file has them; for a TIFF Pillow tells those after its orientation."""
    tags = getattr(image, "tag_v2", None)
    return image.size if tags is None else (tags[_TIFF_WIDTH], tags[_TIFF_HEIGHT])


class _Metadata(io.BufferedReader):
    """A file of which METADATA_BYTES can be read, its pixels are not wanted yet; and what was read last."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self._left_bytes = METADATA_BYTES
        self.last_read = b""

    def read(self, size: int | None = -1, /) -> bytes:
        self.last_read = data = super().read(size)
        self._left_bytes -= len(data)
        if self._left_bytes < 0:
            raise ImageUnreadable(f"more than {METADATA_BYTES} bytes stand before its pixels")
        return data


def _header_by_pillow(path: Path, size_bytes: int) -> ImageHeader:
    _check_tiff(path)
    with _Metadata(path) as file, Image.open(file, formats=FORMATS) as image:
        # JpegImageFile.layer: one (id, horizontal sampling, vertical sampling, table) per component.
        layers = getattr(image, "layer", [])
        width_px, height_px = stored_size(image)
        # The last that Pillow reads of a JPEG is the head of its first scan, which begins with the number of its
        # components (ITU T.81, B.2.3). Should it ever read on, images are charged with too much memory, not too little.
        scan_components = next(iter(file.last_read), 0)
        progressive = bool(image.info.get("progressive"))
        if progressive and (scans := _scans(path)) > PROGRESSIVE_SCANS:
            raise ImageUnreadable(f"a progressive JPEG of {scans} scans, of which {PROGRESSIVE_SCANS} are taken")
        return ImageHeader(
            format=image.format or "",
            width_px=width_px,
            height_px=height_px,
            mode=image.mode,
            buffered=progressive or (len(layers) > 1 and scan_components != len(layers)),
            chroma_halved=bool(layers) and tuple(layers[0][1:3]) == _SUBSAMPLED_420,
            compressed_bytes=size_bytes,
        )


def _webp_header(path: Path, size_bytes: int) -> ImageHeader | None:
    """Read a WebP's header (RFC 9649, 2.5 to 2.7); None for another file. Pillow would read the file to its end."""
    with path.open("rb") as file:
        start = file.read(30)
    if not re.match(rb"RIFF....WEBPVP8[ LX].{14}", start, re.DOTALL):
        return None
    # Where width and height stand, the bits from one to the other, those that count, and what is missing from them.
    places = {b" ": (26, 16, 0x3FFF, 0), b"L": (21, 14, 0x3FFF, 1), b"X": (24, 24, 0xFFFFFF, 1)}
    at, shift, mask, more = places[start[15:16]]
    packed = int.from_bytes(start[at:], "little")
    width_px, height_px = (packed & mask) + more, (packed >> shift & mask) + more
    if not width_px or not height_px:
        raise ImageUnreadable(f"broken image header: {width_px}x{height_px} pixels")
    return ImageHeader("WEBP", width_px, height_px, "RGB", False, False, size_bytes)


def _check_tiff(path: Path) -> None:
    """Refuse a TIFF whose tags would take memory out of all proportion (TIFF 6.0, section 2; BigTIFF)."""
    with path.open("rb") as file:
        start = file.read(16)
        if not re.match(rb"(II|MM)(\0[*+]|[*+]\0)", start):  # Pillow takes them in either order
            return
        order, big = "<" if start[:1] == b"I" else ">", b"+" in start[:4]
        count, offset, entry = ("Q", "8xQ", "HHQQ") if big else ("H", "4xI", "HHII")
        file.seek(*struct.unpack_from(order + offset, start))
        (entries,) = struct.unpack(order + count, file.read(struct.calcsize(order + count)))
        directory = file.read(min(entries, TIFF_VALUES) * struct.calcsize(order + entry))
    largest: defaultdict[int, int] = defaultdict(int)
    for tag, kind, values, value in struct.iter_unpack(order + entry, directory):
        if values > TIFF_VALUES and (kind not in _TIFF_BYTES or tag in _TIFF_OFFSETS):
            raise ImageUnreadable(f"its TIFF tag {tag} has {values} values, of which {TIFF_VALUES} are taken")
        # A short stands in the first half of a big-endian field.
        short = order == ">" and kind == 3  # noqa: PLR2004 (TIFF's number for SHORT)
        largest[tag] = max(largest[tag], value >> (8 * struct.calcsize(entry[-1]) - 16) if short else value)
    tile_px = largest[_TIFF_TILE[0]] * largest[_TIFF_TILE[1]]
    if tile_px > max(_TILE_PIXELS, largest[_TIFF_WIDTH] * largest[_TIFF_HEIGHT]):
        raise ImageUnreadable(f"a TIFF with tiles of {tile_px} pixels, larger than itself")


def _scans(path: Path) -> int:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return sum(1 for _marker in re.finditer(_START_OF_SCAN, data))


def _what_it_is(path: Path, size_bytes: int) -> str:
    with path.open("rb") as file:
        start = file.read(_SNIFF_BYTES).lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<")):
        return f"received an HTML or XML page of {size_bytes} bytes instead of an image"
    return f"not an image this worker takes ({', '.join(FORMATS)}): {size_bytes} bytes starting with {start[:12]!r}"
