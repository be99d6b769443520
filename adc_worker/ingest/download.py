"""The image client: no token, no cookies, no netrc; streams one URL into a file and never holds an image in memory.

urllib3 rather than httpx because reading large blocks costs a fraction of the CPU (benchmarks/download.py).
"""

from __future__ import annotations

import http.client
import io
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    NewConnectionError,
    ProxyError,
    SSLError,
)
from urllib3.util import parse_url
from urllib3.util.connection import create_connection
from urllib3.util.response import assert_header_parsing

from adc_worker import __version__
from adc_worker.errors import (
    AdcError,
    AddressRefused,
    ConfigurationError,
    HostUnreachable,
    ImageMissing,
    ImageRefused,
    ImageTooLarge,
    ImageUrlUnusable,
    LinkError,
    UrlExpired,
)
from adc_worker.ingest.addresses import AddressPolicy, image_host
from adc_worker.log import get_logger
from adc_worker.planning.policy import DOWNLOADS_MAX
from adc_worker.redaction import knowing, redact

_log = get_logger(__name__)

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 30.0
CANCEL_CHECK_S = 0.5  # a host that says nothing must not keep a turn or a drain waiting
READ_BYTES = 1 << 18
# A memory limit counts the page cache, too, and dirty pages it cannot take back at once: they are written as they come.
WRITE_BACK_BYTES = 8 << 20
REDIRECTS_MAX = 3
# A download that takes half of Antenna's default lease of 300 s (docs/antenna.md) leaves no time for its result.
DOWNLOAD_S = 150.0
_MISSING = frozenset({404, 410})
# Answers that ask for patience, or say that the host or a proxy before it fails: nothing about one image.
_LATER = frozenset({407, 408, 421, 425, 429})
_SERVER_FAILS = 500
# Codings that change the bytes (IANA's registry of content codings, and names that were used before it). Whatever else
# stands in Content-Encoding compresses nothing: aws-chunked, as S3 stores it with an object, a charset, nothing at all.
_COMPRESSING = frozenset(
    {"gzip", "x-gzip", "compress", "x-compress", "deflate", "br", "zstd", "dcb", "dcz", "exi", "pack200-gzip", "bzip2"}
)
# Of an object store's error answer: its code and message come first.
ERROR_BODY_BYTES = 2048
# The exceptions of a connection that never brought an answer.
_NO_ANSWER = (NewConnectionError, ConnectTimeoutError, SSLError, ProxyError)
_this_thread = threading.local()  # its download: until (monotonic seconds), cancelled, policy, seconds of set-up so far


@dataclass(frozen=True, slots=True)
class DownloadStats:
    """Seconds to the first byte of the body and to its last, the bytes of the body, and the seconds of connecting.

    A connection that is new takes names, TCP and TLS; the next download over it does not. `end_told`: whether the host
    says where the body ends. Where it does not, a connection that breaks off looks like the end.
    """

    first_byte_s: float
    total_s: float
    size_bytes: int
    set_up_s: float = 0.0
    end_told: bool = True


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

    def begin(self) -> None:
        """Read the headers; after one that is none the rest is lost, and with it, perhaps, how long the body is."""
        super().begin()
        if self.length is None and not self.chunked:
            assert_header_parsing(self.headers)


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
    """Downloads image URLs; raises ImageError (what the host says of this image) or LinkError (anything else).

    Whatever a host sends, and whatever the libraries below raise on it, ends as one of the two. What the disk raises
    passes unchanged.
    """

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
        response, redirects = self._open(url, urls)
        try:
            if response.status != 200:  # noqa: PLR2004 (the one status that brings an image)
                raise _error_for(response, redirects)
            _check_coding(response)
            first_byte_s = time.monotonic() - started
            is_chunked = "chunked" in response.headers.get("Transfer-Encoding", "").lower()
            end_told = is_chunked or response.length_remaining is not None
            size_bytes = self._copy(response, fd)
        finally:
            _release(response)
        total_s = time.monotonic() - started
        return DownloadStats(first_byte_s, total_s, size_bytes, _this_thread.set_up_s, end_told)

    def _open(self, url: str, urls: list[str]) -> tuple[urllib3.BaseHTTPResponse, int]:
        """Ask for a URL, follow its redirects, and return the answer and how many there were.

        `urls` gets the targets of redirects, which may be signed, too.

        Raises:
            ImageUrlUnusable: the URL that was asked for is none; where a redirect leads is its host's fault.
        """
        response = self._ask(url)
        for redirects in range(REDIRECTS_MAX + 1):
            target = _redirect_target(response)
            if target is None:
                return response, redirects
            _release(response)
            urls.append(target)
            if redirects < REDIRECTS_MAX:
                url = _redirected(url, target)
                urls.append(url)
                response = self._follow(url)
        raise ImageRefused(f"the image host redirects more than {REDIRECTS_MAX} times")

    def _follow(self, url: str) -> urllib3.BaseHTTPResponse:
        """Ask for what a redirect leads to: the host that sent it has answered, and is responsible for its target."""
        try:
            return self._ask(url)
        except ImageUrlUnusable as error:
            raise ImageRefused(f"the image host redirects to something that is no URL: {error}") from error
        except AddressRefused:
            raise
        except HostUnreachable as error:
            raise LinkError(f"the image host redirects to a host that does not answer: {error}") from error

    def _ask(self, url: str) -> urllib3.BaseHTTPResponse:
        image_host(url)
        try:
            # Not decoded: a few kB of gzip would become gigabytes of memory.
            return self._manager(url).request("GET", url, preload_content=False, decode_content=False, redirect=False)
        except AdcError:
            raise
        except _NO_ANSWER as error:
            raise HostUnreachable(f"cannot reach the image host: {_named(error)}") from error
        except Exception as error:
            # Not a list of classes: what a host sends can raise whatever the libraries overlooked.
            if isinstance(error, MemoryError):
                raise
            raise LinkError(f"the image host's answer cannot be read: {_named(error)}") from error

    def _manager(self, url: str) -> urllib3.PoolManager:
        parts = parse_url(url)
        proxy = self._proxies[parts.scheme or ""]
        return proxy if proxy is not None and not proxy_bypass(parts.host or "") else self._direct

    def _copy(self, response: urllib3.BaseHTTPResponse, fd: int) -> int:
        declared = response.length_remaining or 0
        if declared > self._max_bytes:
            raise _too_large(declared, self._max_bytes)
        size_bytes = written_back = 0
        with open(fd, "wb", closefd=False) as file:
            for block in _blocks(response):
                size_bytes += len(block)
                if size_bytes > self._max_bytes:
                    raise _too_large(size_bytes, self._max_bytes)
                file.write(block)
                if size_bytes - written_back >= WRITE_BACK_BYTES:
                    os.posix_fadvise(fd, written_back, 0, os.POSIX_FADV_DONTNEED)  # of dirty pages: start writing them
                    written_back = size_bytes
        return size_bytes


