"""A proxy in front of Antenna that fails as told: it refuses, holds, cuts or answers with another status."""

from __future__ import annotations

import http
import http.client
import json
import re
import socket
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import TracebackType
from typing import Literal, Self
from urllib.parse import urlsplit

from tests.support.image_server import BusyServer


@dataclass(frozen=True)
class Answer:
    """What the gate answers in Antenna's place, with these very words.

    `forwards`: Antenna has done what was asked all the same.
    """

    status: int
    content: bytes
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)
    forwards: bool = False


# hold: forwarded only once released; withhold: forwarded, answered never; reset: neither; cut: half an answer.
Fault = Literal["hold", "withhold", "reset", "cut"] | int | Answer
INVALID_TOKEN = Answer(401, b'{"detail":"Invalid token."}')
FORBIDDEN = Answer(403, b'{"detail":"You do not have permission to perform this action."}')
TOO_LARGE = Answer(413, b"<html><title>413 Request Entity Too Large</title></html>", "text/html")
BODY_SHOWN = b"<html>fault of the gate</html>"


class Gate:
    """Forwards to `upstream`. `fault` is asked for every request, by method and last word of the path.

    `job_fault` is asked before it where the path names a job, by the same words and the job's number. A request body
    above `max_body_bytes` is answered with 413, as a proxy does.
    """

    def __init__(self, upstream: str) -> None:
        self.fault: Callable[[str], Fault | None] = lambda _route: None
        self.job_fault: Callable[[str, int], Fault | None] = lambda _route, _job_id: None
        self.max_body_bytes: int | None = None
        self.released = threading.Event()
        self.held: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        self.under_way: Counter[str] = Counter()
        self.tasks_handed_out: set[str] = set()  # images in the answers to POST tasks, whether they arrived or not
        self._upstream = urlsplit(upstream)
        gate = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                gate._serve(self)

            do_POST = do_GET  # noqa: N815 (named by http.server)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self._http = BusyServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = False  # closing waits for them
        self._http.handle_error = lambda *_: None  # type: ignore[method-assign]  # a worker that is killed resets
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._http.server_address[1]}"

    @property
    def api_url(self) -> str:
        return f"http://{self.address}{self._upstream.path}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.released.set()
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def open(self) -> None:
        """Let everything through from now on, also what is held."""
        self.fault = lambda _route: None
        self.job_fault = lambda _route, _job_id: None
        self.released.set()

    def died_on_the_way(self, journal: Path, processed: Collection[str]) -> set[str]:
        """Return images whose tasks were handed out to a worker that was killed before it could record them."""
        known: set[str] = set()
        if journal.exists():
            with closing(sqlite3.connect(f"file:{journal}?mode=ro", uri=True)) as db:
                tables = db.execute(
                    "SELECT name FROM sqlite_master WHERE name IN ('adc_task', 'adc_finished')"
                ).fetchall()
                for (table,) in tables:
                    known.update(row[0] for row in db.execute(f"SELECT image_id FROM {table}"))  # noqa: S608 (ours)
        return self.tasks_handed_out - known - set(processed)

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        word = urlsplit(handler.path).path.rstrip("/").rsplit("/", 1)[-1]
        route = f"{handler.command} {'job' if word.isdecimal() else word}"
        self.requests[route] += 1
        self.under_way[route] += 1
        try:
            self._follow(handler, route, body)
        finally:
            self.under_way[route] -= 1

    def _follow(self, handler: BaseHTTPRequestHandler, route: str, body: bytes) -> None:
        named_job = re.search(r"/jobs/(\d+)/", urlsplit(handler.path).path)
        fault = self.job_fault(route, int(named_job[1])) if named_job else None
        fault = fault or self.fault(route)
        if self.max_body_bytes is not None and len(body) > self.max_body_bytes:
            fault = TOO_LARGE
        if isinstance(fault, Answer):
            if fault.forwards:
                self._forward(handler, body)
            _answer(handler, fault.status, fault.content, fault.content_type, headers=fault.headers)
            return
        if isinstance(fault, int):
            _answer(handler, fault, BODY_SHOWN, "text/html")
            return
        if fault in {"hold", "withhold"}:
            answer = self._forward(handler, body) if fault == "withhold" else None
            self.held[route] += 1
            self.released.wait()
            if answer is not None:
                _cut(handler)
                return
        if fault == "reset":
            _cut(handler)
            return
        status, content, content_type = self._forward(handler, body)
        if route == "POST tasks" and status == http.HTTPStatus.OK:
            self.tasks_handed_out.update(task["image_id"] for task in json.loads(content)["tasks"])
        _answer(
            handler, status, content[: len(content) // 2] if fault == "cut" else content, content_type, len(content)
        )
        if fault == "cut":
            _cut(handler)

    def _forward(self, handler: BaseHTTPRequestHandler, body: bytes) -> tuple[int, bytes, str]:
        connection = http.client.HTTPConnection(self._upstream.netloc, timeout=60)
        try:
            names = ("Authorization", "Content-Type", "User-Agent")
            headers = {name: value for name in names if (value := handler.headers.get(name))}
            target = (
                urlsplit(handler.path)._replace(scheme="", netloc="").geturl()
            )  # where it is a proxy, it gets a URL
            connection.request(handler.command, target, body or None, headers)
            response = connection.getresponse()
            return response.status, response.read(), response.headers.get("Content-Type", "")
        finally:
            connection.close()


def _answer(
    handler: BaseHTTPRequestHandler,
    status: int,
    content: bytes,
    content_type: str,
    length: int | None = None,
    headers: Mapping[str, str] | None = None,
) -> None:
    if status == http.HTTPStatus.NO_CONTENT:
        content = b""  # what came behind it would be read as the next answer, and that one's tasks would be lost
    try:
        handler.send_response(status)
        handler.send_header("Content-Type", content_type)
        for name, value in (headers or {}).items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(content) if length is None else length))
        handler.end_headers()
        handler.wfile.write(content)
    except (BrokenPipeError, ConnectionResetError):
        handler.close_connection = True  # the worker was killed


def _cut(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True
    try:
        handler.connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # the worker was killed
