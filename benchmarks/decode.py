"""What decoding costs: milliseconds on one and two threads, memory beside the output, and how far from Pillow it is.

Our decoder (`adc_worker.ingest.decode`, into a buffer) beside Pillow to uint8, torchvision, torchcodec and OpenCV, from
a file in the page cache, with the malloc setting of the worker's child. Speed: all decoders in turn in one process,
median of the rounds; a speed-up near 2 on two threads, best round against best, says the GIL is released. Memory: a
fresh process per figure; "anonymous" is the peak of RssAnon seen by a parent that looks every half millisecond (what
the budget counts), "with file" is VmHWM after a reset (exact, but includes compressed pages mapped from the page
cache; other decoders read the file into memory of their own).
`charged` is what `ImageHeader.scratch_bytes` reserves: it has to be at least the anonymous peak.

Not measured: a file that is not in the page cache (benchmarks/download.py), the arena, decoding on a GPU.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from adc_worker.desk.sheets import LARGE, TYPICAL, Grain, draw_sheet
from adc_worker.host.memory import PeakResidentMemory
from adc_worker.ingest.decode import decode
from adc_worker.ingest.header import FORMATS, ImageHeader, read_header
from adc_worker.runtime.supervisor import CHILD_ENVIRONMENT
from benchmarks.support.hardware import caption
from benchmarks.support.report import table, write_section
from tests.support.images import run_length_bmp
from tests.support.jpeg_writer import sampled_jpeg

Pixels = npt.NDArray[np.uint8]
Decoder = Callable[[Path, ImageHeader, Pixels], Any]

SIZES = {"typical": (4096, 2160), "large": (4096, 3072)}
GRAINS = {"typical": TYPICAL, "large": LARGE}
WARM_PX = 256
SAMPLE_S = 0.0005
IMAGES_PER_ROUND = 2
NO_LIMIT_PX = 1 << 40


class Case(NamedTuple):
    """One kind of file, and how an RGB photograph becomes one."""

    size: str
    name: str
    suffix: str
    save: Callable[[Image.Image, Path], None]

    def __str__(self) -> str:
        return f"{self.size} {self.name}"


def cases() -> Iterator[Case]:
    for size in SIZES:
        for kind in ("4:2:0", "4:2:2", "4:4:4"):
            for progressive in (False, True):
                yield _jpeg(size, kind, "RGB", progressive=progressive, subsampling=kind)
    for kind, mode in {"grey": "L", "CMYK": "CMYK"}.items():
        for progressive in (False, True):
            yield _jpeg("typical", kind, mode, progressive=progressive)
    yield Case("typical", "JPEG 4:4:4 baseline, a scan per component", "jpg", _save_in_three_scans)
    for kind, prepare in {"RGB": _rgb, "RGBA": _rgba, "palette": _palette, "16-bit grey": _grey_16}.items():
        yield _case(f"PNG {kind}", "PNG", prepare, compress_level=1)
    yield _case("TIFF RGB uncompressed", "TIFF")
    yield _case("TIFF RGB LZW", "TIFF", compression="tiff_lzw")
    yield _case("TIFF RGB LZW, one strip", "TIFF", compression="tiff_lzw", strip_size=1 << 30)
    yield _case("TIFF RGBA LZW, one strip", "TIFF", _rgba, compression="tiff_lzw", strip_size=1 << 30)
    yield Case("typical", "JPEG 3x1", "jpg", partial(_save_with_rare_sampling, scan_per_component=False))
    yield Case(
        "typical", "JPEG 3x1, a scan per component", "jpg", partial(_save_with_rare_sampling, scan_per_component=True)
    )
    yield _case("GIF", "GIF", _palette)
    yield _case("BMP RGB", "BMP")
    yield Case("typical", "BMP RLE", "bmp", _save_run_lengths)
    yield _case("WebP lossy", "WEBP", quality=85, method=0)
    yield _case("WebP lossy with alpha", "WEBP", _rgba, quality=85, method=0)
    yield _case("WebP lossless", "WEBP", lossless=True, quality=0, method=0)


def _rgb(image: Image.Image) -> Image.Image:
    return image


def _rgba(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.putalpha(image.convert("L"))
    return image


def _palette(image: Image.Image) -> Image.Image:
    return image.quantize(256)


def _grey_16(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)


def _case(name: str, kind: str, prepare: Callable[[Image.Image], Image.Image] = _rgb, **options: Any) -> Case:
    return Case("typical", name, kind.lower(), lambda image, path: prepare(image).save(path, kind, **options))


def _jpeg(size: str, kind: str, mode: str, *, progressive: bool, **options: Any) -> Case:
    def save(image: Image.Image, path: Path) -> None:
        image.convert(mode).save(path, "JPEG", quality=GRAINS[size].quality, progressive=progressive, **options)

    return Case(size, f"JPEG {kind} {'progressive' if progressive else 'baseline'}", "jpg", save)


def _save_in_three_scans(image: Image.Image, path: Path) -> None:
    """Write a JPEG as `jpegtran -scans` can: not progressive, and yet all its coefficients are held until the end."""
    files = []
    for plane in image.convert("YCbCr").split():
        buffer = io.BytesIO()
        plane.save(buffer, "JPEG", quality=TYPICAL.quality)
        files.append(buffer.getvalue())
    frame = files[0].index(b"\xff\xc0")
    tables, scan = frame + 2 + 11, files[0].index(b"\xff\xda")
    three = bytes([0, 17, 8, *files[0][frame + 5 : frame + 9], 3, 1, 0x11, 0, 2, 0x11, 0, 3, 0x11, 0])
    scans = [
        b"\xff\xda" + bytes([0, 8, 1, number, 0, 0, 63, 0]) + file[file.index(b"\xff\xda") + 10 : -2]
        for number, file in enumerate(files, 1)
    ]
    path.write_bytes(b"".join([files[0][:frame], b"\xff\xc0", three, files[0][tables:scan], *scans, b"\xff\xd9"]))


def _save_with_rare_sampling(image: Image.Image, path: Path, *, scan_per_component: bool) -> None:
    """Write a JPEG of the image's size whose sampling TurboJPEG has no name for; its content is random blocks."""
    rare = ((3, 1), (1, 1), (1, 1))
    path.write_bytes(sampled_jpeg(image.width, image.height, rare, scan_per_component=scan_per_component))


