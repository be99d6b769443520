"""Decoding: the pixels are Pillow's, nothing is written outside the region, and damage is told from an early end."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from adc_worker.errors import ImageTooLarge, ImageUnreadable
from adc_worker.host.memory import PeakResidentMemory
from adc_worker.ingest.arena import Arena, Region
from adc_worker.ingest.decode import DecodeReport, ScratchLedger, ThreadEngine, decode
from adc_worker.ingest.header import ImageHeader, read_header, unreadable
from tests.support.damage import RARE_SAMPLING
from tests.support.images import SIZE_PX, by_pillow, encoded, header, jpeg, picture, run_length_bmp, written
from tests.support.jpeg_writer import sampled_jpeg
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MAX_PIXELS = 10_000_000
GUARD_BYTES = 4096
GUARD = 0xA5
SLACK_BYTES = 3 << 20  # a band, and what the test itself allocates


def _decoded(path: Path, image_header: ImageHeader | None = None) -> tuple[npt.NDArray[np.uint8], DecodeReport]:
    """Decode between guard bytes, into memory that held another image, and check the guards."""
    image_header = image_header or read_header(path, MAX_PIXELS)
    memory = np.full(image_header.pixel_bytes + 2 * GUARD_BYTES, GUARD, dtype=np.uint8)
    out = memory[GUARD_BYTES:-GUARD_BYTES].reshape(image_header.shape)
    try:
        report = decode(path, image_header, out)
    finally:
        assert (memory[:GUARD_BYTES] == GUARD).all()
        assert (memory[-GUARD_BYTES:] == GUARD).all()
    return out, report


@pytest.mark.parametrize(
    ("image_format", "mode", "options"),
    [
        ("JPEG", "RGB", {"subsampling": 0, "quality": 95}),
        ("JPEG", "RGB", {"subsampling": 1}),
        ("JPEG", "RGB", {"subsampling": 2}),
        ("JPEG", "RGB", {"subsampling": 2, "progressive": True}),
        ("JPEG", "RGB", {"subsampling": 0, "progressive": True}),
        ("JPEG", "RGB", {"keep_rgb": True}),
        ("JPEG", "RGB", {"restart_marker_rows": 1}),
        ("JPEG", "L", {}),
        ("JPEG", "CMYK", {}),
        ("JPEG", "CMYK", {"progressive": True}),
        ("PNG", "RGB", {}),
        ("PNG", "RGBA", {}),
        ("PNG", "P", {}),
        ("PNG", "L", {}),
        ("PNG", "LA", {}),
        ("PNG", "1", {}),
        ("TIFF", "RGB", {}),
        ("TIFF", "RGB", {"compression": "tiff_lzw"}),
        ("TIFF", "RGB", {"compression": "jpeg"}),
        ("TIFF", "L", {}),
        ("GIF", "P", {"interlace": 0}),
        ("GIF", "P", {"interlace": 1, "transparency": 3}),
        ("GIF", "L", {}),
        ("BMP", "RGB", {}),
        ("BMP", "P", {}),
        ("BMP", "1", {}),
        ("BMP", "RGBA", {}),
        ("WEBP", "RGB", {}),
        ("WEBP", "RGBA", {"lossless": True}),
    ],
)
def test_pixels_are_those_of_pillow(tmp_path: Path, image_format: str, mode: str, options: dict[str, Any]) -> None:
    """Bit for bit, for every kind and for sizes that fill no whole block or band."""
    for size_px in [(97, 61), (1, 1), (16, 16), (1, 200), (200, 1), (700, 431)]:
        data = encoded(picture(*size_px, mode=mode), image_format, **options)
        out, report = _decoded(written(tmp_path / "1.img", data))
        np.testing.assert_array_equal(out, by_pillow(data), err_msg=str(size_px))
        assert not report.truncated
        assert report.decode_s > 0


def test_a_phone_photograph_with_a_second_frame_shows_its_first(tmp_path: Path) -> None:
    """What follows the first picture of an MPO file is neither shown nor called damage."""
    data = encoded(picture(), "MPO", save_all=True, append_images=[picture(seed=1)])
    out, report = _decoded(written(tmp_path / "1.img", data))
    np.testing.assert_array_equal(out, by_pillow(data))
    assert not report.truncated


def test_a_bmp_of_run_lengths_shows_what_pillow_shows(tmp_path: Path) -> None:
    """Pillow reads these and does not write them."""
    data = run_length_bmp(picture(300, 200, mode="L"))
    out, report = _decoded(written(tmp_path / "1.img", data))
    np.testing.assert_array_equal(out, np.asarray(picture(300, 200, mode="L").convert("RGB")))
    np.testing.assert_array_equal(out, by_pillow(data))
    assert not report.truncated


def test_an_animated_gif_shows_its_first_frame(tmp_path: Path) -> None:
    """What follows the first picture is neither shown nor called damage."""
    frames = [picture(mode="P", seed=seed) for seed in range(3)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=[100, 200, 300])
    out, report = _decoded(written(tmp_path / "1.img", data))
    np.testing.assert_array_equal(out, by_pillow(data))
    assert not report.truncated


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "CMYK", "1"])
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_a_tiff_is_turned_as_pillow_turns_it(
    tmp_path: Path, orientation: int, mode: str, compression: str | None
) -> None:
    """By its orientation tag: boxes refer to the photograph as today's worker and Antenna's crops see it."""
    data = encoded(picture(mode=mode), "TIFF", compression=compression, tiffinfo={274: orientation})
    path = written(tmp_path / "1.img", data)
    expected = by_pillow(data)
    read = read_header(path, MAX_PIXELS)
    assert (read.height_px, read.width_px, 3) == expected.shape
    out, report = _decoded(path)
    np.testing.assert_array_equal(out, expected)
    assert not report.truncated


def test_a_tiff_of_sixteen_bits_is_turned_too(tmp_path: Path) -> None:
    """And keeps its upper byte, which Pillow would not."""
    image = picture(mode="I;16")
    path = written(tmp_path / "1.img", encoded(image, "TIFF", tiffinfo={274: 6}))
    out, _report = _decoded(path)
    upper_bytes = (np.asarray(image) >> 8).astype(np.uint8)
    np.testing.assert_array_equal(out, np.repeat(np.rot90(upper_bytes, -1)[..., None], 3, axis=2))


@pytest.mark.parametrize("big_endian", [False, True])
def test_a_tiff_that_tells_its_orientation_in_xmp_alone_is_turned(tmp_path: Path, *, big_endian: bool) -> None:
    """Pillow looks there when the tag is missing."""
    packet = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    data = encoded(picture(), "TIFF", tiffinfo={700: packet}, big_tiff=big_endian)
    out, _report = _decoded(written(tmp_path / "1.img", data))
    expected = by_pillow(data)
    assert expected.shape[:2] == (SIZE_PX[0], SIZE_PX[1])
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("odd", [0, 9, 255])
def test_a_tiff_of_no_known_orientation_stays_as_it_is_stored(tmp_path: Path, odd: int) -> None:
    """As with Pillow."""
    data = encoded(picture(), "TIFF", tiffinfo={274: odd})
    out, _report = _decoded(written(tmp_path / "1.img", data))
    np.testing.assert_array_equal(out, by_pillow(data))


def test_a_turned_tiff_that_ends_early_keeps_what_came_where_it_belongs(tmp_path: Path) -> None:
    """The stored rows are columns of the turned picture."""
    data = encoded(picture(), "TIFF", tiffinfo={274: 6}, strip_size=3000)
    out, report = _decoded(written(tmp_path / "1.img", data[: len(data) * 6 // 10]))
    assert report.truncated
    expected = by_pillow(data)
    np.testing.assert_array_equal(out[:, -30:], expected[:, -30:])
    assert not out[:, 0].any()


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_upper_byte(tmp_path: Path, image_format: str) -> None:
    """Pillow would clip everything above 255 to white."""
    image = picture(mode="I;16")
    out, _report = _decoded(written(tmp_path / "1.img", encoded(image, image_format)))
    np.testing.assert_array_equal(out, np.repeat((np.asarray(image) >> 8)[..., None], 3, axis=2))


_BETWEEN = np.linspace(0.0, 1.0, 400 * 300, dtype=np.float32).reshape(300, 400)


@pytest.mark.parametrize(
    ("numbers", "told"),
    [
        (_BETWEEN, "from 0 to 1"),
        (_BETWEEN * 4095, "from 0 to 4095"),
        (_BETWEEN * 200 - 100, "from -100 to 100"),
        (np.where(_BETWEEN > 0.5, np.float32("nan"), _BETWEEN), "nan"),
        ((_BETWEEN * 65535).astype(np.int32), "from 0 to 65535"),
    ],
)
def test_numbers_on_a_scale_that_no_header_tells_are_an_error(
    tmp_path: Path, numbers: npt.NDArray[Any], told: str
) -> None:
    """Clipped at 255 they would be a black sheet or a white one, on which nothing is found."""
    file = written(tmp_path / "1.img", encoded(Image.fromarray(numbers), "TIFF"))
    with pytest.raises(ImageUnreadable, match=f"its pixels are numbers .*{told}"):
        _decoded(file)


@pytest.mark.parametrize("kind", [np.float32, np.int32])
@pytest.mark.parametrize("darkest", [0, 100])
def test_numbers_that_bytes_hold_are_decoded(tmp_path: Path, kind: type, darkest: int) -> None:
    """As they are, also where a part of the picture is black."""
    numbers = (_BETWEEN * 155).astype(np.uint8) + np.uint8(darkest)
    data = encoded(Image.fromarray(numbers.astype(kind)), "TIFF")
    out, _report = _decoded(written(tmp_path / "1.img", data))
    np.testing.assert_array_equal(out, np.repeat(numbers[:, :, np.newaxis], 3, axis=2))


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_not_applied_but_to_tiff(tmp_path: Path, image_format: str) -> None:
    """The rows are those of the file, as with Pillow."""
    exif = Image.Exif()
    exif[0x0112] = 6
    plain = encoded(picture(30, 20), image_format)
    rotated = encoded(picture(30, 20), image_format, exif=exif.tobytes())
    out, _report = _decoded(written(tmp_path / "1.img", rotated))
    np.testing.assert_array_equal(out, by_pillow(plain))
    np.testing.assert_array_equal(out, by_pillow(rotated))


@pytest.mark.parametrize(
    ("image_format", "mode", "options"),
    [
        ("JPEG", "RGB", {}),
        ("JPEG", "L", {}),
        ("JPEG", "RGB", {"progressive": True}),
        ("JPEG", "CMYK", {}),
        ("PNG", "RGB", {}),
        ("PNG", "P", {}),
        ("PNG", "I;16", {}),
        ("TIFF", "RGB", {}),
    ],
)
def test_a_truncated_file_is_decoded_as_far_as_it_goes_and_counted(
    tmp_path: Path, image_format: str, mode: str, options: dict[str, Any]
) -> None:
    """The upper rows are right, what is missing shows nothing of the image that was there before."""
    data = encoded(picture(200, 160, mode=mode), image_format, **options)
    whole, _report = _decoded(written(tmp_path / "whole.img", data))
    out, report = _decoded(written(tmp_path / "cut.img", data[: len(data) * 7 // 10]))
    assert report.truncated
    if not options:  # a progressive file brings all rows, coarsely
        np.testing.assert_array_equal(out[:60], whole[:60])
    assert not (out[-1] == GUARD).all()


def test_only_the_end_marker_missing_loses_nothing(tmp_path: Path) -> None:
    """All pixels are there, and the file is still counted as truncated."""
    data = jpeg(200, 160)
    out, report = _decoded(written(tmp_path / "1.img", data[:-2]))
    np.testing.assert_array_equal(out, by_pillow(data))
    assert report.truncated


def test_one_truncated_file_does_not_change_how_others_are_decoded(tmp_path: Path) -> None:
    """Pillow's switch for truncated files is global: it stays off."""
    _decoded(written(tmp_path / "1.img", encoded(picture(), "PNG")[:-200]))
    with Image.open(tmp_path / "1.img") as image, pytest.raises(OSError, match="truncated"):
        image.load()


