"""Damaged files of every format: pixels of the file alone, or an error; never what the buffer held before."""

from __future__ import annotations

import random
import struct
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from adc_worker.errors import ImageError, ImageUnreadable
from adc_worker.ingest.decode import DecodeReport, decode
from adc_worker.ingest.header import read_header
from tests.support.damage import (
    DAMAGES,
    RARE_SAMPLING,
    SAMPLE_FILES,
    SIZE_PX,
    png_of_rows,
    tiled_tiff,
)
from tests.support.images import by_pillow, encoded, header, jpeg, picture, written
from tests.support.jpeg_writer import sampled_jpeg, segment

if TYPE_CHECKING:
    import numpy.typing as npt

MAX_PIXELS = 1_000_000
FILLS = (0x00, 0xFF, 0x5A)
TRIES = 4  # of each kind of damage on each kind of file
UNKNOWN = 128
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def _decoded(path: Path, fill: int = 0x5A) -> tuple[npt.NDArray[np.uint8], DecodeReport]:
    image_header = read_header(path, MAX_PIXELS)
    out = np.full(image_header.shape, fill, np.uint8)
    report = decode(path, image_header, out)
    return out, report


def _outcome(path: Path, fill: int) -> tuple[bytes, bool, bool] | str:
    try:
        out, report = _decoded(path, fill)
    except ImageError as error:
        return f"{type(error).__name__}: {error}"
    return out.tobytes(), report.truncated, report.damaged


def _assert_of_the_file_alone(path: Path) -> None:
    """Decode into memory that held something else each time, and demand the same answer."""
    first, *others = [_outcome(path, fill) for fill in FILLS]
    for other in others:
        assert other == first


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", SAMPLE_FILES)
def test_damaged_pixels_are_of_the_file_alone_or_an_error(tmp_path: Path, kind: str, damage: str) -> None:
    """Every kind of file with every kind of damage, into memory with different contents."""
    data = SAMPLE_FILES[kind]
    dice = random.Random(f"{kind} {damage}")  # noqa: S311 (no secret)
    for number in range(TRIES):
        _assert_of_the_file_alone(written(tmp_path / f"{number}.img", DAMAGES[damage](data, dice)))


@pytest.mark.parametrize("kind", SAMPLE_FILES)
def test_a_file_cut_anywhere_shows_itself_alone_or_is_an_error(tmp_path: Path, kind: str) -> None:
    """From the first byte to the last but one."""
    data = SAMPLE_FILES[kind]
    for number, end in enumerate(range(1, len(data), max(1, len(data) // 40))):
        _assert_of_the_file_alone(written(tmp_path / f"{number}.img", data[:end]))


edits = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 300), st.binary(max_size=40)), min_size=1, max_size=4
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(SAMPLE_FILES)), edits)
def test_a_file_with_any_bytes_replaced_shows_itself_alone_or_is_an_error(
    kind: str, changes: list[tuple[float, int, bytes]]
) -> None:
    """Bytes that hypothesis makes up, in place of some or none of the file's own."""
    data = SAMPLE_FILES[kind]
    for place, removed, inserted in changes:
        at = int(place * len(data))
        data = data[:at] + inserted + data[at + removed :]
    with tempfile.TemporaryDirectory() as folder:
        _assert_of_the_file_alone(written(Path(folder) / "1.img", data))


@pytest.mark.parametrize("kind", SAMPLE_FILES)
def test_what_is_not_damaged_is_not_called_so(tmp_path: Path, kind: str) -> None:
    """And its pixels are those that Pillow shows."""
    out, report = _decoded(written(tmp_path / "1.img", SAMPLE_FILES[kind]))
    assert (report.truncated, report.damaged, report.complaint) == (False, False, "")
    if "16 bits" not in kind:
        np.testing.assert_array_equal(out, by_pillow(SAMPLE_FILES[kind]))


# JPEG