def _save_run_lengths(image: Image.Image, path: Path) -> None:
    path.write_bytes(run_length_bmp(image.convert("L")))


def write_case(folder: Path, case: Case, photograph: Image.Image) -> Path:
    """Write the case's image, and beside it a small one that warms a decoder up."""
    path = folder / f"{case}.{case.suffix}"
    case.save(photograph, path)
    case.save(photograph.crop((0, 0, WARM_PX, WARM_PX)), _small(path))
    return path


def _small(path: Path) -> Path:
    return path.with_name(f"small {path.name}")


def _photograph(size: str, grain: Grain) -> Image.Image:
    return Image.fromarray(draw_sheet(SIZES[size], seed=1, noise_sigma=grain.noise_sigma).image)


def by_pillow(path: Path, _header: ImageHeader, _out: Pixels) -> Pixels:
    with Image.open(path, formats=FORMATS) as image:
        if image.mode.startswith("I;16"):  # Pillow would clip at 255; the upper byte is what we take, too
            return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
        return np.asarray(image.convert("RGB"))


def _ours(path: Path, header: ImageHeader, out: Pixels) -> Pixels:
    decode(path, header, out)
    return out


def _torchvision() -> Decoder:
    vision = importlib.import_module("torchvision.io")
    rgb = vision.ImageReadMode.RGB
    return lambda path, _header, _out: vision.decode_image(vision.read_file(str(path)), rgb)


def _torchcodec() -> Decoder:
    decoders = importlib.import_module("torchcodec.decoders")
    return lambda path, _header, _out: decoders.decode_image(path)


