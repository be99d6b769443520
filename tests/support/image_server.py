"""A tiny HTTP server on 127.0.0.1 that answers as told and remembers what it was asked. Also plays a proxy."""

from __future__ import annotations

import ssl
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer.

    Attributes:
        length: what Content-Length claims; the truth when None.
        chunked: send in chunks, without a length.
        hold: sent after the first byte of the body; the rest follows when it is set.
        bytes_per_s: how fast the body goes, in a hundred pieces; at once when None.
    """

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    length: str | None = None
    chunked: bool = False
    hold: threading.Event | None = None
    bytes_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class Request:
    target: str
    headers: dict[str, str]
    client_port: int


class BusyServer(ThreadingHTTPServer):
    """Takes many connections at once; of more than may wait the kernel drops some, which come again a second later."""

    request_queue_size = 128


class ImageServer:
    """Routes by request target (a whole URL where it is a proxy); what is unknown is 404."""

    def __init__(self, tls: ssl.SSLContext | None = None, port: int = 0) -> None:
        self.replies: dict[str, Reply | Callable[[], Reply]] = {}
        self.requests: list[Request] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                server._answer(self)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self._http = BusyServer(("127.0.0.1", port), Handler)
        self._http.daemon_threads = False  # closing waits for them
        self._scheme = "http"
        if tls is not None:
            self._scheme = "https"
            # The handshake belongs to the connection's own thread: a client that breaks it off must not end the server.
            self._http.socket = tls.wrap_socket(self._http.socket, server_side=True, do_handshake_on_connect=False)
        self._http.handle_error = lambda *_: None  # type: ignore[method-assign]
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._http.server_address[1])

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"{self._scheme}://{host}:{self.port}{path}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        self.requests.append(Request(handler.path, dict(handler.headers), handler.client_address[1]))
        reply = self.replies.get(handler.path, Reply(b"no such image", status=404))
        reply = reply if isinstance(reply, Reply) else reply()
        handler.send_response(reply.status)
        for name, value in reply.headers.items():
            handler.send_header(name, value)
        if reply.chunked:
            handler.send_header("Transfer-Encoding", "chunked")
        else:
            handler.send_header("Content-Length", reply.length or str(len(reply.body)))
        handler.end_headers()
        try:
            self._send_body(handler, reply)
        except (BrokenPipeError, ConnectionResetError):
            handler.close_connection = True  # the client had enough
        if reply.length is not None:
            handler.close_connection = True

    def _send_body(self, handler: BaseHTTPRequestHandler, reply: Reply) -> None:
        parts = [reply.body] if reply.hold is None else [reply.body[:1], reply.body[1:]]
        if reply.bytes_per_s is not None:
            size = 1 + len(reply.body) // 100
            parts = [reply.body[start : start + size] for start in range(0, len(reply.body), size)]
        for index, part in enumerate(parts):
            if reply.bytes_per_s is not None:
                time.sleep(len(part) / reply.bytes_per_s)
            if index and reply.hold is not None:
                reply.hold.wait()
            if reply.chunked:
                handler.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
            else:
                handler.wfile.write(part)
        if reply.chunked:
            handler.wfile.write(b"0\r\n\r\n")
