"""What is read from a header: kind, size as stored, cost; and what is refused before a pixel is decoded."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from adc_worker.errors import ImageTooLarge, ImageUnreadable
from adc_worker.ingest.header import FORMATS, ImageHeader, read_header
from tests.support.images import SIZE_PX, bare_jpeg_header, encoded, header, jpeg, picture, written
from tests.support.jpeg_writer import sampled_jpeg, segment

MAX_PIXELS = 400_000_000


def _read(tmp_path: Path, data: bytes, max_pixels: int = MAX_PIXELS) -> ImageHeader:
    return read_header(written(tmp_path / "1.img", data), max_pixels)


@pytest.mark.parametrize(
    ("image_format", "mode", "options", "in_place"),
    [
        ("JPEG", "RGB", {"subsampling": 0}, True),
        ("JPEG", "RGB", {"subsampling": 1}, True),
        ("JPEG", "RGB", {"subsampling": 2}, True),
        ("JPEG", "RGB", {"progressive": True}, True),
        ("JPEG", "L", {}, True),
        ("JPEG", "CMYK", {}, False),
        ("PNG", "RGB", {}, False),
        ("PNG", "RGBA", {}, False),
        ("PNG", "P", {}, False),
        ("PNG", "L", {}, False),
        ("PNG", "1", {}, False),
        ("PNG", "I;16", {}, False),
        ("TIFF", "RGB", {}, False),
        ("TIFF", "RGB", {"compression": "tiff_lzw"}, False),
        ("TIFF", "CMYK", {}, False),
        ("GIF", "P", {}, False),
        ("BMP", "RGB", {}, False),
        ("BMP", "P", {}, False),
        ("WEBP", "RGB", {}, False),
        ("WEBP", "RGB", {"lossless": True}, False),
        ("WEBP", "RGBA", {}, False),
    ],
)
def test_every_kind_is_read(
    tmp_path: Path, image_format: str, mode: str, options: dict[str, Any], *, in_place: bool
) -> None:
    """Format, mode, size and bytes of the file; only plain JPEG takes the fast decoder."""
    data = encoded(picture(mode=mode), image_format, **options)
    read = _read(tmp_path, data)
    told = "RGB" if image_format == "WEBP" else mode  # the decoder's business, and of no effect on the cost
    assert (read.format, read.mode, read.width_px, read.height_px) == (image_format, told, *SIZE_PX)
    assert read.buffered == options.get("progressive", False)
    assert read.compressed_bytes == len(data)
    assert read.jpeg_in_place == in_place
    assert read.shape == (SIZE_PX[1], SIZE_PX[0], 3)
    assert read.pixel_bytes == 3 * SIZE_PX[0] * SIZE_PX[1]


@pytest.mark.parametrize(("subsampling", "halved"), [(0, False), (1, False), (2, True)])
def test_halved_chroma_is_told_from_the_rest(tmp_path: Path, subsampling: int, *, halved: bool) -> None:
    """4:2:0 is what cameras write; 4:2:2 costs as much as 4:4:4."""
    assert _read(tmp_path, jpeg(subsampling=subsampling)).chroma_halved == halved


@pytest.mark.parametrize(
    ("factors", "halved"),
    [
        (((2, 2), (1, 1), (1, 1)), True),
        (((2, 2), (2, 2), (2, 2)), False),
        (((2, 2), (1, 2), (1, 2)), False),
        (((2, 2),), False),
    ],
)
def test_halved_chroma_is_told_by_all_components(
    tmp_path: Path, factors: tuple[tuple[int, int], ...], *, halved: bool
) -> None:
    """Of 4:4:4 written as 2x2 three times the decoder keeps twice as much as of 4:2:0."""
    assert _read(tmp_path, sampled_jpeg(40, 30, factors)).chroma_halved == halved


def test_scans_are_counted_up_to_the_end_of_the_picture(tmp_path: Path) -> None:
    """Not those of previews in front of it, nor those of whatever lies behind it."""
    data = jpeg(64, 48, progressive=True)
    preview = segment(0xE5, b"PREVIEW\0" + jpeg(20, 20, progressive=True))
    in_front = data[:2] + preview * 30 + data[2:]
    behind = data + b"\xff\xda\0\x0c" * 1000
    for whole in (in_front, behind):
        assert _read(tmp_path, whole).buffered


@pytest.mark.parametrize("progressive", [False, True])
def test_more_scans_than_any_encoder_writes_are_refused(tmp_path: Path, *, progressive: bool) -> None:
    """Each is a pass over the whole image; a file that is not progressive may repeat its scans, too."""
    data = sampled_jpeg(64, 48, ((1, 1), (1, 1), (1, 1)), scan_per_component=True)
    if progressive:
        data = jpeg(64, 48, progressive=True)
    last_scan = data.rindex(b"\xff\xda")
    many = data[:-2] + data[last_scan:-2] * 1000 + data[-2:]
    with pytest.raises(ImageUnreadable, match=r"a JPEG of 10\d\d scans, of which 100 are taken"):
        _read(tmp_path, many)


def test_more_segments_than_any_camera_writes_are_refused(tmp_path: Path) -> None:
    """Following millions of empty ones would take seconds."""
    data = jpeg()
    many = data[:2] + segment(0xFE, b"") * 70_000 + data[2:]
    with pytest.raises(ImageUnreadable, match="a JPEG of more than 65536 segments"):
        _read(tmp_path, many)


def test_a_phone_photograph_with_a_second_frame_is_a_jpeg(tmp_path: Path) -> None:
    """MPO is a JPEG with more pictures behind it: the fast decoder takes the first."""
    data = encoded(picture(), "MPO", save_all=True, append_images=[picture(seed=1)])
    assert _read(tmp_path, data).jpeg_in_place


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"empty \(0 bytes\)"),
        (b"<!DOCTYPE html><html></html>", "HTML or XML page of 28 bytes"),
        (b"\n  <html><body>Sign in</body></html>", "HTML or XML page"),
        (b"<?xml version='1.0'?><Error/>", "HTML or XML page"),
        (b"Not found", "not an image this worker takes .*: 9 bytes starting with b'Not found'"),
        (b"\x00" * 100, "not an image"),
        (b"\xff", "not an image"),
        (b"\xff\xd8\xff", "broken image header: 3 bytes that begin as a JPEG does"),
        (b"\0\x05\x16\x07\0\x02\0\0Mac OS X" + bytes(80), "not an image .* macOS writes beside a file"),
        (b"\0\0\0\x18ftypheic\0\0\0\0" + bytes(80), "not an image .* HEIC, AVIF or a video: .* brand heic"),
        (b"GIF89a\x01\x00\x01\x00\x00\x00\x00;", "not an image|broken image header"),
        (b"BM\x40\x00\x00\x00\x00\x00\x00\x00\x36\x00\x00\x00", "not an image|broken image header"),
        (b"\x89PNG\r\n\x1a\n", "not an image|broken image header"),
        (b"\x89PNG\r\n\x1a\n\x00\x00\x00\x0dIHDR\x00\x00", "not an image|broken image header"),
        (b"RIFF\x10\x00\x00\x00WEBPVP8 ", "not an image|broken image header"),
        (b"II*\x00\xff\xff\xff\xff", "not an image|broken image header"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_no_image_is_said_to_be_none(tmp_path: Path, data: bytes, message: str) -> None:
    """The message tells Antenna's users what came instead."""
    with pytest.raises(ImageUnreadable, match=message):
        _read(tmp_path, data)


