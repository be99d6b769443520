"""Weight and label files: found where they already are, or fetched once.

A fetch that breaks off goes on where it was, also in another process; a file has its name only when it is whole, and
holds what its name says: a sign-in page that came in a store's place is no model, whenever it came.
"""

from __future__ import annotations

import codecs
import errno
import fcntl
import hashlib
import io
import json
import os
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import torch
from torch import nn

from adc_worker import __version__
from adc_worker.errors import ExitCode, ModelsAway, WorkerFault
from adc_worker.log import get_logger

_log = get_logger(__name__)

TIMEOUT_S = 30.0
PROGRESS_EVERY_S = 5.0
_LOCK_POLL_S = 0.2
_TORCH_SUFFIXES = frozenset({".pt", ".pth", ".bin", ".ckpt", ".tar"})
_ZIP_MAGIC = b"PK\x03\x04"  # what torch writes since 1.6
_PICKLE_START, _PICKLE_PROTOCOLS = 0x80, range(2, 6)  # what it wrote before
_HEAD_BYTES = 512
# A store that says so has no such file: its address has to be corrected in the catalogue, whatever time passes.
_GONE = frozenset({httpx.codes.NOT_FOUND, httpx.codes.GONE})
# What the operator of this machine has to put right; a disk that is full may be empty again.
_FORBIDDEN = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG})


class _NotTheFile(Exception):
    """What came is not the file that its address names."""


def _fault(message: str) -> WorkerFault:
    return WorkerFault(message, ExitCode.MODEL_UNAVAILABLE)


