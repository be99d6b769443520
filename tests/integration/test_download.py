"""Downloads over real HTTP: what reaches the disk, whose fault a failure is, and what is asked of the image's host."""

from __future__ import annotations

import gzip
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from email.utils import formatdate
from typing import TYPE_CHECKING, Any

import pytest
import trustme

from adc_worker.errors import (
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
from adc_worker.ingest.addresses import AddressPolicy
from adc_worker.ingest.download import DownloadStats, ImageClient, _redirected
from adc_worker.planning.policy import DOWNLOADS_MAX
from tests.support.image_server import ImageServer, Reply
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MAX_BYTES = 3_000_000
NEAR = AddressPolicy("127.0.0.1")
BODY = bytes(range(256)) * 4096  # one MiB
PATIENCE_S = 20.0

Fetch = Callable[..., tuple[bytes, DownloadStats]]


@pytest.fixture(autouse=True)
def _no_proxy_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture
def server() -> Iterator[ImageServer]:
    with ImageServer() as images:
        yield images


@pytest.fixture
def fetch(tmp_path: Path, server: ImageServer) -> Iterator[Fetch]:
    """Download a path of the server's, or a whole URL, and return the file's bytes."""
    with ImageClient(MAX_BYTES, NEAR) as client:

        def download(where: str, cancelled: Callable[[], bool] = lambda: False) -> tuple[bytes, DownloadStats]:
            url = server.url(where) if where.startswith("/") else where
            fd = os.open(tmp_path / "body", os.O_CREAT | os.O_RDWR | os.O_TRUNC)
            try:
                stats = client.download(url, fd, cancelled)
            finally:
                os.close(fd)
            return (tmp_path / "body").read_bytes(), stats

        yield download


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_reaches_the_file(server: ImageServer, fetch: Fetch, *, chunked: bool) -> None:
    """Byte for byte, with a length or without."""
    server.replies["/a.jpg"] = Reply(BODY, chunked=chunked)
    body, stats = fetch("/a.jpg")
    assert body == BODY
    assert stats.size_bytes == len(BODY)
    assert 0 < stats.first_byte_s <= stats.total_s
    assert stats.end_told


def test_a_body_whose_connection_ends_with_it_reaches_the_file(server: ImageServer, fetch: Fetch) -> None:
    """The socket is closed on paper before it is read."""
    server.replies["/a.jpg"] = Reply(BODY, headers={"Connection": "close"})
    assert fetch("/a.jpg")[0] == BODY


def test_only_what_is_needed_is_said(server: ImageServer, fetch: Fetch) -> None:
    """Bytes as they are; no token, no cookie, not even one the host set before."""
    server.replies["/a.jpg"] = Reply(b"x", headers={"Set-Cookie": "session=1"})
    fetch("/a.jpg")
    fetch("/a.jpg")
    for request in server.requests:
        assert set(request.headers) == {"Host", "User-Agent", "Accept", "Accept-Encoding"}
        assert request.headers["Accept-Encoding"] == "identity"
        assert request.headers["User-Agent"].startswith("adc-worker/")


def test_a_connection_is_used_again(server: ImageServer, fetch: Fetch) -> None:
    """After whole bodies, with a length or in chunks."""
    server.replies["/a.jpg"] = Reply(BODY)
    server.replies["/b.jpg"] = Reply(BODY, chunked=True)
    for path in ("/a.jpg", "/b.jpg", "/a.jpg"):
        fetch(path)
    assert len({request.client_port for request in server.requests}) == 1


@pytest.mark.parametrize("status", [404, 410])
def test_a_missing_image_is_the_images_fault(server: ImageServer, fetch: Fetch, status: int) -> None:
    """Nobody needs to try again."""
    server.replies["/a.jpg"] = Reply(b"gone", status=status)
    with pytest.raises(ImageMissing, match=str(status)):
        fetch("/a.jpg")


@pytest.mark.parametrize("status", [204, 206, 304, 401, 403, 429, 500, 503])
def test_every_other_status_is_the_links_fault(server: ImageServer, fetch: Fetch, status: int) -> None:
    """It may be different later."""
    server.replies["/a.jpg"] = Reply(b"" if status in {204, 304} else b"no", status=status)
    with pytest.raises(LinkError, match=str(status)):
        fetch("/a.jpg")


@pytest.mark.parametrize("chunked", [False, True])
def test_an_answer_that_was_not_read_does_not_spoil_the_next(
    server: ImageServer, fetch: Fetch, *, chunked: bool
) -> None:
    """Its connection is not used again, however its end is told."""
    server.replies["/a.jpg"] = Reply(BODY)
    server.replies["/error"] = Reply(BODY, status=500, chunked=chunked)
    for _round in range(5):
        with pytest.raises(LinkError, match="500"):
            fetch("/error")
        assert fetch("/a.jpg")[0] == BODY


def test_too_many_bytes_are_refused_before_they_come(server: ImageServer, fetch: Fetch, tmp_path: Path) -> None:
    """By Content-Length, with both numbers."""
    server.replies["/a.jpg"] = Reply(b"x", length=str(MAX_BYTES + 1))
    with pytest.raises(ImageTooLarge, match=f"{MAX_BYTES + 1} bytes; this worker takes {MAX_BYTES} "):
        fetch("/a.jpg")
    assert (tmp_path / "body").stat().st_size == 0


def test_too_many_bytes_are_refused_while_they_come(server: ImageServer, fetch: Fetch, tmp_path: Path) -> None:
    """Without a length the stream is cut at the limit."""
    server.replies["/a.jpg"] = Reply(BODY * 4, chunked=True)
    with pytest.raises(ImageTooLarge, match=f"takes {MAX_BYTES} "):
        fetch("/a.jpg")
    assert (tmp_path / "body").stat().st_size <= MAX_BYTES


def test_exactly_the_limit_is_taken(server: ImageServer, fetch: Fetch) -> None:
    """The limit is the largest that is accepted."""
    server.replies["/a.jpg"] = Reply(bytes(MAX_BYTES))
    assert fetch("/a.jpg")[1].size_bytes == MAX_BYTES


def test_a_body_that_ends_early_is_the_links_fault(server: ImageServer, fetch: Fetch) -> None:
    """A truncated download is not a truncated photograph."""
    server.replies["/a.jpg"] = Reply(BODY, length=str(len(BODY) + 1))
    with pytest.raises(LinkError, match="broke off"):
        fetch("/a.jpg")


@pytest.mark.parametrize("length", ["abc", "-1", "5, 6", "1, 1"])
def test_a_strange_length_does_no_harm(server: ImageServer, fetch: Fetch, length: str) -> None:
    """It ends as a body or as a link's fault."""
    server.replies["/a.jpg"] = Reply(b"x", length=length)
    with suppress(LinkError):
        assert fetch("/a.jpg")[0] == b"x"


def test_redirects_are_followed_three_times(server: ImageServer, fetch: Fetch) -> None:
    """Absolute and relative; the fourth is too many."""
    server.replies["/0"] = Reply(b"moved", status=302, headers={"Location": server.url("/1")})
    for hop in range(1, 4):
        server.replies[f"/{hop}"] = Reply(b"moved", status=307, headers={"Location": str(hop + 1)})
    server.replies["/4"] = Reply(BODY)
    assert fetch("/1")[0] == BODY
    with pytest.raises(LinkError, match="redirects more than 3 times"):
        fetch("/0")


@pytest.mark.parametrize(
    "location",
    [
        "ftp://elsewhere.test/a.jpg",
        "file:///etc/passwd",
        "http://[",
        "http://a:b/",
        "http://portal.example.org:99999/login",
        "http://portal.example.org:0/login",
        f"http://{'a' * 70}.example.org/login",
        "http://..example.org/",
        "http://.example.org/",
        "http://host name/",
        "http://\u00ff\u00fe/",
        "//",
        "/login",
        "http:///login",
        "?next=/a.jpg&" + "x" * 20_000,
    ],
)
def test_where_a_redirect_leads_is_never_the_images_fault(server: ImageServer, fetch: Fetch, location: str) -> None:
    """A portal, an address that is none, a page that is not there: its host sent us, and answers for it."""
    server.replies["/a.jpg"] = Reply(status=302, headers={"Location": location})
    with pytest.raises(LinkError) as caught:
        fetch("/a.jpg")
    assert not isinstance(caught.value, HostUnreachable)


def test_a_redirect_to_nobody_is_the_fault_of_the_host_that_answered(server: ImageServer, fetch: Fetch) -> None:
    """It was reached: this says nothing about the way to it."""
    with ImageServer() as gone:
        url = gone.url("/a.jpg")
    server.replies["/a.jpg"] = Reply(status=302, headers={"Location": url})
    with pytest.raises(LinkError, match="redirects to a host that does not answer") as caught:
        fetch("/a.jpg")
    assert not isinstance(caught.value, HostUnreachable)


def test_a_redirect_may_not_leave_encryption() -> None:
    """Towards it, and within it, is fine."""
    assert _redirected("http://a.test/x", "https://b.test/y") == "https://b.test/y"
    assert _redirected("https://a.test/x", "/y") == "https://a.test/y"
    with pytest.raises(LinkError, match="from https to http, which is refused"):
        _redirected("HTTPS://a.test/x", "http://a.test/x")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "a.jpg",
        "ftp://images.test/a.jpg",
        "file:///etc/passwd",
        "http://",
        "http:///a.jpg",
        "http://[::1/a.jpg",
        "http://images.test:notaport/a.jpg",
        "http://" + "a" * 70 + ".test/a.jpg",
        "http://..test/a.jpg",
    ],
)
def test_what_is_no_url_is_the_images_fault(fetch: Fetch, url: str) -> None:
    """Whatever Antenna sends as a URL, the worker lives on."""
    with pytest.raises(ImageUrlUnusable):
        fetch(url)


