"""An image host in a process of its own: latency before each answer, a byte rate per connection, hardly any CPU.

The desk's own server streams 64 KiB chunks through Python and shares its thread with the API; this one uses sendfile.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

LATENCY_S = 0.050
BYTES_PER_S = 60e6
CHUNK_BYTES = 512 * 1024
_CHANGE = "change"  # a file with what is different for a while


class ImageHost:
    """`with ImageHost(folder) as host:` serves the files of a folder under any number of addresses each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[str]
        self._port = 0

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(self._folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        self._port = int(self._process.stdout.readline())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()

    def urls(self, names: list[str]) -> list[str]:
        """Return an address per name, all different."""
        return [f"http://127.0.0.1:{self._port}/{number}/{name}" for number, name in enumerate(names)]

    def change(self, *, slower: float = 1.0, kind: str = "") -> None:
        """From the next answer on take `slower` times as long, and send photographs of `kind` in place of others."""
        partial = self._folder / f".{_CHANGE}"
        partial.write_text(f"{slower} {kind}")
        partial.rename(self._folder / _CHANGE)

    def cpu_s(self) -> float:
        times = psutil.Process(self._process.pid).cpu_times()
        return times.user + times.system


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a small file waits 40 ms behind its headers, for a delayed acknowledgement
    folder: Path

    def do_GET(self) -> None:
        change = self.folder / _CHANGE
        factor, _space, kind = change.read_text().partition(" ") if change.exists() else ("1", "", "")
        slower, name = float(factor), Path(self.path).name
        time.sleep(slower * LATENCY_S)
        file = self.folder / (f"{kind}-{name.partition('-')[2]}" if kind else name)
        if not file.is_file():
            self.send_error(404)
            return
        with file.open("rb") as stream:
            size_bytes = os.fstat(stream.fileno()).st_size
            self.send_response(200)
            self.send_header("Content-Type", "image/jpeg")
            self.send_header("Content-Length", str(size_bytes))
            self.end_headers()
            self._send(stream.fileno(), size_bytes, BYTES_PER_S / slower)

    def _send(self, fd: int, size_bytes: int, bytes_per_s: float) -> None:
        sent, started_s = 0, time.monotonic()
        while sent < size_bytes:
            sent += os.sendfile(self.connection.fileno(), fd, sent, min(CHUNK_BYTES, size_bytes - sent))
            time.sleep(max(0.0, started_s + sent / bytes_per_s - time.monotonic()))

    def handle(self) -> None:
        try:
            super().handle()
        except (ConnectionResetError, BrokenPipeError):
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (its name in the base class)
        del format, args


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


def main() -> None:
    """Serve argv[1] until killed; the first line of stdout is the port."""
    _Handler.folder = Path(sys.argv[1])
    server = _Server(("127.0.0.1", 0), _Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