def test_a_png_with_a_damaged_chunk_before_its_pixels_is_called_broken(tmp_path: Path) -> None:
    """Whoever looks for the fault must not be told that PNG is not taken."""
    data = encoded(picture(), "PNG")
    first_chunk_bytes = 33
    text = b"tEXtComment\0field 7"
    wrong_checksum = bytes(4)
    chunk = struct.pack(">I", len(text) - 4) + text + wrong_checksum
    damaged = data[:first_chunk_bytes] + chunk + data[first_chunk_bytes:]
    with pytest.raises(ImageUnreadable, match=rf"broken image header: {len(damaged)} bytes that begin as a PNG does"):
        _read(tmp_path, damaged)


def _tiff(order: str, subfile_type: int, *, with_sub_directory: bool = False, with_next: bool = False) -> bytes:
    """Return a TIFF of one grey strip whose only directory says what kind of picture it is of."""
    width_px = 20
    height_px = 10
    pixels_at = 8
    directory_at = pixels_at + width_px * height_px
    long_number = 4
    values = {
        254: subfile_type, 256: width_px, 257: height_px, 258: 8, 259: 1, 262: 1,
        273: pixels_at, 277: 1, 278: height_px, 279: width_px * height_px,
    }  # fmt: skip
    if with_sub_directory:
        values[330] = directory_at
    entries = [struct.pack(f"{order}HHII", tag, long_number, 1, value) for tag, value in values.items()]
    following = directory_at if with_next else 0
    marks = {"<": b"II*\0", ">": b"MM\0*"}
    start = marks[order] + struct.pack(f"{order}I", directory_at)
    directory = struct.pack(f"{order}H", len(entries)) + b"".join(entries) + struct.pack(f"{order}I", following)
    return start + bytes(range(width_px * height_px)) + directory


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("where", ["with_sub_directory", "with_next"])
def test_a_preview_is_not_taken_for_the_raw_photograph_behind_it(tmp_path: Path, order: str, where: str) -> None:
    """A raw photograph is a TIFF that begins with a thumbnail, in which small insects cannot be found."""
    with pytest.raises(
        ImageUnreadable, match=r"a raw photograph, .* whose first picture is a preview .* are not taken"
    ):
        _read(tmp_path, _tiff(order, 1, **{where: True}))


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_tiff_that_shows_its_picture_first_is_taken(tmp_path: Path, order: str) -> None:
    """Whatever lies behind it; and one that calls its only picture a preview has no other to show."""
    whole = _tiff(order, 0, with_sub_directory=True, with_next=True)
    page = _tiff(order, 2, with_next=True)
    only_one = _tiff(order, 1)
    for data in (whole, page, only_one):
        assert _read(tmp_path, data).shape == (10, 20, 3)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("image_format", FORMATS)
