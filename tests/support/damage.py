"""Small image files of every kind that the worker takes, and what may happen to a file on a card, a disk or a link."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from tests.support.images import encoded, jpeg, picture, run_length_bmp
from tests.support.jpeg_writer import sampled_jpeg

if TYPE_CHECKING:
    import random

SIZE_PX = (72, 54)
PNG_START = b"\x89PNG\r\n\x1a\n"
# jpegtran -arithmetic of a 16x16 JPEG: no encoder that Python has writes one.
ARITHMETIC_JPEG = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABALDA4MChAODQ4SERATGCgaGBYWGDEjJR0oOjM9PDkzODdASFxOQERXRTc4UG1RV19i"
    "Z2hnPk1xeXBkeFxlZ2P/2wBDARESEhgVGC8aGi9jQjhCY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2Nj"
    "Y2NjY2NjY2P/yQARCAAQABADASIAAhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIRAxEAPwD/AJ/OoUk78kJ9B8uRAHfaDxCpBQzv"
    "/wDKNV5q4cD/2Q=="
)
RARE_SAMPLING = ((3, 1), (1, 1), (1, 1))


def png_chunk(cid: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + cid + data + struct.pack(">I", zlib.crc32(cid + data))


def png_of_rows(width_px: int, height_px: int, rows: bytes, *, interlaced: int = 0) -> bytes:
    """Return an RGB PNG of these rows, each with its filter byte: as many as there are, whatever its header says."""
    header = struct.pack(">IIBBBBB", width_px, height_px, 8, 2, 0, 0, interlaced)
    parts = [PNG_START, png_chunk(b"IHDR", header), png_chunk(b"IDAT", zlib.compress(rows)), png_chunk(b"IEND", b"")]
    return b"".join(parts)


def interlaced_png() -> bytes:
    """Return an RGB PNG in seven passes (PNG specification, 8.2): every pass has its own rows."""
    pixels = np.asarray(picture(*SIZE_PX))
    passes = [(0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4), (2, 4, 0, 2), (0, 2, 1, 2), (1, 2, 0, 1)]
    rows = bytearray()
    for top, down, left, across in passes:
        for row in pixels[top::down, left::across]:
            rows += b"\0" + row.tobytes()
    return png_of_rows(*SIZE_PX, bytes(rows), interlaced=1)


def tiled_tiff() -> bytes:
    """Return a grey TIFF of 32x32 tiles (TIFF 6.0, section 15), which Pillow does not write."""
    tile_px = 32
    across = -(-SIZE_PX[0] // tile_px)
    down = -(-SIZE_PX[1] // tile_px)
    pixels = np.zeros((down * tile_px, across * tile_px), np.uint8)
    pixels[: SIZE_PX[1], : SIZE_PX[0]] = np.asarray(picture(*SIZE_PX, mode="L"))
    tiles = [
        pixels[top : top + tile_px, left : left + tile_px].tobytes()
        for top in range(0, down * tile_px, tile_px)
        for left in range(0, across * tile_px, tile_px)
    ]
    tags = {256: SIZE_PX[0], 257: SIZE_PX[1], 258: 8, 259: 1, 262: 1, 277: 1, 322: tile_px, 323: tile_px}
    directory_bytes = 2 + 12 * (len(tags) + 2) + 4
    lists_at = 8 + directory_bytes
    pixels_at = lists_at + 2 * 4 * len(tiles)
    entries = {tag: (1, value) for tag, value in tags.items()}
    entries[324] = (len(tiles), lists_at)
    entries[325] = (len(tiles), lists_at + 4 * len(tiles))
    directory = b"".join(struct.pack("<HHII", tag, 4, *entries[tag]) for tag in sorted(entries))
    offsets = [pixels_at + number * tile_px * tile_px for number in range(len(tiles))]
    lists = struct.pack(f"<{2 * len(tiles)}I", *offsets, *[tile_px * tile_px] * len(tiles))
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory + bytes(4) + lists + b"".join(tiles)


def _sample_files() -> dict[str, bytes]:
    rgb, grey, alpha, palette, deep, cmyk, black = (
        picture(*SIZE_PX, mode=mode) for mode in ("RGB", "L", "RGBA", "P", "I;16", "CMYK", "1")
    )
    return {
        "JPEG 4:2:0": jpeg(*SIZE_PX, subsampling=2),
        "JPEG 4:4:4": jpeg(*SIZE_PX, subsampling=0),
        "JPEG with restart markers": encoded(rgb, "JPEG", restart_marker_blocks=3),
        "JPEG grey": encoded(grey, "JPEG"),
        "JPEG CMYK": encoded(cmyk, "JPEG"),
        "JPEG progressive": jpeg(*SIZE_PX, progressive=True),
        "JPEG progressive grey": encoded(grey, "JPEG", progressive=True),
        "JPEG progressive CMYK": encoded(cmyk, "JPEG", progressive=True),
        "JPEG arithmetic": ARITHMETIC_JPEG,
        "JPEG scan per component": sampled_jpeg(*SIZE_PX, ((2, 2), (1, 1), (1, 1)), scan_per_component=True),
        "JPEG 3x1": sampled_jpeg(*SIZE_PX, RARE_SAMPLING, restart_blocks=4),
        "JPEG 3x1 scan per component": sampled_jpeg(*SIZE_PX, RARE_SAMPLING, scan_per_component=True),
        "JPEG 3x1 progressive": sampled_jpeg(*SIZE_PX, RARE_SAMPLING, progressive=True),
        "MPO": encoded(rgb, "MPO", save_all=True, append_images=[rgb]),
        "PNG RGB": encoded(rgb, "PNG"),
        "PNG palette": encoded(palette, "PNG"),
        "PNG 16 bits": encoded(deep, "PNG"),
        "PNG 1 bit": encoded(black, "PNG"),
        "PNG interlaced": interlaced_png(),
        "TIFF strips": encoded(rgb, "TIFF", strip_size=1000),
        "TIFF tiles": tiled_tiff(),
        "TIFF turned": encoded(rgb, "TIFF", tiffinfo={274: 6}),
        "TIFF LZW": encoded(rgb, "TIFF", compression="tiff_lzw", strip_size=1000),
        "TIFF deflate 16 bits": encoded(deep, "TIFF", compression="tiff_adobe_deflate", strip_size=1000),
        "TIFF packbits": encoded(grey, "TIFF", compression="packbits", strip_size=1000),
        "TIFF group 4": encoded(black, "TIFF", compression="group4"),
        "TIFF JPEG": encoded(rgb, "TIFF", compression="jpeg"),
        "TIFF big": encoded(rgb, "TIFF", big_tiff=True),
        "GIF": encoded(palette, "GIF", interlace=0),
        "GIF interlaced": encoded(palette, "GIF", interlace=1),
        "BMP RGB": encoded(rgb, "BMP"),
        "BMP palette": encoded(palette, "BMP"),
        "BMP 1 bit": encoded(black, "BMP"),
        "BMP RLE": run_length_bmp(Image.fromarray(np.asarray(grey) // 32)),
        "WEBP lossy": encoded(rgb, "WEBP"),
        "WEBP lossless": encoded(rgb, "WEBP", lossless=True),
        "WEBP alpha": encoded(alpha, "WEBP"),
    }


SAMPLE_FILES = _sample_files()

Damage = Callable[[bytes, "random.Random"], bytes]


def _place(data: bytes, dice: random.Random) -> int:
    return dice.randrange(max(1, len(data)))


def _cut(data: bytes, dice: random.Random) -> bytes:
    return data[: _place(data, dice)]


def _lost_block(data: bytes, dice: random.Random) -> bytes:
    at = _place(data, dice)
    return data[:at] + data[at + dice.randrange(1, 400) :]


def _zeroed_block(data: bytes, dice: random.Random) -> bytes:
    at = _place(data, dice)
    size = min(dice.randrange(1, 400), len(data) - at)
    return data[:at] + bytes(size) + data[at + size :]


def _flipped_bytes(data: bytes, dice: random.Random) -> bytes:
    broken = bytearray(data)
    for _byte in range(4):
        broken[_place(data, dice)] ^= dice.randrange(1, 256)
    return bytes(broken)


def _flipped_header(data: bytes, dice: random.Random) -> bytes:
    broken = bytearray(data)
    broken[dice.randrange(4, min(len(data), 700))] = dice.choice((0, 1, 2, 0x7F, 0x80, 0xFF))
    return bytes(broken)


def _stray_marker(data: bytes, dice: random.Random) -> bytes:
    marker = bytes([0xFF, dice.choice((0xD8, 0xD9, 0xC0, 0xC2, 0xC4, 0xDA, 0xDB, 0xDC, 0xDD, 0xE0, 0xD0, 0x01))])
    at = _place(data, dice)
    return data[:at] + marker + data[at + 2 :]


def _missing_piece_and_end(data: bytes, dice: random.Random) -> bytes:
    return _cut(_lost_block(data, dice), dice)


def _two_files_mixed(data: bytes, dice: random.Random) -> bytes:
    other = dice.choice(list(SAMPLE_FILES.values()))
    at = _place(data, dice)
    start = dice.randrange(len(other))
    piece = other[start : start + dice.randrange(2, 800)]
    return data[:at] + piece + data[at + dice.choice((0, len(piece))) :]


def _scans(data: bytes) -> list[int]:
    return [at for at in range(len(data) - 1) if data[at : at + 2] == b"\xff\xda"]


def _scan_missing(data: bytes, dice: random.Random) -> bytes:
    scans = _scans(data)
    if not scans:
        return _lost_block(data, dice)
    number = dice.randrange(len(scans))
    end = scans[number + 1] if number + 1 < len(scans) else len(data) - 2
    return data[: scans[number]] + data[end:]


def _scan_repeated(data: bytes, dice: random.Random) -> bytes:
    scans = _scans(data)
    if not scans:
        return _two_files_mixed(data, dice)
    start = dice.choice(scans)
    return data[:-2] + data[start:-2] + data[-2:]


DAMAGES: dict[str, Damage] = {
    "cut": _cut,
    "lost block": _lost_block,
    "zeroed block": _zeroed_block,
    "flipped bytes": _flipped_bytes,
    "flipped header": _flipped_header,
    "stray marker": _stray_marker,
    "missing piece and end": _missing_piece_and_end,
    "two files mixed": _two_files_mixed,
    "scan missing": _scan_missing,
    "scan repeated": _scan_repeated,
}
