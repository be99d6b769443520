"""A corpus of what an image host may send: each file has its outcome, in no more memory than its header says."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from adc_worker.errors import ImageError
from adc_worker.host.memory import PeakResidentMemory
from adc_worker.ingest.decode import decode
from adc_worker.ingest.header import METADATA_BYTES, SCANS_MAX, TIFF_VALUES, ImageHeader, read_header
from tests.support.damage import ARITHMETIC_JPEG, png_chunk
from tests.support.images import bare_jpeg_header, encoded, jpeg, picture, run_length_bmp, written

MAX_PIXELS = 400_000_000
SLACK_BYTES = 8 << 20


def tiff(entries: dict[int, tuple[int, int, int | None]], pixels: bytes = b"") -> bytes:
    """Return a little-endian TIFF of these tags: type, count, and value or None where the data follow."""
    directory = b"".join(
        struct.pack("<HHII", tag, kind, count, 12 * len(entries) + 14 if value is None else value)
        for tag, (kind, count, value) in sorted(entries.items())
    )
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory + bytes(4) + pixels


def grey_tiff(**changes: tuple[int, int, int | None]) -> dict[int, tuple[int, int, int | None]]:
    tags = {256: 100, 257: 100, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 100, 279: 10_000}
    usual: dict[int, tuple[int, int, int | None]] = {tag: (4, 1, value) for tag, value in tags.items()}
    return usual | {int(tag[1:]): entry for tag, entry in changes.items()}


def png_with(cid: bytes, data: bytes, *, behind_pixels: bool = False) -> bytes:
    """Return a PNG with one more chunk."""
    whole = encoded(picture(), "PNG")
    at = len(whole) - 12 if behind_pixels else 33
    return whole[:at] + png_chunk(cid, data) + whole[at:]


def png_of(width_px: int, height_px: int, *, bits: int = 8, interlaced: int = 0) -> Callable[[], bytes]:
    """Return what makes a black RGB PNG of a kind that Pillow does not write."""
    header = struct.pack(">IIBBBBB", width_px, height_px, bits, 2, 0, 0, interlaced)
    rows = zlib.compress(bytes(height_px * (1 + 3 * width_px * bits // 8)))
    whole = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")
    return lambda: whole


def frames(image_format: str, **options: Any) -> bytes:
    return encoded(picture(), image_format, save_all=True, append_images=[picture(seed=1)] * 3, **options)


def rotated(image_format: str, orientation: int = 6) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture(), image_format, exif=exif)


def texts() -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("bomb", "x" * 60_000_000, zip=True)
    return encoded(picture(), "PNG", pnginfo=info)


def with_byte(data: bytes, marker: bytes, value: bytes) -> bytes:
    assert marker in data
    return data.replace(marker, value, 1)


CORPUS: dict[str, tuple[Callable[[], bytes], str]] = {
    "a baseline JPEG": (jpeg, "decoded"),
    "a progressive JPEG": (lambda: jpeg(progressive=True), "decoded"),
    "an arithmetic-coded JPEG": (lambda: ARITHMETIC_JPEG, "decoded"),
    "a CMYK JPEG": (lambda: encoded(picture(mode="CMYK"), "JPEG"), "decoded"),
    "a grey JPEG": (lambda: encoded(picture(mode="L"), "JPEG"), "decoded"),
    "a PNG of 16 bits": (lambda: encoded(picture(mode="I;16"), "PNG"), "decoded"),
    "a PNG of 3 x 16 bits": (png_of(20, 10, bits=16), "decoded"),
    "an interlaced PNG": (png_of(1, 1, interlaced=1), "decoded"),
    "a TIFF of 16 bits": (lambda: encoded(picture(mode="I;16"), "TIFF"), "decoded"),
    "a palette PNG": (lambda: encoded(picture(mode="P"), "PNG"), "decoded"),
    "a palette PNG with alpha": (lambda: encoded(picture(mode="P"), "PNG", transparency=bytes(range(256))), "decoded"),
    "a PNG with alpha": (lambda: encoded(picture(mode="RGBA"), "PNG"), "decoded"),
    "a WebP with alpha": (lambda: encoded(picture(mode="RGBA"), "WEBP"), "decoded"),
    "a phone's JPEG of two frames": (lambda: frames("MPO"), "decoded"),
    "a TIFF of four frames": (lambda: frames("TIFF"), "decoded"),
    "an animated PNG": (lambda: frames("PNG"), "decoded"),
    "an animated WebP": (lambda: frames("WEBP"), "decoded"),
    "a turned JPEG": (lambda: rotated("JPEG"), "decoded"),
    "a turned PNG": (lambda: rotated("PNG"), "decoded"),
    "a turned TIFF": (lambda: rotated("TIFF"), "decoded"),
    "a turned WebP": (lambda: rotated("WEBP"), "decoded"),
    "one pixel": (lambda: jpeg(1, 1), "decoded"),
    "a line of 60000 pixels": (lambda: encoded(Image.new("RGB", (1, 60_000)), "PNG"), "decoded"),
    "a JPEG of a line of 60000 pixels": (lambda: jpeg(60_000, 1), "decoded"),
    "15 MB before the pixels": (lambda: many_segments(230), "decoded"),
    "a chunk of 60 MB behind a PNG's pixels": (
        lambda: png_with(b"abCd", bytes(60_000_000), behind_pixels=True),
        "decoded",
    ),
    "a truncated JPEG": (lambda: jpeg(400, 300)[:-3000], "truncated"),
    "a truncated PNG": (lambda: encoded(picture(400, 300), "PNG")[:-3000], "truncated"),
    "no bytes": (lambda: b"", r"empty \(0 bytes\)"),
    "an HTML page": (lambda: b"<!DOCTYPE html><html>Sign in</html>", "HTML or XML page"),
    "a GIF": (lambda: encoded(picture(mode="P"), "GIF"), "decoded"),
    "an animated GIF": (lambda: frames("GIF"), "decoded"),
    "a GIF with 15 MB of comments": (lambda: gif_with_comments(58_000), "decoded"),
    "a GIF with 17 MB of comments": (lambda: gif_with_comments(68_000), f"more than {METADATA_BYTES} bytes stand"),
    "a GIF of 65535x65535": (lambda: gif_sized(65535, 65535), "65535x65535 is 4294836225 pixels"),
    "a BMP": (lambda: encoded(picture(), "BMP"), "decoded"),
    "a BMP of 1 bit": (lambda: encoded(picture(mode="1"), "BMP"), "decoded"),
    "a BMP of run lengths": (lambda: run_length_bmp(picture(mode="L")), "decoded"),
    "a BMP of run lengths that end early": (lambda: run_length_bmp(picture(mode="L"))[:-2000], "cannot be decoded"),
    "a BMP of 2^31 x 1": (lambda: bmp_sized(2**31 - 1, 1), "pixels; this worker takes|broken"),
    "a truncated BMP": (lambda: encoded(picture(400, 300), "BMP")[:-3000], "truncated"),
    "a truncated GIF": (lambda: encoded(picture(400, 300, mode="P"), "GIF")[:-3000], "truncated"),
    "a JPEG 2000": (lambda: encoded(picture(), "JPEG2000"), "not an image this worker takes"),
    "an SVG": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "HTML or XML page"),
    "an EPS": (lambda: encoded(picture(), "EPS"), "not an image this worker takes"),
    "a JPEG of 65500x65500": (lambda: bare_jpeg_header(65500, 65500), "65500x65500 is 4290250000 pixels"),
    "a PNG of 2^31 x 2^31": (lambda: png_sized(2**31 - 1, 2**31 - 1), "pixels; this worker takes|broken"),
    "a WebP of 16384x16384 in 30 bytes": (lambda: webp_sized(16384, 16384), "cannot be decoded as WEBP"),
    "a WebP of 2^24 x 2^24": (lambda: webp_sized(1 << 24, 1 << 24), "pixels; this worker takes"),
    "a JPEG of 0x0": (lambda: bare_jpeg_header(0, 0), "broken image header|cannot be decoded|not an image"),
    "a lossless JPEG": (lambda: with_byte(jpeg(), b"\xff\xc0", b"\xff\xc3"), "cannot be decoded as JPEG|broken"),
    "a JPEG of 12 bits": (lambda: with_byte(jpeg(), b"\xff\xc0\x00\x11\x08", b"\xff\xc1\x00\x11\x0c"), "JPEG|broken"),
    "a JPEG of 1000 scans": (lambda: many_scans(1000), f"1010 scans, of which {SCANS_MAX} are taken"),
    "20 MB before a JPEG's pixels": (lambda: many_segments(310), f"more than {METADATA_BYTES} bytes stand before"),
    "a chunk of 60 MB before a PNG's pixels": (
        lambda: png_with(b"abCd", bytes(60_000_000)),
        f"more than {METADATA_BYTES} bytes stand before",
    ),
    "a PNG's text of 60 MB in 60 kB": (texts, "(?i)decompressed data too large"),
    "a PNG's colour profile of 60 MB in 60 kB": (
        lambda: png_with(b"iCCP", b"x\0\0" + zlib.compress(bytes(60_000_000))),
        "(?i)broken image header: decompressed data too large",
    ),
    "a TIFF of a million strips": (
        lambda: tiff(grey_tiff(t273=(4, 1_000_000, None)), bytes(4_000_000)),
        f"tag 273 has 1000000 values, of which {TIFF_VALUES} are taken",
    ),
    "a TIFF of a million strips in bytes": (
        lambda: tiff(grey_tiff(t273=(1, 1_000_000, None)), bytes(1_000_000)),
        "tag 273 has 1000000 values",
    ),
    "a TIFF of a million strips with its mark turned": (
        lambda: with_byte(tiff(grey_tiff(t273=(4, 1_000_000, None)), bytes(4_000_000)), b"II*\0", b"II\0*"),
        "tag 273 has 1000000 values",
    ),
    "a TIFF with a million bits per sample": (
        lambda: tiff(grey_tiff(t258=(3, 1_000_000, None)), bytes(2_000_000)),
        "tag 258 has 1000000 values",
    ),
    "a TIFF of one huge tile": (
        lambda: tiff(
            grey_tiff(
                t259=(4, 1, 8), t322=(4, 1, 60_000), t323=(4, 1, 60_000), t324=(4, 1, 134), t325=(4, 1, 3_500_000)
            ),
            zlib.compress(bytes(10_000)),
        ),
        "tiles of 3600000000 pixels",
    ),
    "a TIFF whose directory lies where no file reaches": (
        lambda: b"II+\0\x08\0\0\0" + struct.pack("<Q", 2**63 - 1),
        "broken image header",
    ),
}


def png_sized(width_px: int, height_px: int) -> bytes:
    data = encoded(picture(), "PNG")
    return data[:8] + png_chunk(b"IHDR", struct.pack(">II", width_px, height_px) + data[24:29]) + data[33:]


def webp_sized(width_px: int, height_px: int) -> bytes:
    size = (width_px - 1).to_bytes(3, "little") + (height_px - 1).to_bytes(3, "little")
    return b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + size


def gif_with_comments(blocks: int) -> bytes:
    data = encoded(picture(mode="P"), "GIF")
    at = 13 + 3 * (2 << (data[10] & 7))  # behind the palette
    return data[:at] + b"\x21\xfe" + (b"\xff" + b"x" * 255) * blocks + b"\0" + data[at:]


def gif_sized(width_px: int, height_px: int) -> bytes:
    data = encoded(picture(mode="P"), "GIF")
    return data[:6] + struct.pack("<HH", width_px, height_px) + data[10:]


def bmp_sized(width_px: int, height_px: int) -> bytes:
    data = encoded(picture(), "BMP")
    return data[:18] + struct.pack("<ii", width_px, height_px) + data[26:]


def many_segments(count: int) -> bytes:
    data = jpeg()
    return data[:2] + (b"\xff\xe5\xff\xff" + bytes(65533)) * count + data[2:]


def many_scans(count: int) -> bytes:
    """Return a progressive JPEG that refines the same coefficients again and again."""
    data = jpeg(64, 64, progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * count + b"\xff\xd9"


def outcome(path: Path) -> tuple[str, ImageHeader | None]:
    try:
        header = read_header(path, MAX_PIXELS)
        report = decode(path, header, np.zeros(header.shape, np.uint8))
    except ImageError as error:
        return str(error), None
    return "truncated" if report.truncated else "decoded", header


@pytest.mark.parametrize("name", CORPUS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_file_has_its_outcome_in_bounded_memory(tmp_path: Path, name: str) -> None:
    """Decoded, truncated, or an error that says why; a refused file costs what stands before its pixels at most."""
    make, expected = CORPUS[name]
    path = written(tmp_path / "1.jpg", make())
    memory = PeakResidentMemory()
    told, header = outcome(path)
    grown_bytes = memory.growth_bytes()
    assert re.search(expected, told), told
    needed = 0 if header is None else header.pixel_bytes + header.scratch_bytes + header.compressed_bytes
    assert grown_bytes <= max(needed, 2 * METADATA_BYTES) + SLACK_BYTES
