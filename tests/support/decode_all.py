"""Decode files over memory filled with one byte, and print a line for each: its checksum, or the error.

Run it with MALLOC_PERTURB_: memory that a library allocates and does not write differs then, too.
"""

from __future__ import annotations

import sys
import warnings
from hashlib import sha256
from pathlib import Path

import numpy as np

from adc_worker.errors import ImageError
from adc_worker.ingest.decode import decode
from adc_worker.ingest.header import read_header

MAX_PIXELS = 1_000_000


def outcome(path: Path, fill: int) -> str:
    try:
        header = read_header(path, MAX_PIXELS)
        out = np.full(header.shape, fill, np.uint8)
        report = decode(path, header, out)
    except ImageError as error:
        return str(error)
    return f"{header.shape} {report.truncated} {report.damaged} {sha256(out.tobytes()).hexdigest()}"


def main() -> None:
    warnings.simplefilter("ignore")
    folder, fill = Path(sys.argv[1]), int(sys.argv[2])
    for path in sorted(folder.iterdir()):
        line = outcome(path, fill).replace("\n", " ")
        sys.stdout.write(f"{path.name} {line}\n")


if __name__ == "__main__":
    main()
