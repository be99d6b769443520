"""Files of the models come over HTTP once, go on where they broke off, and have their name only when they are whole."""

from __future__ import annotations

import fcntl
import hashlib
import io
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from adc_worker.errors import ExitCode, ModelsAway, WorkerFault
from adc_worker.models.weights import WeightStore, load_weights, read_labels


def checkpoint(seed: int, *, as_zip: bool = True) -> bytes:
    """Return a megabyte of weights as torch writes them, or as it wrote them before version 1.6."""
    generator = torch.Generator().manual_seed(seed)
    file = io.BytesIO()
    weights = {"weight": torch.rand(250_000, generator=generator)}
    torch.save(weights, file, _use_new_zipfile_serialization=as_zip)
    return file.getvalue()


BODY = checkpoint(1)
OTHER_BODY = checkpoint(2)
PAGE = b"<html><body>Sign in to this network</body></html>"


class _Store(BaseHTTPRequestHandler):
    """Serves one file with ranges; breaks off after `break_after` bytes as often as `breaks` says.

    `portal` answers in its place, with a content type.
    """

    body, etag, breaks, break_after = BODY, '"one"', 0, 300_000
    portal: tuple[bytes, str] | None = None
    status = 200
    ranges: tuple[str, ...] = ()

    def do_GET(self) -> None:
        kind = type(self)
        wanted = self.headers.get("Range", "")
        kind.ranges = (*kind.ranges, wanted)
        if kind.portal is not None:
            content, content_type = kind.portal
            self.send_response(kind.status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            return
        if "missing" in self.path:
            self.send_error(404)
            return
        resumed = wanted and self.headers.get("If-Range") == self.etag
        start = int(re.sub(r"\D", "", wanted)) if resumed else 0
        if start >= len(self.body):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(self.body)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if resumed else 200)
        self.send_header("ETag", self.etag)
        self.send_header("Content-Length", str(len(self.body) - start))
        self.end_headers()
        end = len(self.body)
        if kind.breaks:
            kind.breaks, end = kind.breaks - 1, start + self.break_after
        self.wfile.write(self.body[start:end])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def host() -> Iterator[tuple[type[_Store], str]]:
    """Give a handler of its own for this test, and the address of a file."""

    class Handler(_Store):
        pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield Handler, f"http://127.0.0.1:{server.server_address[1]}/models/net.pth"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WeightStore:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return WeightStore(tmp_path / "models")


def test_a_file_is_fetched_once_and_its_size_and_hash_are_noted(
    host: tuple[type[_Store], str], store: WeightStore
) -> None:
    handler, url = host
    path = store.ensure(url)
    assert (path.name, path.read_bytes()) == ("net.pth", BODY)
    assert store.ensure(url) == path
    assert handler.ranges == ("",)
    noted = store.record(url)
    assert (noted["size_bytes"], noted["sha256"]) == (len(BODY), hashlib.sha256(BODY).hexdigest())
    assert sorted(file.name for file in store.folder.iterdir()) == ["net.pth", "net.pth.fetched.json"]


def test_a_fetch_that_breaks_off_goes_on_where_it_was(host: tuple[type[_Store], str], store: WeightStore) -> None:
    """Twice in one attempt: only what is missing is asked for."""
    handler, url = host
    handler.breaks = 2
    assert store.ensure(url).read_bytes() == BODY
    assert handler.ranges == ("", "bytes=300000-", "bytes=600000-")


def test_a_later_start_goes_on_and_a_changed_file_starts_anew(
    host: tuple[type[_Store], str], store: WeightStore
) -> None:
    """What has come is kept without the file's name; another version at the same address is never mixed into it."""
    handler, url = host
    handler.breaks, handler.break_after = 99, 0
    part = store.destination(url).with_name("net.pth.part")
    with pytest.raises(WorkerFault) as raised:
        store.ensure(url)
    assert isinstance(raised.value, ModelsAway)
    assert url in str(raised.value)
    assert str(store.destination(url)) in str(raised.value)
    part.write_bytes(BODY[:1000])
    assert not store.destination(url).exists()
    handler.breaks = 0
    handler.etag, handler.body = '"two"', OTHER_BODY
    assert store.ensure(url).read_bytes() == OTHER_BODY


