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

import simplejpeg
from PIL import Image, UnidentifiedImageError

from adc_worker.errors import ImageError, ImageTooLarge, ImageUnreadable
from adc_worker.ingest.jpeg_segments import JpegStructure, count_scans, read_structure
from adc_worker.redaction import redact

FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP")
CHANNELS = 3
_SNIFF_BYTES = 64
_SHOWN_BYTES = 12
_SIGNATURES = {"JPEG": (b"\xff\xd8\xff",), "PNG": (b"\x89PNG",), "GIF": (b"GIF8",), "TIFF": (b"II*\0", b"MM\0*")}
_APPLE_DOUBLE = b"\0\x05\x16\x07"
_ISO_MEDIA = b"ftyp"  # ISO/IEC 14496-12: behind the size of the first box, and before the file's brand
_BRAND_AT = 8
_BRAND_BYTES = 4
JPEG_FORMATS = frozenset({"JPEG", "MPO"})  # MPO is a JPEG with more pictures behind it

# Decoder's own memory in bytes per pixel, beside the output; measured figures from benchmarks/decode.py in brackets.
SCRATCH_BASELINE = 0.4  # [0.0]
# A decoder that meets its components one scan after the other keeps every coefficient until the last.
SCRATCH_BUFFERED_420 = 3.3  # [progressive 3.0]
SCRATCH_BUFFERED_444 = 6.4  # [progressive 4:2:2 4.0, 4:4:4 6.0, baseline with a scan per component 6.0]
SCRATCH_PILLOW = 8.0  # [PNG 1.2-4.3, CMYK 4.3, JPEG 3x1 4.8, GIF 1.5, BMP 4.6, BMP RLE 3.4]
SCRATCH_PILLOW_BUFFERED = 12.5  # [progressive CMYK 12.0, a scan per component of JPEG 3x1 10.2]
SCRATCH_TIFF = 10.5  # [strips 4.3, one strip of 16 bits 10.0]
SCRATCH_WEBP = 17.5  # [16.1, with alpha 16.8]

# Pillow keeps what stands before the pixels; the most a camera was seen to write there are depth maps of a few MB.
METADATA_BYTES = 16_000_000
# Each scan is a pass over the whole image, however few bytes it has; cameras and encoders write about ten.
SCANS_MAX = 100
# Of each strip's offset, 1 to 8 bytes in the file, Pillow makes 300: 4 MB of them took 1.3 GB and 7 s.
TIFF_VALUES = 1 << 16
_TIFF_WIDTH, _TIFF_HEIGHT, _TIFF_OFFSETS, _TIFF_TILE = 256, 257, {273, 324}, (322, 323)
_TIFF_ORIENTATION = 274
_TIFF_NEW_SUBFILE_TYPE, _TIFF_SUB_DIRECTORIES = 254, 330
_IS_REDUCED = 1  # the bit of NewSubfileType that says "a reduced-resolution version of another image in this file"
_UPRIGHT = 1
_ORIENTATIONS = range(1, 9)
_SIDEWAYS = frozenset({5, 6, 7, 8})  # rows and columns change places
_TIFF_BYTES = {1, 2, 7}  # types that Pillow leaves as they are
_TILE_PIXELS = 1 << 20  # libtiff allocates a tile whole, also where the image is smaller
_one_at_a_time = threading.Lock()

# The check is ours and comes with both numbers; Pillow's only warns at 89 Mpx and knows no reason.
Image.MAX_IMAGE_PIXELS = None


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """The header of one image file. Width and height are those of the decoded rows.

    A TIFF is turned as its orientation says, all other formats stay as stored: so does Pillow, and with it Antenna.

    Attributes:
        buffered: progressive, or a scan per component: decoding keeps all coefficients.
        orientation: 1 to 8 as in TIFF 6.0; the orientation of a file that is not turned is 1, whatever its EXIF says.
        turbo_takes_it: whether the fast JPEG decoder reads the header. It does not where it has no name for how the
            components are sampled, nor where there is anything to complain of before the first scan.
    """

    format: str
    width_px: int
    height_px: int
    mode: str
    buffered: bool
    chroma_halved: bool
    compressed_bytes: int
    orientation: int = _UPRIGHT
    turbo_takes_it: bool = True

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width, channels of the decoded rows."""
        return (self.height_px, self.width_px, CHANNELS)

    @property
    def pixel_bytes(self) -> int:
        """Bytes of the decoded image: uint8 RGB."""
        return CHANNELS * self.width_px * self.height_px

    @property
    def is_jpeg(self) -> bool:
        return self.format in JPEG_FORMATS

    @property
    def jpeg_in_place(self) -> bool:
        """Whether the fast JPEG decoder takes it; everything else goes through Pillow."""
        return self.is_jpeg and self.mode in {"L", "RGB"} and self.turbo_takes_it

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


def is_sideways(orientation: int) -> bool:
    """Whether an image of this orientation changes rows with columns when it is turned."""
    return orientation in _SIDEWAYS


def _tiff_orientation(image: Image.Image) -> int:
    """Return by which orientation Pillow turns this image when it is loaded; 1 for all formats but TIFF."""
    tags = getattr(image, "tag_v2", None)
    if tags is None:
        return _UPRIGHT
    # Without the tag, Pillow looks for the orientation in the XMP packet.
    told = tags[_TIFF_ORIENTATION] if _TIFF_ORIENTATION in tags else image.getexif().get(_TIFF_ORIENTATION)
    return next((number for number in _ORIENTATIONS if number == told), _UPRIGHT)


class _Metadata(io.BufferedReader):
    """A file of which METADATA_BYTES can be read: its pixels are not wanted yet."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self._left_bytes = METADATA_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self._left_bytes -= len(data)
        if self._left_bytes < 0:
            raise ImageUnreadable(f"more than {METADATA_BYTES} bytes stand before its pixels")
        return data


