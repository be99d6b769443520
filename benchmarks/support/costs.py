"""What an image costs in CPU seconds, each stage alone: the roofline of a machine whose cores do everything."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from adc_worker.ingest.addresses import AddressPolicy
from adc_worker.ingest.decode import decode
from adc_worker.ingest.download import ImageClient
from adc_worker.ingest.header import read_header
from benchmarks.support.image_host import ImageHost
from benchmarks.support.photographs import Photographs

DOWNLOADS_AT_ONCE = 4
ROUNDS = 3


@dataclass(frozen=True, slots=True)
class ImageCosts:
    """CPU seconds per image of one kind."""

    decode_s: float
    download_s: float
    serve_s: float

    def roofline(self, gpu_s: float, cores_taken: float = 0.0) -> float:
        """Images per second when the cores that others do not take do nothing else and the GPU never waits."""
        cores = max(0.0, len(os.sched_getaffinity(0)) - cores_taken)
        return min(1 / gpu_s, cores / (self.decode_s + self.download_s + self.serve_s))


def mean(costs: Sequence[ImageCosts]) -> ImageCosts:
    """Return what an image of a mixed job costs."""
    return ImageCosts(
        fmean(cost.decode_s for cost in costs),
        fmean(cost.download_s for cost in costs),
        fmean(cost.serve_s for cost in costs),
    )


def measure(kind: str, photographs: Photographs, host: ImageHost, data: Path) -> ImageCosts:
    """Measure a kind of image: decoding on one thread, downloading in a process of its own, serving that."""
    names = photographs.names(kind, 8)
    decode_s = decode_cpu_s([photographs.path(name) for name in names])
    before_s = host.cpu_s()
    urls = host.urls(names * ROUNDS)
    done = subprocess.run(
        [sys.executable, __file__, str(data), json.dumps(urls)], capture_output=True, text=True, check=True
    )
    serve_s = host.cpu_s() - before_s
    return ImageCosts(decode_s, float(done.stdout) / len(urls), serve_s / len(urls))


def touch_s_per_byte() -> float:
    """Measure what it takes to write to shared memory for the first time, beside writing to it again."""
    size_bytes, spent_s = 256_000_000, []
    memory = np.frombuffer(mmap.mmap(-1, size_bytes), np.uint8)
    for value in (1, 2):
        started = time.process_time()
        memory[:] = value
        spent_s.append(time.process_time() - started)
    return max(0.0, spent_s[0] - spent_s[1]) / size_bytes


def decode_cpu_s(files: list[Path]) -> float:
    """Return CPU seconds per image, into memory that was written before, as the arena's is; of the best round."""
    headers = [read_header(file, 1 << 30) for file in files]
    out, rounds_s = np.ones(headers[0].shape, np.uint8), []
    for _round in range(ROUNDS):
        started = time.process_time()
        for file, header in zip(files, headers, strict=True):
            decode(file, header, out)
        rounds_s.append(time.process_time() - started)
    return min(rounds_s) / len(files)


def cores_together(files: list[Path]) -> float:
    """Return what decodes on all cores at once bring, compared to one alone; of the best round each."""
    cores, header = len(os.sched_getaffinity(0)), read_header(files[0], 1 << 30)
    outs = [np.ones(header.shape, np.uint8) for _ in range(cores)]

    def decode_all(out: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        for file in files:
            decode(file, read_header(file, 1 << 30), out)

    spent_s: dict[int, list[float]] = {1: [], cores: []}
    with ThreadPoolExecutor(cores) as threads:
        for _round in range(ROUNDS):
            for count, times_s in spent_s.items():
                started = time.perf_counter()
                list(threads.map(decode_all, outs[:count]))
                times_s.append(time.perf_counter() - started)
    return cores * min(spent_s[1]) / min(spent_s[cores])


def _download_cpu_s(urls: list[str], data: Path) -> float:
    with ImageClient(1 << 30, AddressPolicy("127.0.0.1")) as client, ThreadPoolExecutor(DOWNLOADS_AT_ONCE) as threads:

        def download(url: str) -> None:
            with tempfile.TemporaryFile(dir=data) as file:
                client.download(url, file.fileno(), lambda: False)

        started = time.process_time()
        list(threads.map(download, urls))
        return time.process_time() - started


if __name__ == "__main__":
    print(_download_cpu_s(json.loads(sys.argv[2]), Path(sys.argv[1])))
