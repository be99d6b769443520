"""The status page, its data, metrics and health over HTTP: read-only, served by the parent on AMI_STATUS_PORT."""

from __future__ import annotations

import ipaddress
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from adc_worker.errors import ConfigurationError
from adc_worker.log import get_logger
from adc_worker.runtime.board import Board
from adc_worker.runtime.snapshot import JobView, Snapshot

_log = get_logger(__name__)

_DATA = '<script type="application/json" id="data">'
_SECURITY = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline';"
    " connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
_JSON, _TEXT = "application/json", "text/plain; charset=utf-8"
_G, _C = GaugeMetricFamily, CounterMetricFamily

_NO_JOB = JobView(id=0, pipeline="", started_at=0.0)
# Base units, and one label, bounded by the configuration: worker is a process's slot. Counters get their _total.
_METRICS: dict[str, tuple[type[GaugeMetricFamily | CounterMetricFamily], str, Callable[[Snapshot, JobView], float]]] = {
    "memory_bytes": (_G, "Memory of its processes, decoded pixels included.", lambda one, _: one.memory_bytes),
    "memory_budget_bytes": (_G, "Memory the worker plans with.", lambda one, _: one.budget_bytes),
    "memory_limit_bytes": (_G, "The memory limit that binds.", lambda one, _: one.limit_bytes),
    "results_waiting": (_G, "Results that Antenna has not accepted yet.", lambda one, _: one.unposted),
    "staged_bytes": (_G, "Compressed images on disk.", lambda one, _: one.staged_bytes),
    "tasks_in_hand": (_G, "Tasks fetched and without an outcome.", lambda _, job: job.in_hand),
    "batch_readiness_ratio": (_G, "Share of the batches that were ready when asked for.", lambda _, job: job.readiness),
    "job_images_per_second": (_G, "Outcomes a second of the job that runs.", lambda _, job: job.images_per_s),
    "last_progress_timestamp_seconds": (_G, "When a task last got an outcome.", lambda one, _: one.moved_at),
    "images_done": (_C, "Images with a result.", lambda one, _: one.totals.get("done", 0)),
    "images_failed": (_C, "Images with an error result.", lambda one, _: one.totals.get("failed", 0)),
    "images_truncated": (_C, "Images whose file ended early.", lambda one, _: one.totals.get("truncated", 0)),
    "images_damaged": (_C, "Images whose file has damage inside.", lambda one, _: one.totals.get("damaged", 0)),
    "tasks_left_to_lease": (_C, "Tasks given up knowingly.", lambda one, _: one.totals.get("left_to_lease", 0)),
    "detections": (_C, "Insects found.", lambda one, _: one.totals.get("detections", 0)),
    "inference_seconds": (_C, "Time spent in inference.", lambda one, _: one.totals.get("inference_s", 0)),
}


def rendered_page(data: bytes) -> bytes:
    """Return the page with its data inside; it needs nothing else."""
    page = files("adc_worker.runtime").joinpath("status_page.html").read_bytes()
    # No </script> and no comment can begin within a script element that has no "<".
    return page.replace(_DATA.encode(), _DATA.encode() + data.replace(b"<", b"\\u003c"))


class Collector:
    def __init__(self, board: Board) -> None:
        self._board = board

    def collect(self) -> Iterable[Metric]:
        """Return all metrics of this moment."""
        ready = GaugeMetricFamily("adc_worker_ready", "Whether /readyz is green.", labels=[])
        ready.add_metric([], 0.0 if self._board.unready() else 1.0)
        yield ready
        for name, (family, text, value) in _METRICS.items():
            metric = family(f"adc_worker_{name}", text, labels=["worker"])
            for one in self._board.snapshots():
                job = one.job if one.job and one.job.ended_at is None else _NO_JOB
                metric.add_metric([str(one.slot)], value(one, job))
            yield metric


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], board: Board) -> None:
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        self.board = board
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(Collector(board))
        self.host_names = frozenset({"localhost", socket.gethostname().lower(), socket.getfqdn().lower()})
        super().__init__(address, _Handler)

    def knows(self, host: str) -> bool:
        """Whether a request's Host is ours; a page elsewhere whose name was made to resolve to us is not."""
        name = ""
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower()
            ipaddress.ip_address(name)
        except ValueError:
            return name in self.host_names
        return True

    def handle_error(self, *_: object) -> None:
        """Write no traceback between the log lines: a reader went away in the middle."""
        _log.debug("status_request_failed", error=repr(sys.exception()))


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = 10.0  # seconds for a request to come

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        board = self.server.board
        if not self.server.knows(self.headers.get("Host", "")):
            self._answer(HTTPStatus.MISDIRECTED_REQUEST, _TEXT, b"not a name of this worker; use its address\n")
        elif path == "/":
            self._answer(HTTPStatus.OK, "text/html; charset=utf-8", rendered_page(board.to_json()))
        elif path == "/snapshot.json":
            self._answer(HTTPStatus.OK, _JSON, board.to_json())
        elif path == "/metrics":
            self._answer(
                HTTPStatus.OK, "text/plain; version=0.0.4; charset=utf-8", generate_latest(self.server.registry)
            )
        elif path == "/livez":
            self._answer(HTTPStatus.OK, _TEXT, b"ok\n")
        elif path == "/readyz":
            reasons = board.unready()
            status = HTTPStatus.SERVICE_UNAVAILABLE if reasons else HTTPStatus.OK
            self._answer(status, _TEXT, "\n".join([*(reasons or ["ok"]), ""]).encode())
        else:
            self._answer(HTTPStatus.NOT_FOUND, _TEXT, b"/, /snapshot.json, /metrics, /livez, /readyz\n")

    def _answer(self, status: HTTPStatus, content_type: str, body: bytes) -> None:
        self.send_response(status)
        for name, value in {**_SECURITY, "Content-Type": content_type, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002 (http.server's name)
        _log.debug("status_request", line=format % arguments)


@contextmanager
def serving(board: Board, address: tuple[str, int]) -> Iterator[None]:
    """Serve `board` at a host and port while the body runs."""
    try:
        server = _Server(address, board)
    except OSError as error:
        raise ConfigurationError(
            f"AMI_STATUS_PORT: cannot listen on {address[0]}:{address[1]}: {error.strerror}"
        ) from error
    thread = threading.Thread(target=server.serve_forever, args=(0.2,), name="status-page", daemon=True)
    thread.start()
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    _log.info("status_page", url=f"http://{host}:{server.server_address[1]}/")
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
