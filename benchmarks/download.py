"""What a download costs its process: CPU per 1.7 MB and per 28 MB file by client, one and four at once; the disk side.

Every client fetches from the image host of benchmarks/support (another process, 50 ms, 60 MB/s per connection) into a
file; user + system seconds of a process of its own per client and round, clients in turn, median of the rounds. The
first download of a thread (connecting) is not counted. Below that: what it costs to write a file so that few of its
pages stay in the page cache, what stays, and what decoding costs when they are gone.

Not measured: TLS (its decryption comes on top and rules splice out), real networks, where a read brings less, the
kernel's own threads that write dirty pages, a disk without the hypervisor's cache. Clients marked with * break a rule
that ImageClient keeps (private attributes, no check of short bodies, no pool or proxy, no TLS).
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import http.client
import importlib
import json
import mmap
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import urllib3

sys.path.insert(0, str(Path(__file__).parents[1]))

from adc_worker.desk.sheets import LARGE, TYPICAL, write_sheets
from adc_worker.ingest.addresses import AddressPolicy
from adc_worker.ingest.decode import decode
from adc_worker.ingest.download import WRITE_BACK_BYTES, ImageClient
from adc_worker.ingest.header import read_header
from adc_worker.runtime.supervisor import CHILD_ENVIRONMENT
from benchmarks.support.hardware import caption
from benchmarks.support.image_host import ImageHost
from benchmarks.support.report import table, write_section

Fetch = Callable[[str, int], None]  # url, file descriptor

MIB = 1 << 20
KIB_256 = 1 << 18
TIMEOUT_S = 30.0
TRIM = "MALLOC_TRIM_THRESHOLD_"
HEADERS = {"Accept-Encoding": "identity"}
COUNTS = {"typical": 12, "large": 4}  # downloads per process, times how many run at once
AT_ONCE = (1, 4)


def _image_client() -> Fetch:
    client = ImageClient(1 << 30, AddressPolicy("127.0.0.1"))
    return lambda url, fd: _discard(client.download(url, fd, lambda: False))


def _discard(_value: object) -> None:
    pass


def _write_all(fd: int, data: bytes | memoryview) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def _urllib3(blocks: Callable[[Any], Iterable[bytes | memoryview]]) -> Fetch:
    pool = urllib3.PoolManager(retries=False, timeout=TIMEOUT_S, headers=HEADERS)

    def fetch(url: str, fd: int) -> None:
        response = pool.request("GET", url, preload_content=False, redirect=False)
        for block in blocks(response):
            _write_all(fd, block)
        response.release_conn()

    return fetch


def _until_empty(read: Callable[[], bytes]) -> Iterator[bytes]:
    return iter(read, b"")


def _into(readinto: Callable[[memoryview], int], buffer: memoryview) -> Iterator[memoryview]:
    while size_bytes := readinto(buffer):
        yield buffer[:size_bytes]


def _urllib3_socket() -> Fetch:
    buffer = memoryview(bytearray(KIB_256))

    def blocks(response: Any) -> Iterator[memoryview]:
        left = response.length_remaining
        while left:
            size_bytes = response._fp.fp.readinto1(buffer[:left])  # noqa: SLF001 (this is the rule that is broken)
            left -= size_bytes
            yield buffer[:size_bytes]
        response._fp.close()  # noqa: SLF001

    return _urllib3(blocks)


def _urllib3_readinto() -> Fetch:
    buffer = memoryview(bytearray(KIB_256))
    return _urllib3(lambda response: _into(response.readinto, buffer))


def _http_client(copy: Callable[[http.client.HTTPConnection, http.client.HTTPResponse, int], None]) -> Fetch:
    connections: dict[str, http.client.HTTPConnection] = {}

    def fetch(url: str, fd: int) -> None:
        parts = urlsplit(url)
        connection = connections.setdefault(parts.netloc, http.client.HTTPConnection(parts.netloc, timeout=TIMEOUT_S))
        connection.request("GET", parts.path, headers=HEADERS)
        response = connection.getresponse()
        copy(connection, response, fd)
        response.close()

    return fetch


def _http_client_readinto() -> Fetch:
    buffer = memoryview(bytearray(MIB))

    def copy(_connection: http.client.HTTPConnection, response: http.client.HTTPResponse, fd: int) -> None:
        for block in _into(response.readinto, buffer):
            _write_all(fd, block)

    return _http_client(copy)


def _http_client_splice() -> Fetch:
    end, start = os.pipe()
    size_max = _pipe_of(MIB, start)

    def copy(connection: http.client.HTTPConnection, response: http.client.HTTPResponse, fd: int) -> None:
        left = response.length or 0
        first = response.read1(min(left, 1 << 16))  # what came with the headers
        _write_all(fd, first)
        left -= len(first)
        poll = select.poll()
        poll.register(connection.sock, select.POLLIN)
        while left:
            poll.poll(TIMEOUT_S * 1000)
            moved = os.splice(connection.sock.fileno(), start, min(left, size_max))
            left -= moved
            while moved:
                moved -= os.splice(end, fd, moved)

    return _http_client(copy)


def _pipe_of(size_bytes: int, fd: int) -> int:
    fcntl = importlib.import_module("fcntl")
    return int(fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, size_bytes))


def _httpx() -> Fetch:
    client = importlib.import_module("httpx").Client(timeout=TIMEOUT_S, headers=HEADERS)

    def fetch(url: str, fd: int) -> None:
        with client.stream("GET", url) as response:
            for block in response.iter_bytes():
                _write_all(fd, block)

    return fetch


def _httpcore_large_reads() -> Fetch:
    """Build httpx's own engine with a network stream that reads 1 MiB whatever it is asked for."""
    httpcore = importlib.import_module("httpcore")

    class Stream(httpcore.NetworkStream):  # type: ignore[misc, name-defined]
        def __init__(self, inner: Any) -> None:
            self._inner = inner

        def read(self, _max_bytes: int, timeout: float | None = None) -> Any:
            return self._inner.read(MIB, timeout)

        def __getattribute__(self, name: str) -> Any:
            mine = name in {"read", "_inner"}
            return object.__getattribute__(self, name) if mine else getattr(self._inner, name)

    class Backend(httpcore.SyncBackend):  # type: ignore[misc, name-defined]
        def connect_tcp(self, *arguments: Any, **options: Any) -> Any:
            return Stream(super().connect_tcp(*arguments, **options))

    pool = httpcore.ConnectionPool(network_backend=Backend())

    def fetch(url: str, fd: int) -> None:
        with pool.stream("GET", url, headers=HEADERS) as response:
            for block in response.iter_stream():
                _write_all(fd, block)

    return fetch