def test_a_whole_file_that_was_not_renamed_yet_is_not_fetched_again(
    host: tuple[type[_Store], str], store: WeightStore
) -> None:
    """The process died in between."""
    handler, url = host
    store.ensure(url).rename(store.destination(url).with_name("net.pth.part"))
    assert store.ensure(url).read_bytes() == BODY
    assert handler.ranges == ("", f"bytes={len(BODY)}-")


def test_two_processes_fetch_a_file_once(host: tuple[type[_Store], str], store: WeightStore) -> None:
    """One waits for the other's; threads stand for processes, each opens the file by itself."""
    handler, url = host
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(store.ensure(url))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.read_bytes() == BODY for path in found] == [True] * 4
    assert handler.ranges == ("",)


def test_a_fetch_breaks_off_when_its_process_is_to_end(host: tuple[type[_Store], str], store: WeightStore) -> None:
    """Its own, or another's that it waits for. What has come is kept: the next one goes on from there."""
    handler, url = host
    ending, part = replace(store, is_stopping=lambda: True), store.destination(url).with_name("net.pth.part")
    with pytest.raises(WorkerFault, match="is kept"):
        ending.ensure(url)
    received = part.stat().st_size
    assert 0 < received < len(BODY)
    with part.open("rb") as others:
        fcntl.flock(others, fcntl.LOCK_EX)
        with pytest.raises(WorkerFault, match="is kept"):
            ending.ensure(url)
    assert store.ensure(url).read_bytes() == BODY
    assert handler.ranges == ("", f"bytes={received}-")


def test_files_of_todays_worker_are_used_in_place(
    host: tuple[type[_Store], str], store: WeightStore, tmp_path: Path
) -> None:
    handler, url = host
    old = tmp_path / "torch" / "hub" / "models" / "net.pth"
    old.parent.mkdir(parents=True)
    old.write_bytes(OTHER_BODY)
    assert Path(torch.hub.get_dir()) == tmp_path / "torch" / "hub"
    assert store.ensure(url) == old
    assert handler.ranges == ()


def test_what_is_missing_at_the_store_is_named_with_address_and_path(
    host: tuple[type[_Store], str], store: WeightStore
) -> None:
    url = host[1].replace("net", "missing")
    with pytest.raises(WorkerFault, match="answered 404") as raised:
        store.ensure(url)
    assert url in str(raised.value)
    assert str(store.destination(url)) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert raised.value.exit_code == ExitCode.MODEL_UNAVAILABLE, "no time brings a file that the store does not have"


