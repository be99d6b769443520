"""The image client: no token, no cookies, no netrc; streams one URL into a file and never holds an image in memory.

urllib3 rather than httpx because reading large blocks costs a fraction of the CPU (benchmarks/download.py).
"""

from __future__ import annotations

import http.client
import io
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError, NewConnectionError
from urllib3.util import parse_url
from urllib3.util.connection import create_connection

from adc_worker import __version__
from adc_worker.errors import ConfigurationError, ImageError, ImageMissing, ImageTooLarge, LinkError
from adc_worker.ingest.addresses import AddressPolicy
from adc_worker.redaction import knowing, redact
from adc_worker.tuning.policy import DOWNLOADS_MAX

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 30.0
CANCEL_CHECK_S = 0.5  # a host that says nothing must not keep a turn or a drain waiting
READ_BYTES = 1 << 18
# A memory limit counts the page cache, too, and dirty pages it cannot take back at once: they are written as they come.
WRITE_BACK_BYTES = 8 << 20
REDIRECTS_MAX = 3
# A download that takes half of Antenna's default lease of 300 s (contract, "NATS") leaves no time for its result.
DOWNLOAD_S = 150.0
_MISSING = frozenset({404, 410})
_this_thread = threading.local()  # its download: until (monotonic seconds), cancelled, policy, seconds of set-up so far


@dataclass(frozen=True, slots=True)
class DownloadStats:
    """Seconds to the first byte of the body and to its last, the bytes of the body, and the seconds of connecting.

    A connection that is new takes names, TCP and TLS; the next download over it does not.
    """

    first_byte_s: float
    total_s: float
    size_bytes: int
    set_up_s: float = 0.0


class _UntilDeadline(io.RawIOBase):
    """What a socket receives, headers and all: timeouts of single reads let a host trickle for ever.

    The bytes are not read by `received`, which a timeout makes useless; it only keeps the socket open.
    """

    def __init__(self, sock: socket.socket, received: io.RawIOBase) -> None:
        self._sock = sock
        self._received = received

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        until = min(_this_thread.until, time.monotonic() + READ_TIMEOUT_S)
        while not _this_thread.cancelled():
            left_s = until - time.monotonic()
            if left_s <= 0:
                raise LinkError("the image did not come in time: its host, or the link to it, is too slow")
            self._sock.settimeout(min(CANCEL_CHECK_S, left_s))
            with suppress(TimeoutError):
                return self._sock.recv_into(buffer)
        raise LinkError("download cancelled")

    def close(self) -> None:
        self._received.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self.fp = io.BufferedReader(_UntilDeadline(sock, self.fp.detach()))


class _Connection(HTTPConnection):
    """Connects to an address that the policy has seen, not to a name that may mean another one a moment later."""

    response_class = _Response

    def connect(self) -> None:
        started = time.monotonic()
        try:
            super().connect()
        finally:
            _this_thread.set_up_s += time.monotonic() - started

    def _new_conn(self) -> socket.socket:
        if self.proxy is not None:
            return super()._new_conn()
        for address in _this_thread.policy.resolve(self.host):
            try:
                return create_connection((address, self.port), self.timeout, socket_options=self.socket_options)
            except OSError as error:
                failure = NewConnectionError(self, f"{address}: {error}")
        raise failure


class _SecureConnection(_Connection, HTTPSConnection):
    """The certificate is still held against the name."""


class _Pool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Connection


class _SecurePool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _SecureConnection