def _urllib3_read(size_bytes: int, **options: bool) -> Callable[[], Fetch]:
    return lambda: _urllib3(lambda response: _until_empty(lambda: response.read(size_bytes, **options)))


def _urllib3_read1(size_bytes: int, **options: bool) -> Callable[[], Fetch]:
    return lambda: _urllib3(lambda response: _until_empty(lambda: response.read1(size_bytes, **options)))


OURS = "ImageClient (ours)"
# Above this, a freed read buffer at the top of the heap goes back to the kernel: page faults for the next one.
TRIM_THRESHOLDS = {f"{OURS}, {TRIM} {size >> 10} KiB": {TRIM: str(size)} for size in (1 << 17, 2 * MIB)}
CLIENTS: dict[str, Callable[[], Fetch]] = {
    OURS: _image_client,
    **dict.fromkeys(TRIM_THRESHOLDS, _image_client),
    "urllib3 read(1 MiB)": _urllib3_read(MIB),
    "urllib3 read(256 KiB)": _urllib3_read(KIB_256),
    "urllib3 read1(256 KiB, decode_content=False)": _urllib3_read1(KIB_256, decode_content=False),
    "urllib3 read1(64 KiB)": _urllib3_read1(1 << 16),
    "urllib3 readinto(256 KiB)": _urllib3_readinto,
    "urllib3 stream(1 MiB)": lambda: _urllib3(lambda response: response.stream(MIB)),
    "urllib3, its private file's readinto1 *": _urllib3_socket,
    "http.client readinto(1 MiB) *": _http_client_readinto,
    "http.client + splice *": _http_client_splice,
    "httpx stream": _httpx,
    "httpcore, reads of 1 MiB *": _httpcore_large_reads,
}
AIOHTTP = "aiohttp *"


class Work(NamedTuple):
    """What one measured process downloads: `urls` by each of `at_once` threads or tasks."""

    folder: str
    urls: list[str]
    at_once: int