@pytest.mark.parametrize("url", ["http://127.0.0.1:{port}/a.jpg", "http://[::ffff:127.0.0.1]:{port}/a.jpg"])
def test_a_private_address_is_not_even_connected_to(server: ImageServer, tmp_path: Path, url: str) -> None:
    """Not while Antenna is public: the refusal is no error of the image, and names what to set."""
    server.replies["/a.jpg"] = Reply(BODY)
    with (
        ImageClient(MAX_BYTES, AddressPolicy("8.8.8.8")) as client,
        (tmp_path / "body").open("wb") as file,
        pytest.raises(AddressRefused, match="AMI_IMAGE_ALLOWED_NETWORKS"),
    ):
        client.download(url.format(port=server.port), file.fileno(), lambda: False)
    assert not server.requests


def test_a_redirect_does_not_lead_to_cloud_metadata(server: ImageServer, fetch: Fetch) -> None:
    """Every hop is checked like the first."""
    server.replies["/a.jpg"] = Reply(status=302, headers={"Location": "http://169.254.169.254/latest/meta-data/"})
    with pytest.raises(AddressRefused, match=r"169\.254\.169\.254"):
        fetch("/a.jpg")


def test_the_address_that_was_checked_is_the_one_connected_to(
    server: ImageServer, fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name server that answers differently a moment later changes nothing; the host is still told by its name."""
    answers = _look_up_as(monkeypatch, {"images.test": ["127.0.0.1", "169.254.169.254"]})
    server.replies["/a.jpg"] = Reply(BODY)
    assert fetch(server.url("/a.jpg", "images.test"))[0] == BODY
    assert answers == {"images.test": ["169.254.169.254"]}
    assert server.requests[0].headers["Host"] == f"images.test:{server.port}"


def test_the_next_address_is_tried_where_one_does_not_answer(
    server: ImageServer, fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As curl does."""
    real = socket.getaddrinfo

    def look_up(host: str, *arguments: Any, **options: Any) -> list[Any]:
        hosts = ["127.0.0.2", "127.0.0.1"] if host == "images.test" else [host]
        return [entry for each in hosts for entry in real(each, *arguments, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    server.replies["/a.jpg"] = Reply(BODY)
    assert fetch(server.url("/a.jpg", "images.test"))[0] == BODY


def test_a_certificate_is_held_against_the_hosts_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fetch: Fetch
) -> None:
    """Though the connection goes to an address; SSL_CERT_FILE says whom to trust, and nobody else is trusted."""
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("images.test").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    _look_up_as(monkeypatch, {name: ["127.0.0.1"] * 9 for name in ("images.test", "other.test")})
    with ImageServer(context) as server:
        server.replies["/a.jpg"] = Reply(BODY)
        with pytest.raises(LinkError, match="CERTIFICATE_VERIFY_FAILED"):
            fetch(server.url("/a.jpg", "images.test"))
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        with ImageClient(MAX_BYTES, NEAR) as client, (tmp_path / "tls").open("wb") as file:
            client.download(server.url("/a.jpg", "images.test"), file.fileno(), lambda: False)
            with pytest.raises(LinkError, match=r"other\.test"):
                client.download(server.url("/a.jpg", "other.test"), file.fileno(), lambda: False)
    assert (tmp_path / "tls").read_bytes() == BODY


@pytest.mark.parametrize("start", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n"])
@pytest.mark.parametrize("forever", [b"X", b"HTTP/1.1 100 Continue\r\n\r\n"])
def test_a_host_that_trickles_is_broken_off(tmp_path: Path, start: bytes, forever: bytes) -> None:
    """In the status line, in the headers and in the body: no read ever times out, and the download does."""
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as executor:
        trickle = executor.submit(_trickle, listener, start, forever, over)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/a.jpg"
        with (
            ImageClient(MAX_BYTES, NEAR, download_s=0.3) as client,
            (tmp_path / "body").open("wb") as file,
            pytest.raises(LinkError, match=r"did not come in time|timed out|cannot be read"),
        ):
            client.download(url, file.fileno(), lambda: False)
        over.set()
        trickle.result(PATIENCE_S)


def _trickle(listener: socket.socket, start: bytes, forever: bytes, over: threading.Event) -> None:
    connection, _address = listener.accept()
    with connection, suppress(ConnectionError):
        connection.sendall(start)
        while not over.wait(0.01):
            connection.sendall(forever)


def _look_up_as(monkeypatch: pytest.MonkeyPatch, answers: dict[str, list[str]]) -> dict[str, list[str]]:
    """Give a name one address after the other; return what is left of them."""
    real = socket.getaddrinfo

    def look_up(host: str, *arguments: Any, **options: Any) -> Any:
        return real(answers[host].pop(0) if host in answers else host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return answers


def test_compressed_bytes_are_refused_unopened(server: ImageServer, fetch: Fetch, tmp_path: Path) -> None:
    """Nobody asked for gzip; a few kB of it could become gigabytes."""
    server.replies["/a.jpg"] = Reply(gzip.compress(bytes(2_000_000)), headers={"Content-Encoding": "gzip"})
    with pytest.raises(LinkError, match="sends 'gzip' coding"):
        fetch("/a.jpg")
    assert (tmp_path / "body").stat().st_size == 0


@pytest.mark.parametrize(
    "coding", ["aws-chunked", "", "identity", "utf-8", "aws-chunked, identity", "IDENTITY,", "none"]
)
def test_a_coding_that_changes_no_byte_is_none(server: ImageServer, fetch: Fetch, coding: str) -> None:
    """S3 keeps aws-chunked with an object that was uploaded so; others set a charset, or nothing."""
    server.replies["/a.jpg"] = Reply(BODY, headers={"Content-Encoding": coding})
    assert fetch("/a.jpg")[0] == BODY


@pytest.mark.parametrize("coding", ["gzip", "x-gzip", "br", "zstd", "deflate", "aws-chunked, gzip", "GZip , identity"])
def test_a_coding_that_compresses_is_refused_however_it_is_listed(
    server: ImageServer, fetch: Fetch, coding: str
) -> None:
    """It is the host's doing."""
    server.replies["/a.jpg"] = Reply(BODY, headers={"Content-Encoding": coding})
    with pytest.raises(ImageRefused, match="coding, though asked for the bytes as they are"):
        fetch("/a.jpg")


def s3_error(code: str, message: str = "") -> bytes:
    return f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'.encode()


@pytest.mark.parametrize(
    ("reply", "error", "said"),
    [
        (Reply(s3_error("AccessDenied"), status=403), ImageRefused, r"403 \(AccessDenied\)$"),
        (Reply(s3_error("AccessDenied", "Request has expired"), status=403), UrlExpired, "has expired"),
        (Reply(s3_error("ExpiredToken"), status=400), UrlExpired, "ExpiredToken"),
        (Reply(s3_error("InvalidObjectState"), status=403), ImageRefused, "InvalidObjectState"),
        (
            Reply(s3_error("PermanentRedirect"), status=301, headers={"x-amz-bucket-region": "eu-central-1"}),
            ImageRefused,
            "PermanentRedirect, no address to go to, the bucket is in region eu-central-1",
        ),
        (Reply(b"x" * 5_000_000, status=403), ImageRefused, "403$"),
        (Reply(b"x", status=403, length="50"), ImageRefused, "403$"),
        (Reply(bytes(range(256)), status=401, chunked=True), ImageRefused, "401$"),
        (Reply(b"busy", status=503), LinkError, "503$"),
    ],
)
def test_what_an_object_store_says_is_in_the_error(
    server: ImageServer, fetch: Fetch, reply: Reply, error: type[LinkError], said: str
) -> None:
    """Its code and its region, of however much it sends; and an expired signature is known as such."""
    server.replies["/a.jpg"] = reply
    with pytest.raises(LinkError, match=said) as caught:
        fetch("/a.jpg")
    assert type(caught.value) is error


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\r\n",
        b"\xff\xd8\xff\xe0 no HTTP at all",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"HTTP/9.9 200 OK\r\n\r\n",
        b"HTTP/1.1 abc OK\r\n\r\n",
        b"HTTP/1.1 99999 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X-Many: 1\r\n" * 500 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 200_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\xff\xfe: \xff\r\nContent-Length: 5\r\n\r\nab",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5, 6\r\n\r\nab",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nab",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nab",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"f" * 100_000 + b"\r\nab",
        b"HTTP/1.1 302 Found\r\nLocation: \xff\xfe\x01\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: http://[::1%25\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 403 No\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 503 No\r\nRetry-After: \xb2\r\nContent-Length: 0\r\n\r\n",
    ],
)
def test_whatever_bytes_a_host_sends_are_the_links_fault(tmp_path: Path, answer: bytes) -> None:
    """Broken headers, chunks, status lines: none is an error of an image, and none escapes as another exception."""
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as executor:
        said = executor.submit(_say, listener, answer)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/a.jpg"
        with (
            ImageClient(MAX_BYTES, NEAR, download_s=1.0) as client,
            (tmp_path / "body").open("wb") as file,
            pytest.raises(LinkError),
        ):
            client.download(url, file.fileno(), lambda: False)
        said.result(PATIENCE_S)


@pytest.mark.parametrize("answer", [b"HTTP/1.0 200 OK\r\n\r\nab", b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nab"])
def test_a_body_that_ends_with_its_connection_is_not_known_to_be_whole(tmp_path: Path, answer: bytes) -> None:
    """A link that breaks looks the same: whoever reads the body is told."""
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as executor:
        executor.submit(_say, listener, answer)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/a.jpg"
        with ImageClient(MAX_BYTES, NEAR) as client, (tmp_path / "body").open("wb") as file:
            stats = client.download(url, file.fileno(), lambda: False)
    assert (stats.size_bytes, stats.end_told) == (2, False)


def _say(listener: socket.socket, answer: bytes) -> None:
    connection, _address = listener.accept()
    with connection, suppress(ConnectionError):
        connection.recv(65536)
        connection.sendall(answer)


@pytest.mark.parametrize(
    ("said", "retry_after_s"),
    [
        ("7", 7.0),
        ("in an hour", 3600.0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
        ("Wed, 21 Oct 99999 07:28:00 GMT", 0.0),
        ("", 0.0),
        ("soon", 0.0),
        ("-1", 0.0),
        ("9" * 5000, 0.0),
    ],
    ids=["seconds", "a date", "a date gone by", "a year too many", "empty", "a word", "negative", "without end"],
)
def test_a_host_that_says_when_to_come_back_is_heard(
    server: ImageServer, fetch: Fetch, said: str, retry_after_s: float
) -> None:
    """The caller waits that long, inside the lease."""
    if said == "in an hour":
        said = formatdate(time.time() + 3600, usegmt=True)
    server.replies["/a.jpg"] = Reply(status=429, headers={"Retry-After": said})
    with pytest.raises(LinkError) as caught:
        fetch("/a.jpg")
    assert caught.value.retry_after_s == pytest.approx(retry_after_s, abs=60)


def test_no_password_is_sent_wherever_it_may_be_found(
    server: ImageServer, fetch: Fetch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither from a .netrc nor from the URL itself."""
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login ami password canary\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    server.replies["/a.jpg"] = Reply(b"x")
    fetch(server.url("/a.jpg", "user:canary@127.0.0.1"))
    assert set(server.requests[0].headers) == {"Host", "User-Agent", "Accept", "Accept-Encoding"}


def test_a_host_that_is_not_there_is_the_links_fault(fetch: Fetch) -> None:
    """Refused connections are tried again."""
    with ImageServer() as gone:
        url = gone.url("/a.jpg")
    with pytest.raises(LinkError, match="cannot reach"):
        fetch(url)


def test_a_path_with_any_characters_is_asked_for(server: ImageServer, fetch: Fetch) -> None:
    """Spaces and umlauts are quoted, what is quoted already stays."""
    server.replies["/K%C3%A4fer%20%26%20Co.jpg"] = Reply(b"x")
    assert fetch("/Käfer %26 Co.jpg")[0] == b"x"


@pytest.mark.parametrize("chunked", [False, True])
def test_cancelling_breaks_off_a_body_on_its_way(server: ImageServer, fetch: Fetch, *, chunked: bool) -> None:
    """Though no more of it comes; and the next download gets a connection of its own."""
    hold, cancel = threading.Event(), threading.Event()
    server.replies["/slow.jpg"] = Reply(BODY, chunked=chunked, hold=hold)
    server.replies["/a.jpg"] = Reply(BODY)
    with ThreadPoolExecutor(1) as executor:
        download = executor.submit(fetch, "/slow.jpg", cancel.is_set)
        try:
            wait_until(lambda: len(server.requests) == 1)
            cancel.set()
            with pytest.raises(LinkError, match="cancelled"):
                download.result(PATIENCE_S)
        finally:
            hold.set()
    assert fetch("/a.jpg")[0] == BODY


@pytest.mark.parametrize("credentials", ["", "user:p%40ss@"])
def test_a_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, credentials: str) -> None:
    """With its credentials; hosts in no_proxy are asked directly."""
    with ImageServer() as proxy, ImageServer() as direct:
        monkeypatch.setenv("http_proxy", f"http://{credentials}127.0.0.1:{proxy.port}")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        proxy.replies["http://images.test/a.jpg"] = Reply(b"by proxy")
        direct.replies["/a.jpg"] = Reply(b"direct")
        with ImageClient(MAX_BYTES, NEAR) as client, (tmp_path / "body").open("wb") as file:
            client.download("http://images.test/a.jpg", file.fileno(), lambda: False)
            client.download(direct.url("/a.jpg"), file.fileno(), lambda: False)
        assert (tmp_path / "body").read_bytes() == b"by proxydirect"
        said = {name.lower(): value for name, value in proxy.requests[0].headers.items()}
        assert said.get("proxy-authorization") == ("Basic dXNlcjpwQHNz" if credentials else None)


def test_a_proxy_without_a_scheme_is_understood(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As curl does."""
    with ImageServer() as proxy:
        monkeypatch.setenv("http_proxy", f"127.0.0.1:{proxy.port}")
        proxy.replies["http://images.test/a.jpg"] = Reply(b"x")
        with ImageClient(MAX_BYTES, NEAR) as client, (tmp_path / "body").open("wb") as file:
            assert client.download("http://images.test/a.jpg", file.fileno(), lambda: False).size_bytes == 1


def test_one_proxy_for_everything_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """ALL_PROXY; the proxy looks the host up, so that nothing is looked up or refused here."""
    with ImageServer() as proxy:
        monkeypatch.setenv("ALL_PROXY", f"http://127.0.0.1:{proxy.port}")
        proxy.replies["http://10.1.2.3/a.jpg"] = Reply(b"x")
        policy = AddressPolicy("8.8.8.8")
        with ImageClient(MAX_BYTES, policy) as client, (tmp_path / "body").open("wb") as file:
            assert client.download("http://10.1.2.3/a.jpg", file.fileno(), lambda: False).size_bytes == 1


@pytest.mark.parametrize("url", ["socks5://user:canary@127.0.0.1:1080", "http://", "http://[::1", "http://h:port"])
def test_a_proxy_that_cannot_be_used_is_a_matter_of_configuration(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """The message names the variable and hides the password."""
    monkeypatch.setenv("ALL_PROXY", url)
    with pytest.raises(ConfigurationError, match="ALL_PROXY must be the URL of an http proxy") as caught:
        ImageClient(MAX_BYTES, NEAR)
    assert "canary" not in str(caught.value)


def test_many_downloads_at_once_share_a_client(server: ImageServer, tmp_path: Path) -> None:
    """Every body in its own file, no connection left open, and of one host no more than there may be."""
    hold, count = threading.Event(), DOWNLOADS_MAX + 8
    for number in range(count):
        server.replies[f"/{number}"] = Reply(bytes([number]) * 50_000, hold=hold)
    with ImageClient(MAX_BYTES, NEAR) as client, ThreadPoolExecutor(count) as executor:

        def download(number: int) -> bool:
            with (tmp_path / str(number)).open("wb") as file:
                client.download(server.url(f"/{number}"), file.fileno(), lambda: False)
            return (tmp_path / str(number)).read_bytes() == bytes([number]) * 50_000

        bodies = executor.map(download, range(count))
        wait_until(lambda: len(server.requests) >= DOWNLOADS_MAX)
        hold.set()
        assert all(bodies)
    assert len({request.client_port for request in server.requests}) == DOWNLOADS_MAX
