"""Small image files of every kind, and staged images that need no file."""

from __future__ import annotations

import io
import struct
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from adc_worker.antenna.wire import Task
from adc_worker.ingest.download import DownloadStats
from adc_worker.ingest.header import ImageHeader
from adc_worker.ingest.staging import StagedImage

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

SIZE_PX = (97, 61)


def picture(width_px: int = SIZE_PX[0], height_px: int = SIZE_PX[1], mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Return a smooth picture with some noise, so that every codec has something to do."""
    y, x = np.mgrid[0:height_px, 0:width_px]
    noise = np.random.default_rng(seed).integers(0, 24, (height_px, width_px))
    bands = [(3 * x + noise + 40 * seed) % 256, (5 * y + noise) % 256, (2 * (x + y) + noise) % 256]
    rgb = Image.fromarray(np.stack(bands, axis=-1).astype(np.uint8))
    if mode == "I;16":
        return Image.fromarray(((x + y) * 400 % 65536).astype(np.uint16))
    if mode == "RGBA":
        rgb.putalpha(Image.fromarray((x % 256).astype(np.uint8)))
    return rgb.convert(mode)


def encoded(image: Image.Image, image_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def jpeg(width_px: int = SIZE_PX[0], height_px: int = SIZE_PX[1], seed: int = 0, **options: Any) -> bytes:
    return encoded(picture(width_px, height_px, seed=seed), "JPEG", **options)


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def run_length_bmp(image: Image.Image) -> bytes:
    """Return a BMP of run lengths of a grey image (BI_RLE8, which Pillow reads and does not write)."""
    rows = np.asarray(image)[::-1]
    coded = bytearray()
    for row in rows:
        starts = np.flatnonzero(np.diff(row, prepend=int(row[0]) ^ 1))
        ends = np.append(starts[1:], len(row))
        for start, end in zip(starts, ends, strict=True):
            whole, rest = divmod(int(end - start), 255)
            coded += bytes([255, row[start]]) * whole
            if rest:
                coded += bytes([rest, row[start]])
        coded += b"\0\0"  # end of row
    coded += b"\0\1"  # end of image
    palette = b"".join(bytes([level, level, level, 0]) for level in range(256))
    pixels_at = 54 + len(palette)
    file_header = b"BM" + struct.pack("<IHHI", pixels_at + len(coded), 0, 0, pixels_at)
    size = (image.width, image.height)
    information = struct.pack("<IiiHHIIiiII", 40, *size, 1, 8, 1, len(coded), 0, 0, 256, 0)
    return file_header + information + palette + bytes(coded)


def by_pillow(data: bytes) -> npt.NDArray[np.uint8]:
    """Return what Pillow makes of a file: uint8 [height, width, 3]."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def bare_jpeg_header(width_px: int, height_px: int, *, scan_components: int = 3) -> bytes:
    """Return a baseline JPEG's start up to its first scan, of any size, without pixels."""
    frame = bytes([8]) + height_px.to_bytes(2) + width_px.to_bytes(2) + bytes([3, 1, 0x22, 0, 2, 0x11, 0, 3, 0x11, 0])
    scan = bytes([scan_components, *[1, 0, 2, 0, 3, 0][: 2 * scan_components], 0, 63, 0])
    segments = [(0xC0, frame), (0xDA, scan)]
    return b"\xff\xd8" + b"".join(
        bytes([0xFF, code]) + (len(body) + 2).to_bytes(2) + body for code, body in segments
    )  # fmt: skip


def task(number: int = 0, url: str = "http://images.test/a.jpg") -> Task:
    return Task(image_id=str(number), image_url=url, reply_subject=f"$JS.ACK.job.c.1.{number}.{number}.1.0")


def header(
    width_px: int, height_px: int, *, image_format: str = "JPEG", mode: str = "RGB", buffered: bool = False
) -> ImageHeader:
    return ImageHeader(image_format, width_px, height_px, mode, buffered, chroma_halved=True, compressed_bytes=100)


def staged(number: int, path: Path, image_header: ImageHeader, staged_at: float = 1.0) -> StagedImage:
    return StagedImage(number, task(number), path, image_header, DownloadStats(0.0, 0.0, 100), staged_at)