class ImageClient:
    """Downloads image URLs; raises ImageError (the image's fault) or LinkError (anything else)."""

    def __init__(self, max_bytes: int, policy: AddressPolicy, download_s: float = DOWNLOAD_S) -> None:
        self._max_bytes = max_bytes
        self._policy = policy
        self._download_s = download_s
        options: dict[str, Any] = {
            "maxsize": DOWNLOADS_MAX,
            "block": True,  # no host sees more connections of this process than that
            "retries": False,
            "timeout": urllib3.Timeout(connect=CONNECT_TIMEOUT_S, read=READ_TIMEOUT_S),
            "headers": {"User-Agent": f"adc-worker/{__version__}", "Accept-Encoding": "identity", "Accept": "image/*"},
        }
        self._direct = urllib3.PoolManager(**options)
        proxies = {
            scheme: _proxy_manager(scheme, url, options)
            for scheme, url in getproxies().items()
            if scheme in {"http", "https", "all"}
        }
        self._proxies = {scheme: proxies.get(scheme, proxies.get("all")) for scheme in ("http", "https")}
        self._managers = [self._direct, *proxies.values()]
        for manager in self._managers:
            manager.pool_classes_by_scheme = {"http": _Pool, "https": _SecurePool}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        for manager in self._managers:
            for key in manager.pools.keys():  # noqa: SIM118 (no mapping to iterate over)
                manager.pools[key].close()  # clear() leaves that to the garbage collector
            manager.clear()

    def download(self, url: str, fd: int, cancelled: Callable[[], bool]) -> DownloadStats:
        """Write the body of `url` to the file descriptor `fd`; no error tells more of the URL than may be shown."""
        with knowing(url) as urls:
            return self._download(url, fd, cancelled, urls)

    def _download(self, url: str, fd: int, cancelled: Callable[[], bool], urls: list[str]) -> DownloadStats:
        started = time.monotonic()
        _this_thread.until, _this_thread.cancelled = started + self._download_s, cancelled
        _this_thread.policy, _this_thread.set_up_s = self._policy, 0.0
        response = self._open(url, urls)
        try:
            if response.status != 200:  # noqa: PLR2004 (the one status that brings an image)
                raise _error_for(response)
            if (coding := response.headers.get("Content-Encoding", "identity").lower()) != "identity":
                raise LinkError(
                    f"the image's host sends {coding[:20]!r} coding, though asked for the bytes as they are"
                )
            first_byte_s = time.monotonic() - started
            size_bytes = self._copy(response, fd)
        except (HTTPError, TimeoutError) as error:
            raise LinkError(redact(f"download broke off: {type(error).__name__}: {error}")) from error
        finally:
            _release(response)
        return DownloadStats(first_byte_s, time.monotonic() - started, size_bytes, _this_thread.set_up_s)

    def _open(self, url: str, urls: list[str]) -> urllib3.BaseHTTPResponse:
        """Follow redirects; `urls` gets their targets, which may be signed, too."""
        for _hop in range(REDIRECTS_MAX + 1):
            try:
                # Not decoded: a few kB of gzip would become gigabytes of memory.
                response = self._pool(url).request(
                    "GET", url, preload_content=False, decode_content=False, redirect=False
                )
            except ValueError as error:  # urllib3's LocationValueError is one
                raise ImageError(f"not a usable image URL: {redact(str(error))}") from error
            except (HTTPError, TimeoutError) as error:
                raise LinkError(redact(f"cannot reach the image host: {type(error).__name__}: {error}")) from error
            target = response.get_redirect_location()
            if not target:
                return response
            _release(response)
            urls.append(target)
            url = _redirected(url, target)
            urls.append(url)
        raise LinkError(f"the image host redirects more than {REDIRECTS_MAX} times")

    def _pool(self, url: str) -> urllib3.PoolManager:
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"}:
            raise ValueError("it does not start with http:// or https://")
        proxy = self._proxies[parts.scheme]
        return proxy if proxy is not None and not proxy_bypass(parts.hostname or "") else self._direct

    def _copy(self, response: urllib3.BaseHTTPResponse, fd: int) -> int:
        declared = response.length_remaining or 0
        if declared > self._max_bytes:
            raise _too_large(declared, self._max_bytes)
        size_bytes = written_back = 0
        with open(fd, "wb", closefd=False) as file:
            while block := response.read1(READ_BYTES):  # what has come: a trickle can be broken off, too
                size_bytes += len(block)
                if size_bytes > self._max_bytes:
                    raise _too_large(size_bytes, self._max_bytes)
                file.write(block)
                if size_bytes - written_back >= WRITE_BACK_BYTES:
                    os.posix_fadvise(fd, written_back, 0, os.POSIX_FADV_DONTNEED)  # of dirty pages: start writing them
                    written_back = size_bytes
        return size_bytes  # urllib3 raises IncompleteRead when the body ends early


def _release(response: urllib3.BaseHTTPResponse) -> None:
    """Give the connection back, closed unless the body was read to its end."""
    response.close()
    response.release_conn()


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


def _proxy_manager(scheme: str, url: str, options: dict[str, Any]) -> urllib3.ProxyManager:
    problem = f"{scheme.upper()}_PROXY must be the URL of an http proxy, such as http://proxy.example.org:3128"
    try:
        proxy = parse_url(url if "://" in url else f"http://{url}")
    except ValueError:
        raise ConfigurationError(problem) from None
    if proxy.scheme not in {"http", "https"} or not proxy.host:
        raise ConfigurationError(problem)
    headers = urllib3.make_headers(proxy_basic_auth=unquote(proxy.auth)) if proxy.auth else None
    return urllib3.ProxyManager(proxy.url, proxy_headers=headers, **options)


def _error_for(response: urllib3.BaseHTTPResponse) -> ImageMissing | LinkError:
    if response.status in _MISSING:
        return ImageMissing(f"the image's host answered {response.status}: the image does not exist")
    return LinkError(f"the image's host answered {response.status}", _retry_after_s(response))


def _retry_after_s(response: urllib3.BaseHTTPResponse) -> float:
    """Return the seconds that a host asks for, as a number or as a date; 0 where it says nothing that can be read."""
    try:
        return urllib3.Retry().parse_retry_after(response.headers.get("Retry-After", ""))
    except (HTTPError, ValueError, OverflowError):  # the last two for numbers and years without end
        return 0.0