def _opencv() -> Decoder:
    cv2 = importlib.import_module("cv2")
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION

    def decode_cv2(path: Path, _header: ImageHeader, _out: Pixels) -> Any:
        decoded = cv2.imread(str(path), flags)
        if decoded is None:
            raise ValueError("OpenCV does not take it")
        return decoded

    return decode_cv2


DECODERS: dict[str, Callable[[], Decoder]] = {
    "ours": lambda: _ours,
    "Pillow": lambda: by_pillow,
    "torchvision": _torchvision,
    "torchcodec": _torchcodec,
    "OpenCV": _opencv,
}


def installed() -> tuple[dict[str, Decoder], list[str]]:
    """Return the decoders that can be imported here, and what to say about the others."""
    found, skipped = {}, []
    for name, load in DECODERS.items():
        try:
            found[name] = load()
        except (ImportError, RuntimeError, OSError) as error:
            skipped.append(f"skipped: {name} ({type(error).__name__}: {str(error).splitlines()[0]})")
    return found, skipped


def _rows(decoded: Any) -> Pixels:
    """Return what a decoder gave as uint8 [height, width, 3]."""
    array = np.asarray(decoded)
    if array.dtype != np.uint8:
        raise ValueError(f"decoded to {array.dtype}")
    return array.transpose(1, 2, 0) if array.shape[0] == 3 else array


class Speed(NamedTuple):
    """Milliseconds per image in each round, on one thread and on two that decode one image each."""

    one_ms: list[float]
    two_ms: list[float]

    def __str__(self) -> str:
        low, high = min(self.one_ms), max(self.one_ms)
        return f"{statistics.median(self.one_ms):.0f} [{low:.0f}-{high:.0f}] x{low / min(self.two_ms):.2f}"


def measure_speed(path: Path, decoders: dict[str, Decoder], rounds: int) -> dict[str, Speed]:
    header = read_header(path, NO_LIMIT_PX)
    buffers = [np.full(header.shape, 1, np.uint8) for _ in range(2)]
    figures = {name: Speed([], []) for name in decoders}
    with ThreadPoolExecutor(2) as threads:
        for _ in range(rounds):
            for name, decoder in decoders.items():

                def some(out: Pixels, decoder: Decoder = decoder) -> None:
                    for _ in range(IMAGES_PER_ROUND):
                        decoder(path, header, out)

                started = time.perf_counter()
                threads.submit(some, buffers[0]).result()
                one_s = time.perf_counter() - started
                started = time.perf_counter()
                list(threads.map(some, buffers))
                two_s = time.perf_counter() - started
                figures[name].one_ms.append(one_s / IMAGES_PER_ROUND * 1e3)
                figures[name].two_ms.append(two_s / (2 * IMAGES_PER_ROUND) * 1e3)
    return figures


def differences(path: Path, decoders: dict[str, Decoder]) -> dict[str, int]:
    """Return each decoder's largest difference from Pillow; a decoder that does not take the file is left out."""
    header = read_header(path, NO_LIMIT_PX)
    out = np.zeros(header.shape, np.uint8)
    expected = by_pillow(path, header, out).astype(np.int16)
    found = {}
    for name, decoder in decoders.items():
        try:
            decoded = _rows(decoder(path, header, out))
            found[name] = int(np.abs(decoded - expected).max())
        except (ValueError, RuntimeError):
            continue
    return found


class Scratch(NamedTuple):
    """Peak memory beside the output, in bytes per pixel."""

    anonymous: float
    with_file: float

    def __str__(self) -> str:
        return f"{max(0.0, self.anonymous):.2f} ({max(0.0, self.with_file):.2f})"


