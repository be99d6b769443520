"""Image files with random damage against the header reader and the decoders: does anything but an answer come out?

Each input is a small file of a kind that is taken, changed in a few bytes of its header, in its numbers, or by a piece
of another file, or a lost block. A finding is an exception that is no ImageError, a pixel that comes from the memory
decoded into and not from the file, memory beyond what the header says, more than SLOW_S, or the death of the process.
Not covered: damage inside long streams of pixels, libraries other than the installed ones.

Findings are written to tests/seeds/, which `make test` replays.
"""

from __future__ import annotations

import argparse
import random
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import orjson

sys.path.insert(0, str(Path(__file__).parents[1]))

from adc_worker.errors import ImageError, ImageTooLarge
from adc_worker.host.memory import PeakResidentMemory
from adc_worker.ingest.decode import decode
from adc_worker.ingest.header import METADATA_BYTES, read_header
from benchmarks.support.report import commit, machine, table, write_section
from tests.support.damage import ARITHMETIC_JPEG, RARE_SAMPLING
from tests.support.images import encoded, jpeg, picture, run_length_bmp
from tests.support.jpeg_writer import sampled_jpeg

SEEDS = Path(__file__).parents[1] / "tests" / "seeds"
SLOW_S = 2.0
SLACK_BYTES = 16 << 20
MAX_PIXELS = 400_000_000
DECODED_PIXELS = 2_000_000  # larger ones are read, not decoded: the time goes into more inputs
MEMORY_EVERY = 20  # inputs between two looks at the memory of this process
NUMBERS = (
    0,
    1,
    2,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0x8000,
    0xFFFF,
    0x10000,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    1 << 40,
    (1 << 63) - 1,
)