def cpu_per_download_s(client: str, work: Work) -> float:
    """Download as `client` in this process; CPU seconds per download."""
    if client == AIOHTTP:
        return asyncio.run(_by_aiohttp(work))
    with ThreadPoolExecutor(work.at_once) as threads:
        fetches = [CLIENTS[client]() for _ in range(work.at_once)]
        list(threads.map(lambda fetch: _some(fetch, work.urls[:1], work.folder), fetches))
        started = time.process_time()
        list(threads.map(lambda fetch: _some(fetch, work.urls, work.folder), fetches))
        return (time.process_time() - started) / (len(work.urls) * work.at_once)


def _some(fetch: Fetch, urls: list[str], folder: str) -> None:
    for url in urls:
        with tempfile.TemporaryFile(dir=folder) as file:
            fetch(url, file.fileno())
            _check(file.fileno())


def _check(fd: int) -> None:
    if os.fstat(fd).st_size < MIB:
        raise RuntimeError("the file is not the image")


async def _by_aiohttp(work: Work) -> float:
    aiohttp = importlib.import_module("aiohttp")

    async def some(session: Any, urls: list[str]) -> None:
        for url in urls:
            with tempfile.TemporaryFile(dir=work.folder) as file:
                async with session.get(url) as response:
                    async for block in response.content.iter_chunked(MIB):
                        _write_all(file.fileno(), block)
                _check(file.fileno())

    async with aiohttp.ClientSession(headers=HEADERS, read_bufsize=MIB) as session:
        await asyncio.gather(*(some(session, work.urls[:1]) for _ in range(work.at_once)))
        started = time.process_time()
        await asyncio.gather(*(some(session, work.urls) for _ in range(work.at_once)))
        return (time.process_time() - started) / (len(work.urls) * work.at_once)


def measure_clients(folder: Path, rounds: int, only: str) -> str:
    clients = [name for name in (*CLIENTS, AIOHTTP) if only in name]
    settings = [(kind, at_once) for kind in COUNTS for at_once in AT_ONCE]
    figures: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    with ImageHost(folder) as host:
        for _round in range(rounds):
            for kind, at_once in settings:
                work = Work(str(folder), host.urls([f"{kind}.jpg"] * COUNTS[kind]), at_once)
                for client in clients:
                    figures[client, kind, at_once].append(_in_a_process(client, work))
    rows = [[client, *(_spread_ms(figures[client, *setting]) for setting in settings)] for client in clients]
    return table(["client", *(f"{kind}, {at_once} at once" for kind, at_once in settings)], rows)


def _in_a_process(client: str, work: Work) -> float:
    command = [sys.executable, __file__, "--client", client, "--work", json.dumps(work)]
    environment = os.environ | CHILD_ENVIRONMENT | TRIM_THRESHOLDS.get(client, {})
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return float(done.stdout)


def _spread_ms(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds) * 1e3:.1f} [{min(seconds) * 1e3:.1f}-{max(seconds) * 1e3:.1f}]"


CACHESTAT = 451  # the system call's number on x86-64 and arm64, Linux 6.5
WINDOW_BYTES = WRITE_BACK_BYTES
FILES = 20
libc = ctypes.CDLL(None, use_errno=True)


def _keep(_fd: int, _written: int) -> None:
    """Leave everything to the kernel."""


def _drop(fd: int, written: int) -> None:
    """Start writing the window that is full: DONTNEED drops what is clean, writes the rest, and does not wait."""
    os.posix_fadvise(fd, written - WINDOW_BYTES, WINDOW_BYTES, os.POSIX_FADV_DONTNEED)


def _drop_at_end(fd: int) -> None:
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _sync_and_drop_at_end(fd: int) -> None:
    os.fdatasync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _nothing_at_end(_fd: int) -> None:
    pass


WRITERS: dict[str, tuple[Callable[[int, int], None], Callable[[int], None]]] = {
    "write": (_keep, _nothing_at_end),
    "write, fadvise(DONTNEED) per 8 MiB and at the end": (_drop, _drop_at_end),
    "write, fdatasync + DONTNEED at the end": (_keep, _sync_and_drop_at_end),
    "ours: write, fadvise per 8 MiB, fdatasync + DONTNEED at the end": (_drop, _sync_and_drop_at_end),
}


class Cached(NamedTuple):
    """Bytes of files in the page cache, and how many of them are dirty or being written."""

    cached: int
    dirty: int