@pytest.mark.parametrize(
    ("content", "content_type"),
    [
        (PAGE, "text/html; charset=utf-8"),
        (b"\n  " + PAGE, "application/octet-stream"),
        (b'{"message": "sign in"}', "application/json"),
        (b"", "application/octet-stream"),
        (b"Service is down", "text/plain"),
        (BODY[: len(BODY) // 2], "application/octet-stream"),
    ],
    ids=["a page", "a page called a file", "JSON", "nothing", "text", "half a file, called whole"],
)
def test_what_is_no_checkpoint_is_not_kept_as_one(
    host: tuple[type[_Store], str], store: WeightStore, content: bytes, content_type: str
) -> None:
    """A sign-in or a proxy in the way, with 200. Once it is gone the file is fetched."""
    handler, url = host
    handler.portal = (content, content_type)
    with pytest.raises(ModelsAway, match="not that file") as raised:
        store.ensure(url)
    assert url in str(raised.value)
    assert store.find(url) is None
    assert not store.destination(url).exists()
    handler.portal = None
    assert store.ensure(url).read_bytes() == BODY


@pytest.mark.parametrize("content_type", ["text/html", "application/octet-stream"])
def test_a_page_in_the_middle_of_a_fetch_costs_nothing_of_what_has_come(
    host: tuple[type[_Store], str], store: WeightStore, content_type: str
) -> None:
    """The rest is asked for once it is gone."""
    handler, url = host
    ending = replace(store, is_stopping=lambda: True)
    with pytest.raises(WorkerFault, match="is kept"):
        ending.ensure(url)
    received = store.destination(url).with_name("net.pth.part").stat().st_size
    handler.portal = (PAGE, content_type)
    with pytest.raises(ModelsAway):
        store.ensure(url)
    handler.portal = None
    assert store.ensure(url).read_bytes() == BODY
    assert handler.ranges[-1] == f"bytes={received}-"


@pytest.mark.parametrize("left", [PAGE, b"", BODY[:1000], b"PK\x03\x04nothing"])
def test_a_kept_file_that_is_none_is_fetched_again(
    host: tuple[type[_Store], str], store: WeightStore, left: bytes
) -> None:
    """An older version kept what came, or a power cut cut it short."""
    _handler, url = host
    store.folder.mkdir()
    store.destination(url).write_bytes(left)
    assert store.find(url) is None
    assert store.ensure(url).read_bytes() == BODY


def test_a_page_among_the_files_of_todays_worker_is_left_there_and_not_used(
    host: tuple[type[_Store], str], store: WeightStore, tmp_path: Path
) -> None:
    """That folder is not ours."""
    _handler, url = host
    old = tmp_path / "torch" / "hub" / "models" / "net.pth"
    old.parent.mkdir(parents=True)
    old.write_bytes(PAGE)
    assert store.ensure(url) == store.destination(url)
    assert old.read_bytes() == PAGE


def test_checkpoints_of_both_forms_and_labels_are_known(store: WeightStore) -> None:
    """Also labels that begin with a byte order mark, and a checkpoint that somebody put in a fetched one's place."""
    store.folder.mkdir()
    contents = {
        "old.pth": checkpoint(1, as_zip=False),
        "new.pt": BODY,
        "labels.json": b' {"a": 0}',
        "marked.json": b'\xef\xbb\xbf{"a": 0}',
        "other.onnx": b"\x08\x07",
    }
    for name, content in contents.items():
        (store.folder / name).write_bytes(content)
        assert store.find(f"https://store.test/{name}") == store.folder / name
    (store.folder / "other.onnx").write_bytes(PAGE)
    assert store.find("https://store.test/other.onnx") is None, "a page is no model of any kind"
    (store.folder / "new.pt.fetched.json").write_text('{"size_bytes": 10}')
    assert store.find("https://store.test/new.pt") is not None


@pytest.mark.parametrize("status", [403, 429, 500, 503, 407])
def test_a_store_that_fails_for_the_moment_is_told_from_one_without_the_file(
    host: tuple[type[_Store], str], store: WeightStore, status: int
) -> None:
    """The worker tries again, and where it ends its supervisor starts it again."""
    handler, url = host
    handler.portal, handler.status = (b"later", "text/plain"), status
    with pytest.raises(ModelsAway, match=f"answered {status}") as raised:
        store.ensure(url)
    assert raised.value.exit_code == ExitCode.FAILED


def test_a_store_that_nobody_reaches_is_away(store: WeightStore) -> None:
    """A network that is down, or a proxy: it may be back."""
    with pytest.raises(ModelsAway, match="ConnectError"):
        store.ensure("http://127.0.0.1:9/net.pth")


def test_a_checkpoint_of_another_network_is_no_passing_fault(tmp_path: Path) -> None:
    """No restart makes it fit; one that cannot be read now may be readable later."""
    path = tmp_path / "net.pth"
    path.write_bytes(BODY)
    with pytest.raises(WorkerFault, match="does not hold the weights of Linear") as raised:
        load_weights(torch.nn.Linear(1, 1), path)
    assert raised.value.exit_code == ExitCode.MODEL_UNAVAILABLE
    with pytest.raises(ModelsAway):
        load_weights(torch.nn.Linear(1, 1), tmp_path / "gone.pth")


@pytest.mark.parametrize("text", ["[]", "{}", '{"a": 0, "b": 2}', '{"a": 0, "b": 0}', "<html>"])
def test_labels_that_are_none_are_named_with_their_path(tmp_path: Path, text: str) -> None:
    path = tmp_path / "labels.json"
    path.write_text(text)
    with pytest.raises(WorkerFault, match=r"labels\.json"):
        read_labels(path)


def test_labels_are_in_the_order_of_their_indices(tmp_path: Path) -> None:
    path = tmp_path / "labels.json"
    path.write_text('{"b": 1, "a": 2, "c": 0}')
    assert read_labels(path) == ("c", "b", "a")


@pytest.mark.parametrize("content", [b"", b'{"version": ', b"\xff\xfe\x00", b"[]", b"7", bytes(100)])
def test_a_damaged_note_of_a_fetch_counts_as_none(store: WeightStore, content: bytes) -> None:
    """The file is fetched from its start then."""
    url = "http://store.test/weights.pth"
    store.folder.mkdir(exist_ok=True)
    note = store.destination(url).with_name("weights.pth.fetched.json")
    note.write_bytes(content)
    assert store.record(url) == {}