def _blocks(response: urllib3.BaseHTTPResponse) -> Iterator[bytes]:
    """Yield the body as it comes; urllib3 raises IncompleteRead when it ends early."""
    while True:
        try:
            block = response.read1(READ_BYTES)  # what has come: a trickle can be broken off, too
        except AdcError:
            raise
        except Exception as error:
            # As in `_ask`; what the disk raises does not come by here.
            if isinstance(error, MemoryError):
                raise
            raise LinkError(f"download broke off: {_named(error)}") from error
        if not block:
            return
        yield block


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {redact(str(error))}"


def _check_coding(response: urllib3.BaseHTTPResponse) -> None:
    """Refuse bytes that were compressed on the way: opening them takes memory and time that the sender chooses."""
    codings = [word.strip().lower() for word in response.headers.get("Content-Encoding", "").split(",")]
    compressing = [coding for coding in codings if coding in _COMPRESSING]
    if compressing:
        raise ImageRefused(
            f"the image's host sends {compressing[0]!r} coding, though asked for the bytes as they are: turn the"
            " compression of images off at the host or at what stands before it"
        )


def _redirect_target(response: urllib3.BaseHTTPResponse) -> str | None:
    """Return where an answer redirects to; None where it does not, or does not say."""
    return response.get_redirect_location() or None


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
        old = urlsplit(url).scheme
        new = urlsplit(target).scheme
    except ValueError as error:
        raise ImageRefused("the image host redirects to something that is no URL") from error
    if new not in {"https", old}:
        raise ImageRefused(f"the image host redirects from {old} to {new}, which is refused")
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


def _error_for(response: urllib3.BaseHTTPResponse, redirects: int) -> ImageMissing | LinkError:
    """Return the error for an answer that brings no image, with what an object store says in its body.

    "Not found" at the end of a redirect is said of a sign-in page or a portal as well as of the image.
    """
    status = response.status
    said = f"the image's host answered {status}"
    if redirects:
        said = f"{said} after {redirects} redirects"
    if status in _MISSING and not redirects:
        return ImageMissing(f"{said}: the image does not exist")
    if status in _LATER or status >= _SERVER_FAILS:
        return LinkError(said, _retry_after_s(response))
    body = _error_body(response)
    code = re.search(r"<Code>([A-Za-z0-9.]{1,60})</Code>", body)
    details = [code[1]] if code else []
    region = response.headers.get("x-amz-bucket-region", "")
    if 300 <= status < 400:  # noqa: PLR2004 (with an address it would have been followed)
        details.append("no address to go to")
        if re.fullmatch(r"[a-z0-9-]{1,40}", region):
            details.append(f"the bucket is in region {region}: the image URLs must name it")
    if details:
        said = f"{said} ({', '.join(details)})"
    if re.search(r"expired", body, re.IGNORECASE):
        return UrlExpired(f"{said}: what signed its URL has expired")
    return ImageRefused(said, _retry_after_s(response))


def _error_body(response: urllib3.BaseHTTPResponse) -> str:
    """Return the start of an error answer; nothing where it cannot be read, the status says enough then."""
    try:
        body = response.read(ERROR_BODY_BYTES, decode_content=False)
    except Exception as error:  # noqa: BLE001 (as in `_ask`: whatever the libraries raise on what a host sends)
        _log.debug("error_answer_unreadable", error=_named(error))
        return ""
    return body.decode("utf-8", errors="replace")


def _retry_after_s(response: urllib3.BaseHTTPResponse) -> float:
    """Return the seconds that a host asks for, as a number or as a date; 0 where it says nothing that can be read."""
    try:
        return urllib3.Retry().parse_retry_after(response.headers.get("Retry-After", ""))
    except (HTTPError, ValueError, OverflowError):  # the last two for numbers and years without end
        return 0.0