def test_a_progressive_photograph_that_the_decoder_gives_up_on_is_an_error(tmp_path: Path) -> None:
    """Another file's start in its middle: libjpeg warns, fails for good, and has not written a row."""
    data = jpeg(200, 160, progressive=True)
    place = len(data) * 2 // 3
    path = written(tmp_path / "1.img", data[:place] + data[:600] + data[place:])
    with pytest.raises(ImageUnreadable, match=r"cannot be decoded as JPEG: .*: 160 of 160 rows cannot be decoded"):
        _decoded(path)


def test_a_lost_block_is_counted_as_damage_with_the_decoders_words(tmp_path: Path) -> None:
    """The end is where it should be; in between the decoder found what it could not read."""
    data = jpeg(400, 300, quality=95)
    place = len(data) // 3
    out, report = _decoded(written(tmp_path / "1.img", data[:place] + data[place + 4096 :]))
    assert (report.truncated, report.damaged) == (False, True)
    assert "Corrupt JPEG data" in report.complaint
    np.testing.assert_array_equal(out[:60], by_pillow(data)[:60])


def test_a_file_that_lost_a_block_and_its_end_is_both_damaged_and_truncated(tmp_path: Path) -> None:
    """The decoder reports the first of them alone."""
    data = encoded(picture(400, 300), "JPEG", quality=95, restart_marker_rows=1)
    place = len(data) // 3
    _out, report = _decoded(written(tmp_path / "1.img", data[:place] + data[place + 4096 : -3000]))
    assert (report.truncated, report.damaged) == (True, True)