def _cached(files: Iterable[Path]) -> Cached | None:
    """Ask the kernel which pages of the files it holds; None before Linux 6.5."""
    found = Cached(0, 0)
    for path in files:
        whole, answer = (ctypes.c_uint64 * 2)(0, 0), (ctypes.c_uint64 * 5)()
        with path.open("rb") as file:
            if libc.syscall(CACHESTAT, file.fileno(), whole, answer, 0):
                return None
        page = mmap.PAGESIZE
        found = Cached(found.cached + answer[0] * page, found.dirty + (answer[1] + answer[2]) * page)
    return found


def measure_writers(folder: Path, data: bytes, rounds: int) -> str:
    figures: dict[str, list[tuple[float, float]]] = defaultdict(list)
    left: dict[str, list[Cached | None]] = defaultdict(list)
    for round_ in range(rounds):
        for name in WRITERS:
            files = [folder / f"{round_}-{number}.img" for number in range(FILES)]
            figures[name] += [_written(file, data, name) for file in files]
            left[name].append(_cached(files))
            for file in files:
                file.unlink()
            os.sync()  # the next one starts with a quiet disk
    rows = []
    for name, times in figures.items():
        cpu_s, wall_s = ([*column] for column in zip(*times, strict=True))
        caches = [cache for cache in left[name] if cache]
        most = (
            f"{max(c.cached for c in caches) / 1e6:.0f} ({max(c.dirty for c in caches) / 1e6:.0f})" if caches else "?"
        )
        rows.append([name, _spread_ms(cpu_s), _spread_ms(wall_s), most])
    return table(["writing", "CPU ms", "wall ms", f"MB cached after {FILES} files (dirty)"], rows)


def _written(path: Path, data: bytes, name: str) -> tuple[float, float]:
    """Write a file in the blocks of a download; CPU and wall seconds."""
    step, finish = WRITERS[name]
    cpu, wall = time.process_time(), time.perf_counter()
    fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
    view = memoryview(data)
    for start in range(0, len(data), KIB_256):
        _write_all(fd, view[start : start + KIB_256])
        written = start + KIB_256
        if written % WINDOW_BYTES == 0:
            step(fd, written)
    finish(fd)
    os.close(fd)
    return time.process_time() - cpu, time.perf_counter() - wall


def measure_cold_decode(files: dict[str, Path], rounds: int) -> str:
    figures: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    ways: dict[str, tuple[int, ...]] = {
        "cached": (),
        "dropped": (os.POSIX_FADV_DONTNEED,),
        "dropped, WILLNEED before": (os.POSIX_FADV_DONTNEED, os.POSIX_FADV_WILLNEED),
    }
    for kind, path in files.items():
        header = read_header(path, 1 << 40)
        out = np.ones(header.shape, np.uint8)
        for _round in range(rounds):
            for way, advices in ways.items():
                path.read_bytes()
                figures[kind, way].append(_decoded(path, advices, lambda: decode(path, header, out)))  # noqa: B023 (called at once)
    rows = [[*key, *(_spread_ms(column) for column in zip(*times, strict=True))] for key, times in figures.items()]
    return table(["decode", "file", "CPU ms", "wall ms"], rows)


def _decoded(path: Path, advices: tuple[int, ...], decode_it: Callable[[], object]) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    with path.open("rb") as file:
        for advice in advices:
            os.posix_fadvise(file.fileno(), 0, 0, advice)
    decode_it()
    return time.process_time() - cpu, time.perf_counter() - wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="clients whose name holds this text")
    parser.add_argument("--client", help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.client:
        print(cpu_per_download_s(arguments.client, Work(*json.loads(arguments.work))))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = {}
        for kind, grain, size in (("typical", TYPICAL, (4096, 2160)), ("large", LARGE, (4096, 3072))):
            (drawn,) = write_sheets(folder / kind, 1, seed=1, sizes=(size,), grain=grain)
            files[kind] = drawn.rename(folder / f"{kind}.jpg")
        os.sync()
        parts = [
            f"## Download (`benchmarks/download.py`)\n\n{caption()} Median [least-most] of {arguments.rounds} rounds.",
            f"CPU milliseconds per download:\n\n{measure_clients(folder, arguments.rounds, arguments.only)}",
            f"Writing 28 MB:\n\n{measure_writers(folder, files['large'].read_bytes(), arguments.rounds)}",
            f"Decoding from a file that is or is not in the page cache:\n\n{measure_cold_decode(files, 9)}",
        ]
    text = "\n\n".join(parts)
    print(text)
    if not arguments.only:
        write_section("download", text)


if __name__ == "__main__":
    main()