def measure_scratch(path: Path, name: str) -> Scratch:
    """Decode once in a fresh process and watch its memory."""
    command = [sys.executable, __file__, "--scratch-of", str(path), "--decoder", name]
    with subprocess.Popen(
        command, env=os.environ | CHILD_ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdout.readline()  # it is warm, its output buffer is there
        before = peak = _anonymous_bytes(child.pid)
        child.stdin.write(b"\n")
        child.stdin.flush()
        os.set_blocking(child.stdout.fileno(), False)
        while (answer := child.stdout.readline()) in (b"", None) and child.poll() is None:
            peak = max(peak, _anonymous_bytes(child.pid))
            time.sleep(SAMPLE_S)
        if not answer:
            raise RuntimeError(f"{name} did not decode {path.name}")
        report = json.loads(answer)
    per_pixel = report["pixels"]
    return Scratch((peak - before - report["output"]) / per_pixel, (report["growth"] - report["output"]) / per_pixel)


def _anonymous_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon:")), 0) * 1024


def decode_once(path: Path, name: str) -> None:
    """Do the child's side of `measure_scratch`."""
    decoder = DECODERS[name]()
    small = read_header(_small(path), NO_LIMIT_PX)
    decoder(_small(path), small, np.full(small.shape, 1, np.uint8))
    header = read_header(path, NO_LIMIT_PX)
    out = np.full(header.shape if name == "ours" else (1, 1, 3), 1, np.uint8)
    print("ready", flush=True)
    sys.stdin.readline()
    memory = PeakResidentMemory()
    decoded = decoder(path, header, out)
    growth = memory.growth_bytes()
    output = 0 if decoded is out else header.pixel_bytes
    print(json.dumps({"growth": growth, "output": output, "pixels": header.width_px * header.height_px}), flush=True)


def _worst(path: Path, name: str, runs: int) -> Scratch:
    figures = [measure_scratch(path, name) for _ in range(runs)]
    return Scratch(max(f.anonymous for f in figures), max(f.with_file for f in figures))


def report(folder: Path, rounds: int, only: str) -> str:
    decoders, skipped = installed()
    photographs = {size: _photograph(size, grain) for size, grain in GRAINS.items()}
    paths = {case: write_case(folder, case, photographs[case.size]) for case in cases() if only in str(case)}
    del photographs
    speeds, scratches, notes = [], [], skipped
    for case, path in paths.items():
        header = read_header(path, NO_LIMIT_PX)
        apart = differences(path, decoders)
        notes += [f"{name} on {case}: up to {most} away from Pillow" for name, most in apart.items() if most]
        taken = {name: decoders[name] for name in apart}
        speed = measure_speed(path, taken, rounds)
        speeds.append([case, f"{path.stat().st_size / 1e6:.1f}", *(speed.get(name, "-") for name in decoders)])
        scratch = {name: _worst(path, name, 3 if name == "ours" else 1) for name in taken}
        charged = header.scratch_bytes / (header.width_px * header.height_px)
        too_little = " **too little**" if charged < scratch["ours"].anonymous else ""
        scratches.append([case, f"{charged:.2f}{too_little}", *(scratch.get(name, "-") for name in decoders)])
    what = "Milliseconds per image on one thread, median [least-most]; x: what two threads gain, best round by best"
    parts = [
        f"{what}; {rounds} rounds.",
        table(["file", "MB", *decoders], speeds),
        "Peak memory beside the output, bytes per pixel: anonymous (with file)",
        table(["file", "charged", *decoders], scratches),
        "; ".join(notes) or "All decoders give Pillow's pixels.",
    ]
    return "\n\n".join(parts)


def main() -> None:
    warnings.simplefilter("ignore")  # torchvision's deprecations
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="cases whose name holds this text, such as 'large JPEG 4:4:4'")
    parser.add_argument("--scratch-of", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--decoder", choices=DECODERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.scratch_of:
        decode_once(arguments.scratch_of, arguments.decoder)
        return
    if not CHILD_ENVIRONMENT.items() <= os.environ.items():  # glibc reads it when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | CHILD_ENVIRONMENT)  # noqa: S606 (this program again)
    started = caption()
    with tempfile.TemporaryDirectory() as folder:
        figures = report(Path(folder), arguments.rounds, arguments.only)
    text = f"## Decoders (`benchmarks/decode.py`)\n\n{started}\n\n{figures}"
    print(text)
    if not arguments.only:
        write_section("decode", text)


if __name__ == "__main__":
    main()
