"""Serves the photographs of jobs over HTTP, as slowly and as badly as a test wants."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from aiohttp import web

if TYPE_CHECKING:
    from collections.abc import Iterator

    from adc_worker.devserver.state import Capture

CHUNK_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class ImageFault:
    """What goes wrong with one file.

    Attributes:
        status: answer with this status instead.
        html: send a page, with status 200, where the image should be.
        truncate_bytes: promise the whole file, send this much of it, close the connection.
    """

    status: int | None = None
    html: bool = False
    truncate_bytes: int | None = None


@dataclass(slots=True)
class ImageHost:
    """Serves `/images/<capture id>/<file name>`; faults are looked up by file name."""

    latency_s: float = 0.0  # before each answer
    bytes_per_s: float | None = None  # of each connection
    faults: dict[str, ImageFault] = field(default_factory=dict)

    async def serve(self, request: web.Request, capture: Capture | None) -> web.StreamResponse:
        await asyncio.sleep(self.latency_s)
        name = request.match_info["name"]
        fault = self.faults.get(name, ImageFault())
        if fault.status is not None:
            return web.Response(status=fault.status, text="fault of the desk")
        if fault.html:
            return web.Response(text="<html><body>Sign in</body></html>", content_type="text/html")
        file = _file_of(capture, name)
        if file is None:
            return web.Response(status=404, text="no such image")
        if self.bytes_per_s is None and fault.truncate_bytes is None:
            return web.FileResponse(file)  # by sendfile
        return await self._stream(request, file, fault.truncate_bytes)

    async def _stream(self, request: web.Request, file: Path, limit_bytes: int | None) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "image/jpeg", "Content-Length": str(_size_bytes(file))})
        await response.prepare(request)
        sent_bytes, started_s = 0, time.monotonic()
        for chunk in _chunks(file, limit_bytes):
            await response.write(chunk)
            sent_bytes += len(chunk)
            if self.bytes_per_s is not None:
                await asyncio.sleep(started_s + sent_bytes / self.bytes_per_s - time.monotonic())
        if limit_bytes is not None and request.transport is not None:
            request.transport.close()
        return response


def _size_bytes(file: Path) -> int:
    return file.stat().st_size


def _file_of(capture: Capture | None, name: str) -> Path | None:
    file = capture.file if capture is not None else None
    return file if file is not None and file.name == name and file.is_file() else None


def _chunks(file: Path, limit_bytes: int | None) -> Iterator[bytes]:
    left_bytes = _size_bytes(file) if limit_bytes is None else limit_bytes
    with file.open("rb") as stream:
        while left_bytes > 0 and (chunk := stream.read(min(CHUNK_BYTES, left_bytes))):
            left_bytes -= len(chunk)
            yield chunk