@pytest.mark.parametrize("damage", [bytes(200), b"\xff\xd9\x00\xff\xd8" * 40])
def test_a_damaged_middle_is_decoded_around_and_is_no_early_end(tmp_path: Path, damage: bytes) -> None:
    """A JPEG recovers behind the damage; its end is where it should be."""
    data = jpeg(400, 300, quality=95)
    middle = len(data) // 2
    path = written(tmp_path / "1.img", data[:middle] + damage + data[middle + len(damage) :])
    out, report = _decoded(path)
    np.testing.assert_array_equal(out[:100], by_pillow(data)[:100])
    assert not report.truncated


def test_a_damaged_png_is_unreadable(tmp_path: Path) -> None:
    """Its rows behind the damage would be noise."""
    data = bytearray(encoded(picture(400, 300), "PNG"))
    data[len(data) // 2 : len(data) // 2 + 50] = bytes(50)
    with pytest.raises(ImageUnreadable, match="cannot be decoded as PNG"):
        _decoded(written(tmp_path / "1.img", bytes(data)))


def test_a_header_without_an_image_is_unreadable(tmp_path: Path) -> None:
    """The decoder's own words are in the message."""
    path = written(tmp_path / "1.img", jpeg()[:200] + bytes(100))
    with pytest.raises(ImageUnreadable, match="cannot be decoded as JPEG: "):
        _decoded(path, header(97, 61))


@pytest.mark.parametrize("image_format", ["JPEG", "PNG"])
@pytest.mark.parametrize("size_px", [(61, 97), (97, 62), (97, 60), (96, 61), (5, 5), (200, 200)])
def test_an_image_that_is_not_what_its_header_said_is_unreadable(
    tmp_path: Path, image_format: str, size_px: tuple[int, int]
) -> None:
    """Smaller, larger or turned: it is refused, and nothing is written beyond its region."""
    path = written(tmp_path / "1.img", encoded(picture(), image_format))
    with pytest.raises(ImageUnreadable):
        _decoded(path, header(*size_px, image_format=image_format))


def test_a_staged_file_that_is_gone_is_a_fault_of_this_machine(tmp_path: Path) -> None:
    """No image is blamed for what happens to this disk."""
    for image_format in ("JPEG", "PNG"):
        with pytest.raises(FileNotFoundError):
            _decoded(tmp_path / "gone.img", header(10, 10, image_format=image_format))


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_any_damage_ends_as_pixels_or_as_an_unreadable_image(tmp_path: Path, image_format: str) -> None:
    """A hundred files with random damage: no other exception, no byte outside the region."""
    data = encoded(picture(40, 30), image_format)
    random = np.random.default_rng(1)
    for _round in range(100):
        broken = np.frombuffer(data, dtype=np.uint8).copy()
        where = random.integers(0, len(data), size=4)
        broken[where] = random.integers(0, 256, size=4)
        path = written(tmp_path / "1.img", broken.tobytes()[: random.integers(len(data) // 2, len(data) + 1)])
        try:
            _decoded(path, header(40, 30, image_format=image_format))
        except ImageUnreadable:
            continue


@pytest.mark.parametrize(
    ("image_format", "mode", "options"),
    [
        ("JPEG", "RGB", {"subsampling": 0}),
        ("JPEG", "RGB", {"subsampling": 2, "progressive": True}),
        ("JPEG", "RGB", {"subsampling": 0, "progressive": True}),
        ("JPEG", "CMYK", {}),
        ("JPEG", "CMYK", {"progressive": True}),
        ("PNG", "RGB", {"compress_level": 1}),
        ("PNG", "RGBA", {"compress_level": 1}),
        ("PNG", "I;16", {"compress_level": 1}),
        ("TIFF", "RGB", {}),
        ("TIFF", "RGB", {"compression": "tiff_lzw"}),
        ("TIFF", "RGB", {"compression": "tiff_lzw", "tiffinfo": {274: 6}}),
        ("GIF", "P", {}),
        ("BMP", "RGB", {}),
        ("WEBP", "RGB", {"method": 0}),
    ],
)
def test_a_decode_takes_no_more_memory_than_its_header_says(
    tmp_path: Path, image_format: str, mode: str, options: dict[str, Any]
) -> None:
    """Beside its output, and the compressed bytes that are charged elsewhere."""
    data = encoded(picture(2000, 1000, mode=mode), image_format, **options)
    _assert_takes_what_its_header_says(written(tmp_path / "1.img", data))


@pytest.mark.parametrize(
    "make",
    [
        partial(run_length_bmp, picture(2000, 1000, mode="L")),
        partial(sampled_jpeg, 2000, 1000, RARE_SAMPLING),
        partial(sampled_jpeg, 2000, 1000, RARE_SAMPLING, progressive=True),
        partial(sampled_jpeg, 2000, 1000, RARE_SAMPLING, scan_per_component=True),
        partial(sampled_jpeg, 2000, 1000, ((2, 2), (2, 2), (2, 2)), scan_per_component=True),
        partial(encoded, Image.new("RGB", (2000, 1000)), "PNG"),  # all zeros: decoded twice
    ],
    ids=["run lengths", "3x1", "3x1 progressive", "3x1 in scans", "4:4:4 by other factors in scans", "black"],
)
def test_a_rare_kind_takes_no_more_memory_than_its_header_says(tmp_path: Path, make: Callable[[], bytes]) -> None:
    """Kinds that Pillow does not write, and those that take a second decode."""
    _assert_takes_what_its_header_says(written(tmp_path / "1.img", make()))


@pytest.mark.parametrize("progressive", [False, True])
def test_a_damaged_jpeg_takes_no_more_memory_than_a_whole_one(tmp_path: Path, *, progressive: bool) -> None:
    """It is decoded twice, one after the other."""
    data = encoded(picture(2000, 1000), "JPEG", progressive=progressive, restart_marker_rows=1)
    middle = len(data) // 2
    path = written(tmp_path / "1.img", data[:middle] + data[middle + 5000 :])
    report = _assert_takes_what_its_header_says(path)
    assert report.damaged


def _assert_takes_what_its_header_says(path: Path) -> DecodeReport:
    image_header = read_header(path, MAX_PIXELS)
    out = np.ones(image_header.shape, dtype=np.uint8)
    gc.collect()
    memory = PeakResidentMemory()
    report = decode(path, image_header, out)
    assert memory.growth_bytes() <= image_header.scratch_bytes + image_header.compressed_bytes + SLACK_BYTES
    return report


def test_the_engine_decodes_into_its_region_alone(tmp_path: Path) -> None:
    """Two images side by side in one arena, from several threads."""
    first, second = jpeg(64, 48), jpeg(64, 48, seed=1)
    paths = [written(tmp_path / "1.img", first), written(tmp_path / "2.img", second)]
    headers = [read_header(path, MAX_PIXELS) for path in paths]
    arena = Arena(8 * headers[0].pixel_bytes)
    region = arena.allocate(4 * headers[0].pixel_bytes)
    assert region is not None
    image_bytes = headers[0].pixel_bytes
    engine = ThreadEngine(arena, workers=2, scratch_bytes=1)
    futures = [
        engine.submit(paths[row], headers[row], Region(region.offset + (row + 1) * image_bytes, image_bytes))
        for row in range(2)
    ]
    assert not any(future.result().truncated for future in futures)
    engine.close()
    rows = arena.view(region, (4, *headers[0].shape))
    np.testing.assert_array_equal(rows[1], by_pillow(first))
    np.testing.assert_array_equal(rows[2], by_pillow(second))
    assert not rows[0].any()
    assert not rows[3].any()
    del rows
    arena.free(region)
    arena.close()


class _ShortOfMemory(ThreadEngine):
    """Has no memory for its first decodes."""

    failures = 0

    def _decode(self, *_: object) -> DecodeReport:
        self.failures -= 1
        if self.failures >= 0:
            with unreadable("cannot be decoded"):
                raise MemoryError
        return DecodeReport(1.0, truncated=False)


@pytest.mark.parametrize(("failures", "too_large"), [(1, False), (2, True)])
def test_what_finds_no_memory_is_tried_again_alone(failures: int, *, too_large: bool) -> None:
    """It may have been others' decodes that had it; alone it is the image that is too large for this host."""
    with closing(Arena(1000)) as arena, closing(_ShortOfMemory(arena, workers=1, scratch_bytes=10)) as engine:
        engine.failures = failures
        error = engine.submit(Path(), header(1, 1), Region(0, 3)).exception()
    assert isinstance(error, ImageTooLarge) == too_large
    assert too_large or error is None


@pytest.mark.parametrize("error", [MemoryError(), ValueError("Insufficient memory (case 4)"), OSError("out of memory")])
def test_want_of_memory_is_told_from_damage(error: Exception) -> None:
    """The libraries that decode have words for it, and no exception of its own."""
    with pytest.raises(ImageTooLarge, match="cannot be decoded: it takes more memory"), unreadable("cannot be decoded"):
        raise error


class _Charges:
    """Threads that hold a charge until they are told to let go."""

    def __init__(self, ledger: ScratchLedger) -> None:
        self._ledger = ledger
        self._lock = threading.Lock()
        self._executor = ThreadPoolExecutor(16)
        self.held: dict[int, int] = {}
        self.most_bytes = 0
        self._let_go = [threading.Event() for _ in range(16)]

    def start(self, number: int, size_bytes: int, *, fail: bool = False) -> None:
        self._executor.submit(self._hold, number, size_bytes, fail=fail)

    def let_go(self, number: int) -> None:
        self._let_go[number].set()

    def close(self) -> None:
        for event in self._let_go:
            event.set()
        self._executor.shutdown()

    def _hold(self, number: int, size_bytes: int, *, fail: bool) -> None:
        with self._ledger.charge(size_bytes):
            with self._lock:
                self.held[number] = size_bytes
                self.most_bytes = max(self.most_bytes, sum(self.held.values()))
            self._let_go[number].wait()
            with self._lock:
                del self.held[number]
            if fail:
                raise ImageUnreadable("as told")


@pytest.fixture
def charges() -> Iterator[_Charges]:
    holders = _Charges(ScratchLedger(100))
    yield holders
    holders.close()


def test_a_decode_waits_until_its_share_of_scratch_fits(charges: _Charges) -> None:
    """Two of 50 run, the third waits for one of them."""
    for number in range(2):
        charges.start(number, 50)
    wait_until(lambda: len(charges.held) == 2)
    charges.start(2, 50)
    charges.let_go(0)
    wait_until(lambda: 2 in charges.held)
    assert charges.most_bytes == 100


def test_a_decode_larger_than_all_scratch_runs_alone(charges: _Charges) -> None:
    """It waits for the others, and the others for it."""
    charges.start(0, 60)
    wait_until(lambda: 0 in charges.held)
    charges.start(1, 1000)
    charges.let_go(0)
    wait_until(lambda: 1 in charges.held)
    charges.start(2, 1)
    charges.let_go(1)
    wait_until(lambda: 2 in charges.held)
    assert charges.most_bytes == 1000


def test_failing_decodes_give_their_scratch_back(charges: _Charges) -> None:
    """A hundred bytes at a time, every one of them failing: all have their turn."""
    for number in range(16):
        charges.start(number, 100, fail=True)
        charges.let_go(number)
    with ScratchLedger(1).charge(5):
        pass
    charges.close()
    assert not charges.held
    assert charges.most_bytes == 100