def samples() -> dict[str, list[bytes]]:
    """Return small files by format, each of another kind."""
    small = [picture(40, 30, mode=mode) for mode in ("RGB", "L", "RGBA", "P", "I;16", "CMYK")]
    rgb, grey, alpha, palette, deep, cmyk = small
    tiffs = [
        encoded(image, "TIFF", compression=compression, tiffinfo={274: 6})
        for image in (rgb, grey, alpha, deep, cmyk)
        for compression in (None, "tiff_lzw", "tiff_adobe_deflate", "packbits")
    ]
    return {
        "GIF": [
            encoded(palette, "GIF", interlace=0),
            encoded(palette, "GIF", interlace=1, transparency=3),
            encoded(grey, "GIF"),
            encoded(palette, "GIF", save_all=True, append_images=[grey]),
        ],
        "BMP": [encoded(image, "BMP") for image in (rgb, grey, alpha, palette)]
        + [encoded(picture(40, 30, mode="1"), "BMP"), run_length_bmp(picture(40, 30, mode="L"))],
        "JPEG": [
            jpeg(40, 30),
            jpeg(40, 30, progressive=True),
            jpeg(40, 30, subsampling=0, exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0"),
            encoded(grey, "JPEG"),
            encoded(cmyk, "JPEG"),
            encoded(rgb, "MPO", save_all=True, append_images=[rgb]),
            encoded(rgb, "JPEG", restart_marker_blocks=2),
            encoded(cmyk, "JPEG", progressive=True),
            sampled_jpeg(40, 30, ((2, 2), (1, 1), (1, 1)), scan_per_component=True),
            sampled_jpeg(40, 30, RARE_SAMPLING, restart_blocks=2),
            sampled_jpeg(40, 30, RARE_SAMPLING, progressive=True),
            ARITHMETIC_JPEG,
            jpeg(40, 30, progressive=True) + jpeg(20, 20, progressive=True),  # a film or another file behind it
        ],
        "PNG": [encoded(image, "PNG") for image in (rgb, grey, alpha, palette, deep)]
        + [encoded(rgb, "PNG", save_all=True, append_images=[alpha])],
        "TIFF": [*tiffs, encoded(rgb, "TIFF", compression="jpeg"), encoded(rgb, "TIFF", big_tiff=True)],
        "WEBP": [
            encoded(rgb, "WEBP"),
            encoded(alpha, "WEBP", lossless=True),
            encoded(rgb, "WEBP", save_all=True, append_images=[alpha]),
        ],
    }


def mutated(data: bytes, others: Sequence[bytes], dice: random.Random) -> bytes:
    """Change a file in one to three places, most of them numbers, and behind the bytes that name its format."""
    broken = bytearray(data)
    for _change in range(dice.choice((1, 1, 2, 3))):
        directory = int.from_bytes(data[4:8], "little") if data[:4] == b"II*\0" else 8
        at = dice.choice((dice.randrange(len(data)), 4 + dice.randrange(200), directory + dice.randrange(200)))
        match dice.randrange(11):
            case 0:
                broken[at : at + 1] = bytes([dice.randrange(256)])
            case 1 | 6 | 7 | 8 | 9:
                width, order = dice.choice("BHIQ"), dice.choice("<>")
                number = dice.choice(NUMBERS) & ((1 << 8 * struct.calcsize(width)) - 1)
                broken[at : at + struct.calcsize(width)] = struct.pack(order + width, number)
            case 2:
                del broken[at : at + dice.randint(1, 20)]
            case 3:
                broken[at:at] = bytes(dice.randrange(256) for _byte in range(dice.randint(1, 20)))
            case 4:
                other = dice.choice(others)
                start = dice.randrange(len(other))
                broken[at : at + 30] = other[start : start + dice.randint(1, 60)]
            case 5:
                del broken[at:]
            case _:
                start = dice.randrange(len(data))
                block = min(dice.randint(20, 400), len(data) - start)
                broken[start : start + block] = bytes(block) if dice.random() < 0.5 else b""
    return with_right_sums(bytes(broken)) if dice.random() < 0.7 else bytes(broken)


def with_right_sums(data: bytes) -> bytes:
    """Give each chunk of a PNG its checksum: else nearly every change would be refused for that alone."""
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        return data
    chunks, at = [data[:8]], 8
    while at + 8 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4])
        if end + 4 > len(data):
            break
        chunks.append(data[at:end] + zlib.crc32(data[at + 4 : end]).to_bytes(4))
        at = end + 4
    return b"".join(chunks) + data[at:]


class NotOfTheFile(Exception):
    """Pixels of an image depend on the memory that it was decoded into."""


def attempt(path: Path) -> tuple[str, int]:
    """Read a file's header and decode it; return what came out and the bytes that may have taken.

    Raises:
        NotOfTheFile: decoded once more, into memory of other contents, it is another image.
    """
    allowed_bytes = 2 * METADATA_BYTES
    try:
        header = read_header(path, MAX_PIXELS)
        if header.width_px * header.height_px > DECODED_PIXELS:
            return "header read", allowed_bytes
        allowed_bytes += 2 * header.pixel_bytes + header.scratch_bytes
        over_zeros = np.zeros(header.shape, np.uint8)
        over_ones = np.full(header.shape, 255, np.uint8)
        report = decode(path, header, over_zeros)
        decode(path, header, over_ones)
    except ImageTooLarge:
        return "too large", allowed_bytes
    except ImageError:
        return "unreadable", allowed_bytes
    if not np.array_equal(over_zeros, over_ones):
        raise NotOfTheFile(str(report))
    if report.truncated:
        return "truncated", allowed_bytes
    return "damaged" if report.damaged else "decoded", allowed_bytes