def test_what_did_not_come_of_a_jpeg_is_grey(tmp_path: Path) -> None:
    """Libjpeg's value of unknown coefficients, in every row that is missing."""
    data = jpeg(400, 304, quality=95)
    out, report = _decoded(written(tmp_path / "1.img", data[: len(data) // 2]))
    assert (report.truncated, report.damaged) == (True, False)
    assert (out[-32:] == UNKNOWN).all()
    assert not (out[:96] == UNKNOWN).all(axis=(1, 2)).any()


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_a_progressive_file_that_ends_between_scans_shows_those_before(tmp_path: Path, mode: str) -> None:
    """Cut in the header of a later scan: the scans that came are a coarser picture."""
    data = encoded(picture(200, 160, mode=mode), "JPEG", progressive=True)
    whole, _report = _decoded(written(tmp_path / "whole.img", data))
    last_scan = data.rindex(b"\xff\xda")
    out, report = _decoded(written(tmp_path / "cut.img", data[:last_scan]))
    assert (report.truncated, report.damaged) == (True, False)
    assert np.abs(out.astype(int) - whole).mean() < 10


def test_a_progressive_file_that_ends_inside_a_table_shows_the_scans_before(tmp_path: Path) -> None:
    """Libjpeg gives up on a table that ends early; the scans before it are whole."""
    data = jpeg(200, 160, progressive=True)
    table = data.rindex(b"\xff\xc4")
    before, _report = _decoded(written(tmp_path / "before.img", data[:table]))
    out, report = _decoded(written(tmp_path / "inside.img", data[: table + 9]))
    assert (report.truncated, report.damaged) == (True, False)
    np.testing.assert_array_equal(out, before)


def test_a_stray_marker_inside_coded_data_is_damage_and_no_end(tmp_path: Path) -> None:
    """The length that seems to follow it leads behind the file; the decoder finds the next restart marker."""
    data = encoded(picture(400, 300), "JPEG", quality=95, restart_marker_rows=1)
    place = len(data) // 2
    broken = data[:place] + b"\xff\x42\xff\xff" + data[place + 4 :]
    out, report = _decoded(written(tmp_path / "1.img", broken))
    assert (report.truncated, report.damaged) == (False, True)
    np.testing.assert_array_equal(out[-64:], by_pillow(data)[-64:])


@pytest.mark.parametrize(
    ("original", "odd"),
    [
        (b"JFIF\0\x01", b"JFIF\0\x09"),  # a version that libjpeg does not know
        (b"\xff\xdb", b"\0\0\0\xff\xdb"),  # stray bytes between two segments
    ],
)
def test_a_complaint_before_the_first_scan_is_no_error(tmp_path: Path, original: bytes, odd: bytes) -> None:
    """The fast decoder refuses such files; Pillow decodes them, and so did the worker before this one."""
    data = jpeg()
    path = written(tmp_path / "1.img", data.replace(original, odd, 1))
    out, report = _decoded(path)
    np.testing.assert_array_equal(out, by_pillow(data))
    assert not report.truncated
    assert not read_header(path, MAX_PIXELS).jpeg_in_place


@pytest.mark.parametrize("progressive", [False, True])
def test_what_lies_behind_the_picture_is_ignored(tmp_path: Path, *, progressive: bool) -> None:
    """A motion photograph's film, and what a recovered card holds behind it: scans in there are not the picture's."""
    data = jpeg(progressive=progressive)
    behind = random.Random(1).randbytes(50_000) + b"\xff\xda\0\x0c" * 500 + data  # noqa: S311 (no secret)
    out, report = _decoded(written(tmp_path / "1.img", data + behind))
    np.testing.assert_array_equal(out, by_pillow(data))
    assert (report.truncated, report.damaged) == (False, False)


def test_previews_in_metadata_are_no_scans_of_the_picture(tmp_path: Path) -> None:
    """Twelve progressive previews of ten scans each."""
    preview = jpeg(progressive=True)
    data = jpeg(200, 160, progressive=True)
    with_previews = data[:2] + segment(0xE5, b"PREVIEW\0" + preview) * 12 + data[2:]
    out, report = _decoded(written(tmp_path / "1.img", with_previews))
    np.testing.assert_array_equal(out, by_pillow(data))
    assert not report.truncated


ONE_TO_FOUR = [(across, down) for across in (1, 2, 3, 4) for down in (1, 2, 3, 4)]


@pytest.mark.parametrize("scan_per_component", [False, True])
def test_any_sampling_that_pillow_decodes_is_decoded(tmp_path: Path, *, scan_per_component: bool) -> None:
    """With or without a name in TurboJPEG: 4:1:0, 3x1, chroma finer than luma, chroma at two rates."""
    decoded = 0
    for number, first in enumerate(ONE_TO_FOUR):
        for second in ((1, 1), (2, 1), (1, 2), (2, 2)):
            data = sampled_jpeg(50, 37, (first, second, (1, 1)), scan_per_component=scan_per_component)
            path = written(tmp_path / f"{number}-{second}.img", data)
            try:
                expected = by_pillow(data)
            except OSError:  # rates that do not divide each other
                with pytest.raises(ImageUnreadable):
                    _decoded(path)
                continue
            out, report = _decoded(path)
            np.testing.assert_array_equal(out, expected)
            assert (report.truncated, report.damaged) == (False, False)
            decoded += 1
    assert decoded > 20


def test_rare_sampling_costs_what_pillow_takes(tmp_path: Path) -> None:
    """The header reckons with the decoder that will be used."""
    common = sampled_jpeg(400, 300, ((2, 2), (1, 1), (1, 1)))
    rare = sampled_jpeg(400, 300, RARE_SAMPLING)
    rare_in_scans = sampled_jpeg(400, 300, RARE_SAMPLING, scan_per_component=True)
    files = (common, rare, rare_in_scans)
    headers = [read_header(written(tmp_path / f"{number}.img", data), MAX_PIXELS) for number, data in enumerate(files)]
    assert [read.jpeg_in_place for read in headers] == [True, False, False]
    assert headers[0].scratch_bytes < headers[1].scratch_bytes < headers[2].scratch_bytes


# Files that end before their first pixel


@pytest.mark.parametrize(
    ("kind", "pixels_begin"),
    [
        ("JPEG 4:2:0", b"\0\x3f\0"),
        ("JPEG CMYK", b"\0\x3f\0"),
        ("JPEG 3x1", b"\0\x3f\0"),
        ("JPEG progressive", b"\xff\xda\0\x0c\x03\x01\0\x02\x10\x03\x10\0\0\x01"),
        ("PNG RGB", b"IDAT"),
        ("TIFF strips", b""),
        ("BMP RGB", b""),
        ("GIF", b","),
    ],
)
def test_a_file_that_ends_before_its_first_pixel_is_an_error(tmp_path: Path, kind: str, pixels_begin: bytes) -> None:
    """A sheet of nothing but filling would be a result of no photograph."""
    data = SAMPLE_FILES[kind]
    if pixels_begin:
        end = data.index(pixels_begin) + len(pixels_begin)
        data = data[: end + 9] if kind == "GIF" else data[:end]
    elif kind == "BMP RGB":
        data = data[: struct.unpack_from("<I", data, 10)[0]]
    else:  # the tags stand in front in Pillow's TIFFs
        with Image.open(written(tmp_path / "whole.img", data)) as image:
            first = min(tile.offset for tile in image.tile)
        data = data[:first]
    with pytest.raises(ImageUnreadable):
        _decoded(written(tmp_path / "1.img", data))


# Pillow's rows


def test_a_png_whose_pixels_end_early_is_truncated(tmp_path: Path) -> None:
    """Pillow takes the end of its stream for the end of the picture, and says nothing."""
    row = b"\0" + bytes([200, 100, 50]) * 30
    out, report = _decoded(written(tmp_path / "1.img", png_of_rows(30, 20, row * 12)))
    assert report.truncated
    np.testing.assert_array_equal(out[:12], np.full((12, 30, 3), (200, 100, 50), np.uint8))
    assert not out[12:].any()


def test_a_tiff_with_too_few_tiles_is_truncated(tmp_path: Path) -> None:
    """The lower tiles are not in its list: Pillow shows nothing in their place, and says nothing."""
    data = tiled_tiff()
    count = struct.pack("<HHI", 324, 4, 6)
    assert count in data
    fewer = data.replace(count, struct.pack("<HHI", 324, 4, 3)).replace(
        struct.pack("<HHI", 325, 4, 6), struct.pack("<HHI", 325, 4, 3)
    )
    out, report = _decoded(written(tmp_path / "1.img", fewer))
    assert report.truncated
    np.testing.assert_array_equal(out[:32], by_pillow(data)[:32])
    assert not out[32:].any()


@pytest.mark.parametrize(
    ("image_format", "mode", "options"),
    [
        ("PNG", "RGB", {}),
        ("PNG", "1", {}),
        ("PNG", "I;16", {}),
        ("PNG", "RGBA", {}),
        ("TIFF", "RGB", {}),
        ("TIFF", "L", {"compression": "tiff_lzw"}),
        ("GIF", "P", {}),
        ("BMP", "RGB", {}),
        ("WEBP", "RGB", {}),
    ],
)
def test_a_black_picture_is_whole(tmp_path: Path, image_format: str, mode: str, options: dict[str, str]) -> None:
    """Its rows are zeros because the file says so."""
    data = encoded(Image.new(mode, SIZE_PX), image_format, **options)
    out, report = _decoded(written(tmp_path / "1.img", data))
    assert not out.any()
    assert not report.truncated


def test_a_gif_frame_smaller_than_the_gif_is_whole(tmp_path: Path) -> None:
    """Around the frame lies background, which is no missing row."""
    data = bytearray(encoded(picture(40, 30, mode="P"), "GIF"))
    data[6:10] = struct.pack("<HH", 60, 50)  # the size of the screen that frames are drawn on
    out, report = _decoded(written(tmp_path / "1.img", bytes(data)))
    np.testing.assert_array_equal(out, by_pillow(bytes(data)))
    assert out.shape == (50, 60, 3)
    assert not report.truncated


def test_a_file_that_is_not_what_its_header_said_writes_nothing_that_counts(tmp_path: Path) -> None:
    """Also where it has as many bytes of pixels, and is damaged besides."""
    data = jpeg(61, 97)
    place = len(data) // 2
    path = written(tmp_path / "1.img", data[:place] + bytes(100) + data[place + 100 :])
    out = np.zeros((61, 97, 3), np.uint8)
    with pytest.raises(ImageUnreadable, match=r"decoded to \(97, 61, 3\), its header said \(61, 97, 3\)"):
        decode(path, header(97, 61), out)
