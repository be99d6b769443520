"""What the header of a staged file tells before a pixel is decoded: shape, kind, and the cost of decoding it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from adc_worker.errors import ImageTooLarge, ImageUnreadable
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

_SOI, _SOS = 0xD8, 0xDA

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
            with Image.open(path, formats=FORMATS) as image:
                header = _header_of(image, path, size_bytes)
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
    """Make ImageUnreadable of whatever a decoder raises on strange bytes; faults of this machine pass unchanged."""
    try:
        yield
    except (ImageUnreadable, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno:  # the system's; those of Pillow have no number
            raise
        raise ImageUnreadable(f"{what}: {redact(str(error))}") from error


def _header_of(image: Image.Image, path: Path, size_bytes: int) -> ImageHeader:
    # JpegImageFile.layer: one (id, horizontal sampling, vertical sampling, table) per component.
    layers = getattr(image, "layer", [])
    return ImageHeader(
        format=image.format or "",
        width_px=image.width,
        height_px=image.height,
        mode=image.mode,
        buffered=bool(image.info.get("progressive")) or (len(layers) > 1 and _first_scan(path) != len(layers)),
        chroma_halved=bool(layers) and tuple(layers[0][1:3]) == _SUBSAMPLED_420,
        compressed_bytes=size_bytes,
    )


def _first_scan(path: Path) -> int:
    """Return how many components a JPEG's first scan has (ITU T.81, B.2.3); 0 when it cannot be found."""
    with path.open("rb") as file:
        if file.read(2) != bytes((0xFF, _SOI)):
            return 0
        while len(start := file.read(4)) == 4 and start[0] == 0xFF:  # noqa: PLR2004 (marker and length of a segment)
            if start[1] == _SOS:
                return file.read(1)[0]
            file.seek(int.from_bytes(start[2:]) - 2, 1)
    return 0


def _what_it_is(path: Path, size_bytes: int) -> str:
    with path.open("rb") as file:
        start = file.read(_SNIFF_BYTES).lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<")):
        return f"received an HTML or XML page of {size_bytes} bytes instead of an image"
    return f"not an image this worker takes ({', '.join(FORMATS)}): {size_bytes} bytes starting with {start[:12]!r}"
