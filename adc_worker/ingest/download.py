"""The image client: no token, no cookies; streams one URL into a file and never holds an image in memory.

urllib3 rather than httpx because reading large blocks costs a fraction of the CPU (benchmarks/download.py).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

import urllib3
from urllib3.exceptions import HTTPError
from urllib3.util import parse_url

from adc_worker import __version__
from adc_worker.errors import ImageError, ImageMissing, ImageTooLarge, LinkError
from adc_worker.ingest import page_cache
from adc_worker.redaction import redact

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 30.0
READ_BYTES = 1 << 18
WRITE_BACK_BYTES = 8 << 20
REDIRECTS_MAX = 3
CONNECTIONS_PER_HOST = 32
_MISSING = frozenset({404, 410})


@dataclass(frozen=True, slots=True)
class DownloadStats:
    """Seconds to the first byte of the body and to its last, and the bytes of the body."""

    first_byte_s: float
    total_s: float
    size_bytes: int


class ImageClient:
    """Downloads image URLs; raises ImageError (the image's fault) or LinkError (anything else)."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        options: dict[str, Any] = {
            "maxsize": CONNECTIONS_PER_HOST,
            "retries": False,
            "timeout": urllib3.Timeout(connect=CONNECT_TIMEOUT_S, read=READ_TIMEOUT_S),
            "headers": {"User-Agent": f"adc-worker/{__version__}", "Accept-Encoding": "identity", "Accept": "image/*"},
        }
        self._direct = urllib3.PoolManager(**options)
        self._proxies = {
            scheme: _proxy_manager(url, options) for scheme, url in getproxies().items() if scheme in {"http", "https"}
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        for manager in (self._direct, *self._proxies.values()):
            for key in manager.pools.keys():  # noqa: SIM118 (no mapping to iterate over)
                manager.pools[key].close()  # clear() leaves that to the garbage collector
            manager.clear()

    def download(self, url: str, fd: int, cancelled: Callable[[], bool]) -> DownloadStats:
        """Write the body of `url` to the file descriptor `fd`."""
        started = time.monotonic()
        response = self._open(url)
        try:
            if response.status != 200:  # noqa: PLR2004 (the one status that brings an image)
                raise _error_for(response.status)
            first_byte_s = time.monotonic() - started
            size_bytes = self._copy(response, fd, cancelled)
        except (HTTPError, TimeoutError) as error:
            raise LinkError(f"download broke off: {type(error).__name__}: {error}") from error
        finally:
            response.close()  # and its connection, unless the body was read to its end: then that is back in the pool
        return DownloadStats(first_byte_s, time.monotonic() - started, size_bytes)

    def _open(self, url: str) -> urllib3.BaseHTTPResponse:
        for _hop in range(REDIRECTS_MAX + 1):
            try:
                response = self._pool(url).request("GET", url, preload_content=False, redirect=False)
            except ValueError as error:  # urllib3's LocationValueError is one
                raise ImageError(f"not a usable image URL: {redact(str(error))}") from error
            except (HTTPError, TimeoutError) as error:
                raise LinkError(f"cannot reach the image host: {type(error).__name__}: {error}") from error
            target = response.get_redirect_location()
            if not target:
                return response
            response.close()
            url = _redirected(url, target)
        raise LinkError(f"the image host redirects more than {REDIRECTS_MAX} times")

    def _pool(self, url: str) -> urllib3.PoolManager:
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"}:
            raise ValueError("neither http nor https")
        proxy = self._proxies.get(parts.scheme)
        return proxy if proxy is not None and not proxy_bypass(parts.hostname or "") else self._direct

    def _copy(self, response: urllib3.BaseHTTPResponse, fd: int, cancelled: Callable[[], bool]) -> int:
        declared = response.length_remaining or 0
        if declared > self._max_bytes:
            raise _too_large(declared, self._max_bytes)
        size_bytes = written_back = 0
        while block := response.read1(READ_BYTES):  # what has come: a trickle can be broken off, too
            size_bytes += len(block)
            if size_bytes > self._max_bytes:
                raise _too_large(size_bytes, self._max_bytes)
            if cancelled():
                raise LinkError("download cancelled")
            _write_all(fd, block)
            if size_bytes - written_back >= WRITE_BACK_BYTES:
                page_cache.write_back(fd, written_back, size_bytes)
                written_back = size_bytes
        return size_bytes  # urllib3 raises IncompleteRead when the body ends early


def _write_all(fd: int, block: bytes) -> None:
    rest = memoryview(block)
    while rest:
        rest = rest[os.write(fd, rest) :]


def _too_large(size_bytes: int, max_bytes: int) -> ImageTooLarge:
    return ImageTooLarge(
        f"the image has at least {size_bytes} bytes; this worker takes {max_bytes} (AMI_IMAGE_MAX_BYTES)"
    )


def _redirected(url: str, location: str) -> str:
    """Return where a redirect leads; its faults are the host's, not the image's."""
    try:
        target = urljoin(url, location)
        old, new = urlsplit(url).scheme, urlsplit(target).scheme
    except ValueError as error:
        raise LinkError("the image host redirects to something that is no URL") from error
    if new not in {"https", old}:
        raise LinkError(f"the image host redirects from {old} to {new}, which is refused")
    return target


def _proxy_manager(url: str, options: dict[str, Any]) -> urllib3.ProxyManager:
    proxy = parse_url(url if "://" in url else f"http://{url}")
    headers = urllib3.make_headers(proxy_basic_auth=unquote(proxy.auth)) if proxy.auth else None
    return urllib3.ProxyManager(proxy.url, proxy_headers=headers, **options)


def _error_for(status: int) -> ImageMissing | LinkError:
    if status in _MISSING:
        return ImageMissing(f"the image's host answered {status}: the image does not exist")
    return LinkError(f"the image's host answered {status}")
