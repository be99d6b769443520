"""The status page, its data, metrics and health over HTTP.

It is read-only. The parent serves it on AMI_STATUS_PORT.
"""

from __future__ import annotations

import ipaddress
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry, generate_latest

from adc_worker.errors import ConfigurationError
from adc_worker.log import get_logger
from adc_worker.status.hub import StatusHub
from adc_worker.status.metrics import Collector
from adc_worker.status.page import rendered_page

_log = get_logger(__name__)

REQUEST_TIMEOUT_S = 10.0  # chosen
STOP_POLL_S = 0.2  # chosen: how long the end of the worker waits for this server

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline';"
    " style-src 'unsafe-inline'; connect-src 'self'; img-src data:; base-uri 'none';"
    " form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
_HTML = "text/html; charset=utf-8"
_JSON = "application/json"
_METRICS = "text/plain; version=0.0.4; charset=utf-8"
_TEXT = "text/plain; charset=utf-8"


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], hub: StatusHub) -> None:
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        self.hub = hub
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(Collector(hub))
        self._own_names = {"localhost", socket.gethostname().lower(), socket.getfqdn().lower()}
        super().__init__(address, _Handler)

    def is_own_host(self, host: str) -> bool:
        """Whether a request names an IP address or a name of ours as its host.

        A page elsewhere whose name was made to resolve to this address may not read the status.
        """
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower()
        except ValueError:
            return False
        return name in self._own_names or _is_ip_address(name)

    def handle_error(self, *_: object) -> None:
        """Log no traceback when a reader goes away in the middle."""
        _log.debug("status_request_failed", error=repr(sys.exception()))


def _is_ip_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = REQUEST_TIMEOUT_S

    def do_GET(self) -> None:
        hub = self.server.hub
        path = self.path.partition("?")[0]
        if not self.server.is_own_host(self.headers.get("Host", "")):
            problem = b"not a name of this worker; use its address\n"
            self._answer(_TEXT, problem, HTTPStatus.MISDIRECTED_REQUEST)
        elif path == "/":
            self._answer(_HTML, rendered_page(hub.status().to_json()))
        elif path == "/snapshot.json":
            self._answer(_JSON, hub.status().to_json())
        elif path == "/metrics":
            self._answer(_METRICS, generate_latest(self.server.registry))
        elif path == "/livez":
            self._answer(_TEXT, b"ok\n")
        elif path == "/readyz":
            self._answer_readiness(hub.unready())
        else:
            paths = b"/, /snapshot.json, /metrics, /livez, /readyz\n"
            self._answer(_TEXT, paths, HTTPStatus.NOT_FOUND)

    def _answer_readiness(self, reasons: list[str]) -> None:
        if not reasons:
            self._answer(_TEXT, b"ok\n")
            return
        lines = [f"{reason}\n" for reason in reasons]
        self._answer(_TEXT, "".join(lines).encode(), HTTPStatus.SERVICE_UNAVAILABLE)

    def _answer(self, content_type: str, body: bytes, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.send_response(status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002 (http.server's name)
        _log.debug("status_request", line=format % arguments)


@contextmanager
def serving(hub: StatusHub, address: tuple[str, int]) -> Iterator[None]:
    """Serve `hub` at a host and port while the body runs."""
    host, port = address
    try:
        server = _Server(address, hub)
    except OSError as error:
        problem = f"AMI_STATUS_PORT: cannot listen on {host}:{port}: {error.strerror}"
        raise ConfigurationError(problem) from error
    thread = threading.Thread(
        target=server.serve_forever,
        args=(STOP_POLL_S,),
        name="status-page",
        daemon=True,
    )
    thread.start()
    shown_host = f"[{host}]" if ":" in host else host
    _log.info("status_page", url=f"http://{shown_host}:{server.server_address[1]}/")
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