def finding(path: Path, *, measure: bool = True) -> tuple[str, str | None]:
    """Try one file; return its outcome, and what is wrong with that."""
    memory = PeakResidentMemory() if measure else None
    started = time.thread_time()  # other programs make nothing slow
    try:
        outcome, allowed_bytes = attempt(path)
    except Exception:  # noqa: BLE001 (whatever it is, it is the finding)
        return "exception", traceback.format_exc(limit=-3)
    took_s = time.thread_time() - started
    if took_s > SLOW_S:
        return outcome, f"took {took_s:.1f} s"
    if memory is not None and memory.growth_bytes() > allowed_bytes + SLACK_BYTES:
        return outcome, f"took {memory.growth_bytes()} bytes, of which {allowed_bytes} are explained"
    return outcome, None


def work(seed: int, seconds: float, path: Path) -> None:
    """Try inputs until the time is over; print one line of JSON with what came of them. A process does no more."""
    warnings.simplefilter("ignore")
    dice, files = random.Random(seed), samples()  # noqa: S311 (no secret)
    everything = [data for kind in files.values() for data in kind]
    outcomes: Counter[str] = Counter()
    found: list[str] = []
    deadline_s = time.monotonic() + seconds
    while time.monotonic() < deadline_s:
        kind = dice.choice(list(files))
        path.write_bytes(mutated(dice.choice(files[kind]), everything, dice))
        outcome, wrong = finding(path, measure=outcomes.total() % MEMORY_EVERY == 0)
        outcomes[f"{kind} {outcome}"] += 1
        if wrong is not None:
            found.append(f"{keep(path)}: {wrong}")
    print(orjson.dumps({"outcomes": outcomes, "found": found}).decode())


def keep(path: Path) -> str:
    """Keep an input for ever, under the name of its bytes."""
    data = path.read_bytes()
    SEEDS.mkdir(exist_ok=True)
    name = f"{sha256(data).hexdigest()[:16]}.img"
    (SEEDS / name).write_bytes(data)
    return name


def run(seconds: float, seed: int, slice_s: float = 60.0) -> tuple[Counter[str], list[str]]:
    """Fuzz in one process after the other, so that one which dies names its input and costs one slice at most."""
    outcomes: Counter[str] = Counter()
    found: list[str] = []
    deadline_s = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:  # on disk, like staging: other file systems know other errors
        path = Path(folder) / "input.img"
        while (left_s := deadline_s - time.monotonic()) > 1:
            command = [sys.executable, __file__, "--child", str(seed), str(min(left_s, slice_s)), str(path)]
            ended = subprocess.run(command, capture_output=True, text=True, check=False)
            seed += 1
            if ended.returncode:
                found.append(f"{keep(path)}: the process ended with {ended.returncode}: {ended.stderr[-300:]}")
                continue
            told = orjson.loads(ended.stdout)
            outcomes.update(told["outcomes"])
            found += told["found"]
    return outcomes, found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seconds", type=float, default=300.0)
    options.add_argument("--seed", type=int, default=int(time.time()))
    options.add_argument("--child", nargs=3, metavar=("SEED", "SECONDS", "FILE"), help="for itself")
    chosen = options.parse_args()
    if chosen.child:
        work(int(chosen.child[0]), float(chosen.child[1]), Path(chosen.child[2]))
        return
    outcomes, found = run(chosen.seconds, chosen.seed)
    kinds = ("JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP")
    ends = ("decoded", "damaged", "truncated", "unreadable", "too large", "header read", "exception")
    rows = [[kind, *(f"{outcomes[f'{kind} {end}']:,}" for end in ends)] for kind in kinds]
    text = f"""## Damaged image files (`benchmarks/fuzz.py`)

{machine()}; {commit()}.

{outcomes.total():,} inputs in {chosen.seconds:.0f} s from seed {chosen.seed}: {len(found)} findings.

{table(["file", *ends], rows)}

{chr(10).join(f"* {each}" for each in found) or "Nothing but answers came out."}

`header read`: more than {DECODED_PIXELS:,} pixels, not decoded here. A finding is kept in `tests/seeds/` and replayed
by `make test`. Memory is looked at with every {MEMORY_EVERY}th input.
"""
    print(text)
    write_section("fuzz", text)


if __name__ == "__main__":
    main()