def problem_of_content(path: Path, suffix: str) -> str:
    """Return why a file cannot be what a name with that suffix says, or nothing.

    Reads its beginning, and its end where it is a zip. A checkpoint is a zip archive with torch's pickle in it, or
    begins as a pickle; labels are JSON; nothing is a page.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    problem = _problem_of_head(head, suffix)
    if problem or suffix not in _TORCH_SUFFIXES or not head.startswith(_ZIP_MAGIC):
        return problem
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError) as error:
        return f"it is no whole zip archive: {error}"
    return "" if any(name.endswith("data.pkl") for name in names) else "it is a zip archive without a checkpoint in it"


def _problem_of_head(head: bytes, suffix: str) -> str:
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if not head:
        return "it is empty"
    if text.startswith(b"<"):
        return f"it is a page, which begins {text[:40].decode(errors='replace')!r}"
    if suffix == ".json":
        return "" if text.startswith(b"{") else "it is no JSON object"
    if suffix not in _TORCH_SUFFIXES or head.startswith(_ZIP_MAGIC):
        return ""
    is_pickle = head[0] == _PICKLE_START and len(head) > 1 and head[1] in _PICKLE_PROTOCOLS
    return "" if is_pickle else f"it is no checkpoint of torch's: it begins {head[:20]!r}"


@dataclass(frozen=True, slots=True)
class WeightStore:
    """The files of the models, in `folder`; those in torch hub's folder, where today's worker has them, count too.

    Once `is_stopping` says so, a fetch breaks off: gigabytes must not hold up the end of the process.
    """

    folder: Path
    is_stopping: Callable[[], bool] = lambda: False

    def find(self, url: str) -> Path | None:
        """Return the file of a URL if it is on this machine; one that cannot be it does not count."""
        return next((path for path in self._places(url) if not self._problem(url, path)), None)

    def _places(self, url: str) -> list[Path]:
        """Return the files of that name that are here."""
        named = self.destination(url)
        places = (named, Path(torch.hub.get_dir()) / "models" / named.name)
        return [path for path in places if path.is_file()]

    def _problem(self, url: str, path: Path) -> str:
        """Return why a file that is here cannot be that of the URL, or nothing."""
        try:
            problem = problem_of_content(path, self.destination(url).suffix)
        except OSError as error:
            problem = f"it cannot be read: {error.strerror or error}"
        noted_bytes = self.record(url).get("size_bytes") if path == self.destination(url) else None
        size_bytes = path.stat().st_size
        if not problem and noted_bytes is not None and size_bytes < noted_bytes:  # else somebody put another one there
            problem = f"it has {size_bytes} bytes, and had {noted_bytes} when it was fetched"
        return problem

    def destination(self, url: str) -> Path:
        return self.folder / url.rsplit("/", 1)[-1]

    def record(self, url: str) -> dict[str, Any]:
        """Return what was noted of a fetch: url, version (ETag), and of a complete one size_bytes and sha256."""
        try:
            noted = json.loads(self._note(url).read_bytes())
        except (FileNotFoundError, ValueError):  # never fetched by us, cut short by a crash, or damaged
            return {}
        return noted if isinstance(noted, dict) else {}

    def ensure(self, url: str) -> Path:
        """Return the file of a URL, and fetch it first if it is not here, or not what its name says.

        Raises:
            ModelsAway: it cannot be had now, for a reason that may pass; names both.
            WorkerFault: the store has no such file, or this machine may not keep it; names both.
        """
        if (found := self.find(url)) is not None:
            return found
        for useless in self._places(url):
            reason = self._problem(url, useless)
            _log.warning("model_file_useless", path=str(useless), reason=reason, next="the file is fetched")
        path = self.destination(url)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked(path.with_name(f"{path.name}.part")) as part:
                if (found := self.find(url)) is not None:  # another process of this host was faster
                    return found
                self._fetch(url, part)
                self._check_content(url, part)
                os.replace(part.name, path)  # noqa: PTH105 (the file object knows its name only as text)
        except OSError as error:
            message = f"cannot keep {url} as {path}: {error.strerror or error}"
            raise _fault(message) if error.errno in _FORBIDDEN else ModelsAway(message) from error
        except httpx.HTTPStatusError as error:
            message = _fetch_failed(url, path, f"it answered {error.response.status_code}")
            raise _fault(message) if error.response.status_code in _GONE else ModelsAway(message) from error
        except httpx.HTTPError as error:
            raise ModelsAway(_fetch_failed(url, path, f"{type(error).__name__}: {error}")) from error
        except _NotTheFile as error:
            raise ModelsAway(
                f"cannot fetch {url} into {path}: what came is not that file, and was not kept: {error}; it is tried"
                " again. Where this machine has no access to it, copy the file there by hand"
            ) from error
        return path

    def _check_content(self, url: str, part: io.BufferedRandom) -> None:
        """Let go of what came whole and is not the file."""
        problem = problem_of_content(Path(part.name), self.destination(url).suffix)
        if problem:
            part.truncate(part.seek(0))
            self._note(url).unlink(missing_ok=True)
            raise _NotTheFile(problem)

    def _fetch(self, url: str, part: io.BufferedRandom) -> None:
        started = time.monotonic()
        headers = {"User-Agent": f"adc-worker/{__version__}", "Accept-Encoding": "identity"}
        with httpx.Client(timeout=TIMEOUT_S, follow_redirects=True, headers=headers) as client:
            while True:
                held = part.seek(0, os.SEEK_END)
                try:
                    self._append(client, url, part)
                    break
                except httpx.TransportError as error:
                    if part.tell() == held:  # the last attempt brought nothing
                        raise
                    _log.warning("weights_resume", url=url, received_bytes=part.tell(), error=str(error))
        part.flush()
        os.fsync(part.fileno())
        part.seek(0)
        digest = hashlib.file_digest(part, "sha256").hexdigest()
        note = self.record(url) | {"size_bytes": part.seek(0, os.SEEK_END), "sha256": digest}
        self._note(url).write_text(json.dumps(note))
        _log.info("weights_fetched", **note, path=str(self.destination(url)), fetch_s=round(time.monotonic() - started))

    def _append(self, client: httpx.Client, url: str, part: io.BufferedRandom) -> None:
        """Bring `part` to its end, from where it is if the file at the URL is still the same one."""
        held, version = part.tell(), self.record(url).get("version")
        resume = {"Range": f"bytes={held}-", "If-Range": version} if held and version else {}
        with client.stream("GET", url, headers=resume) as response:
            if response.headers.get("content-range") == f"bytes */{held}":  # 416: it was whole, and not yet renamed
                return
            response.raise_for_status()
            blocks = response.iter_raw()  # as they come: a buffer's content would be lost with the connection
            first = next(blocks, b"")
            if response.status_code == httpx.codes.PARTIAL_CONTENT:
                _check_range(response, held)
            else:
                _check_is_no_page(response, first)  # before what has come is let go of for it
                part.truncate(part.seek(0))
                version = response.headers.get("etag") or response.headers.get("last-modified")
                self._note(url).write_text(json.dumps({"url": url, "version": version}))
            total = part.tell() + int(response.headers.get("content-length", 0))
            _log.info("weights_fetch", url=url, received_bytes=part.tell(), total_bytes=total)
            told = time.monotonic()
            for block in chain([first], blocks):
                part.write(block)
                self._check_stopping()
                if time.monotonic() - told > PROGRESS_EVERY_S:
                    told = time.monotonic()
                    _log.info("weights_fetch", url=url, received_bytes=part.tell(), total_bytes=total)

    @contextmanager
    def _locked(self, path: Path) -> Iterator[io.BufferedRandom]:
        """Open a file for appending; one process at a time."""
        with path.open("a+b") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    self._check_stopping()
                    time.sleep(_LOCK_POLL_S)
            yield file

    def _check_stopping(self) -> None:
        if self.is_stopping():
            raise _fault("this process is to end: what has come of its models' files is kept, the next one goes on")

    def _note(self, url: str) -> Path:
        return self.destination(url).with_name(f"{self.destination(url).name}.fetched.json")


def _check_is_no_page(response: httpx.Response, first: bytes) -> None:
    kind = response.headers.get("content-type", "").lower()
    if kind.startswith("text/html") or first.lstrip().startswith(b"<"):
        raise _NotTheFile(f"it is a page ({kind or 'no content type'}): a sign-in or a proxy is in the way")


def _check_range(response: httpx.Response, held: int) -> None:
    """Refuse the rest of a file where it does not go on from what is held."""
    given = response.headers.get("content-range", "")
    if given and not given.startswith(f"bytes {held}-"):
        raise _NotTheFile(f"bytes from {held} on were asked for, and {given[:40]!r} came")


def _fetch_failed(url: str, path: Path, reason: str) -> str:
    return (
        f"cannot fetch {url} into {path}: {reason}; what has come is kept, the next attempt goes on from there. Where"
        " this machine has no access to it, copy the file there by hand"
    )


def read_labels(path: Path) -> tuple[str, ...]:
    """Read a JSON object from name to index into the names in class order; raises WorkerFault naming the file."""
    try:
        indices = {str(name): int(index) for name, index in json.loads(path.read_bytes()).items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise _fault(
            f"{path} is not a JSON object from label to index: {error}; delete it, to fetch it again"
        ) from error
    if sorted(indices.values()) != list(range(len(indices))) or not indices:
        raise _fault(f"{path} does not number its {len(indices)} labels from 0 without gaps")
    return tuple(sorted(indices, key=indices.__getitem__))


def load_weights(network: nn.Module, path: Path) -> None:
    """Load a checkpoint, a state dict or a dict that holds one under `model_state_dict`; tensors only, no code runs.

    Raises:
        ModelsAway: there is no memory for it now, or the disk does not give it.
        WorkerFault: it is not of this network; names the file.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        network.load_state_dict(checkpoint.get("model_state_dict", checkpoint))
    except (OSError, MemoryError, torch.OutOfMemoryError) as error:
        raise ModelsAway(f"{path} cannot be loaded now: {type(error).__name__}: {error}") from error
    except Exception as error:
        raise _fault(
            f"{path} does not hold the weights of {type(network).__name__}: {error}; delete it, to fetch it again"
        ) from error
