"""Serves the photographs of jobs over HTTP, as slowly and as badly as a test wants."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from aiohttp import web

from adc_worker.devserver.state import Capture

CHUNK_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class ImageFault:
    """What goes wrong with one file."""

    status: int | None = None  # answer with this status instead
    html: bool = False  # send a page, with status 200, where the image should be
    truncate_bytes: int | None = None  # promise the whole file, send this much of it, close the connection


@dataclass(slots=True)
class ImageHost:
    latency_s: float = 0.0  # before each answer
    bytes_per_s: float | None = None  # of each connection
    faults: dict[str, ImageFault] = field(default_factory=dict)  # by file name

    async def serve(self, request: web.Request, capture: Capture) -> web.StreamResponse:
        await asyncio.sleep(self.latency_s)
        fault = self.faults.get(request.match_info["name"], ImageFault())
        if fault.status is not None:
            return web.Response(status=fault.status, text="fault of the desk")
        if fault.html:
            return web.Response(text="<html><body>Sign in</body></html>", content_type="text/html")
        if capture.file is None or capture.size_bytes is None:
            return web.Response(status=404, text="no such image")
        if self.bytes_per_s is None and fault.truncate_bytes is None:
            return web.FileResponse(capture.file)  # by sendfile
        return await self._stream(request, await asyncio.to_thread(capture.file.read_bytes), fault.truncate_bytes)

    async def _stream(self, request: web.Request, content: bytes, limit_bytes: int | None) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "image/jpeg", "Content-Length": str(len(content))})
        await response.prepare(request)
        sent, started_s = content[:limit_bytes], time.monotonic()
        for start in range(0, len(sent), CHUNK_BYTES):
            await response.write(sent[start : start + CHUNK_BYTES])
            if self.bytes_per_s is not None:
                due_s = started_s + min(start + CHUNK_BYTES, len(sent)) / self.bytes_per_s
                await asyncio.sleep(due_s - time.monotonic())
        if limit_bytes is not None and request.transport is not None:
            request.transport.close()
        return response