def test_a_header_cut_anywhere_is_read_or_called_unreadable(tmp_path: Path, image_format: str) -> None:
    """No other exception comes out of Pillow's plugins, however short the file."""
    data = encoded(picture(20, 10), image_format)
    for cut in range(1, min(len(data), 400), 3):
        try:
            assert _read(tmp_path, data[:cut]).width_px == 20
        except ImageUnreadable:
            continue


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("image_format", FORMATS)
def test_a_header_with_any_bytes_damaged_is_read_or_refused(tmp_path: Path, image_format: str) -> None:
    """What a disk or a proxy does to bytes ends as a header or as an ImageError, never as anything else."""
    data = encoded(picture(20, 10), image_format)
    for position in [*range(0, min(len(data), 150), 2), *range(max(0, len(data) - 150), len(data), 2)]:
        broken = data[:position] + b"\xff\x00" + data[position + 2 :]
        try:
            _read(tmp_path, broken)
        except (ImageUnreadable, ImageTooLarge):
            continue


def test_too_many_pixels_are_refused_with_both_numbers(tmp_path: Path) -> None:
    """The header alone is enough; Pillow's own bomb check stays out of it."""
    with pytest.raises(ImageTooLarge, match=r"65500x65500 is 4290250000 pixels; this worker takes 400000000 "):
        _read(tmp_path, bare_jpeg_header(65500, 65500))
    assert _read(tmp_path, bare_jpeg_header(20_000, 20_000)).pixel_bytes == 1_200_000_000


def test_exactly_the_limit_is_taken(tmp_path: Path) -> None:
    """The limit is the largest that is accepted."""
    assert _read(tmp_path, jpeg(20, 10), max_pixels=200).width_px == 20
    with pytest.raises(ImageTooLarge):
        _read(tmp_path, jpeg(20, 10), max_pixels=199)


@pytest.mark.parametrize(("scan_components", "buffered"), [(3, False), (1, True)])
def test_a_scan_per_component_costs_what_progressive_does(
    tmp_path: Path, scan_components: int, *, buffered: bool
) -> None:
    """Baseline by name, and yet the decoder keeps every coefficient until the last scan."""
    read = _read(tmp_path, bare_jpeg_header(4000, 3000, scan_components=scan_components))
    assert read.buffered == buffered


def test_scratch_grows_from_baseline_to_webp() -> None:
    """The order of the measured costs, per pixel."""
    baseline = header(100, 100)
    kinds = [
        baseline,
        header(100, 100, buffered=True),
        ImageHeader("JPEG", 100, 100, "RGB", buffered=True, chroma_halved=False, compressed_bytes=1),
        header(100, 100, image_format="PNG"),
        header(100, 100, image_format="TIFF"),
        header(100, 100, mode="CMYK", buffered=True),
        header(100, 100, image_format="WEBP"),
    ]
    costs = [kind.scratch_bytes for kind in kinds]
    assert costs == sorted(set(costs))


def test_a_file_that_is_gone_is_a_fault_of_this_machine(tmp_path: Path) -> None:
    """Nothing that the system says about a file becomes an error of the image."""
    with pytest.raises(FileNotFoundError):
        read_header(tmp_path / "gone.img", MAX_PIXELS)