def _header_by_pillow(path: Path, size_bytes: int) -> ImageHeader:
    _check_tiff(path)
    with _Metadata(path) as file, Image.open(file, formats=FORMATS) as image:
        image_format = image.format or ""
        structure, turbo_takes_it = _jpeg_structure(path) if image_format in JPEG_FORMATS else (None, False)
        width_px, height_px = stored_size(image)
        orientation = _tiff_orientation(image)
        if is_sideways(orientation):
            width_px, height_px = height_px, width_px
        return ImageHeader(
            format=image_format,
            width_px=width_px,
            height_px=height_px,
            mode=image.mode,
            buffered=structure is not None and structure.buffered,
            chroma_halved=structure is not None and structure.chroma_halved,
            compressed_bytes=size_bytes,
            orientation=orientation,
            turbo_takes_it=turbo_takes_it,
        )


def _jpeg_structure(path: Path) -> tuple[JpegStructure, bool]:
    """Read how a JPEG is coded, and whether the fast decoder takes it.

    One whose segments cannot be followed is taken for the most expensive kind.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        structure = read_structure(data) or JpegStructure(progressive=True, sampling=(), first_scan_components=0)
        if structure.buffered:
            scans = count_scans(data)
            if scans > SCANS_MAX:
                raise ImageUnreadable(f"a JPEG of {scans} scans, of which {SCANS_MAX} are taken")
        try:
            simplejpeg.decode_jpeg_header(data, strict=True)
        except (ValueError, KeyError):  # KeyError: 4:4:1, for which simplejpeg has no name
            # Pillow may decode it all the same, and says why if it does not.
            return structure, False
    return structure, True


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
        next_directory = file.read(struct.calcsize(order + entry[-1]))
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
    is_reduced = bool(largest[_TIFF_NEW_SUBFILE_TYPE] & _IS_REDUCED)
    holds_others = _TIFF_SUB_DIRECTORIES in largest or any(next_directory)
    if is_reduced and holds_others:
        raise ImageUnreadable(
            "a raw photograph, or another TIFF whose first picture is a preview of one that is not read: raw formats"
            " (DNG, NEF, ARW) are not taken"
        )


def _what_it_is(path: Path, size_bytes: int) -> str:
    """Say what came in place of an image, or which format it claims to be of."""
    with path.open("rb") as file:
        start = file.read(_SNIFF_BYTES).lstrip()
    if start.startswith(b"<"):
        return f"received an HTML or XML page of {size_bytes} bytes instead of an image"
    for image_format, signatures in _SIGNATURES.items():
        if start.startswith(signatures):
            return f"broken image header: {size_bytes} bytes that begin as a {image_format} does, and cannot be read"
    shown = start[:_SHOWN_BYTES]
    not_taken = f"not an image this worker takes ({', '.join(FORMATS)}): {size_bytes} bytes starting with {shown!r}"
    if start.startswith(_APPLE_DOUBLE):
        return f"{not_taken}, which is what macOS writes beside a file, under ._ and its name"
    if start[_BRAND_AT - len(_ISO_MEDIA) : _BRAND_AT] == _ISO_MEDIA:
        brand = start[_BRAND_AT : _BRAND_AT + _BRAND_BYTES].decode("ascii", "replace").strip()
        return f"{not_taken}, which is HEIC, AVIF or a video: ISO media of brand {brand}"
    return not_taken
