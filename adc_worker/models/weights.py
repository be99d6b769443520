"""Weight and label files: found where they already are, or fetched once.

A fetch that breaks off goes on where it was, also in another process; a file has its name only when it is whole.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from torch import nn

from adc_worker import __version__
from adc_worker.errors import ExitCode, WorkerFault
from adc_worker.log import get_logger

_log = get_logger(__name__)

TIMEOUT_S = 30.0
PROGRESS_EVERY_S = 5.0
_LOCK_POLL_S = 0.2


def _fault(message: str) -> WorkerFault:
    return WorkerFault(message, ExitCode.MODEL_UNAVAILABLE)


@dataclass(frozen=True, slots=True)
class WeightStore:
    """The files of the models, in `folder`; those in torch hub's folder, where today's worker has them, count too.

    Once `is_stopping` says so, a fetch breaks off: gigabytes must not hold up the end of the process.
    """

    folder: Path
    is_stopping: Callable[[], bool] = lambda: False

    def find(self, url: str) -> Path | None:
        """Return the file of a URL if it is on this machine."""
        places = (self.destination(url), Path(torch.hub.get_dir()) / "models" / self.destination(url).name)
        return next((path for path in places if path.is_file()), None)

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
        """Return the file of a URL, and fetch it first if it is not here; raises WorkerFault naming both."""
        if (found := self.find(url)) is not None:
            return found
        path = self.destination(url)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked(path.with_name(f"{path.name}.part")) as part:
                if (found := self.find(url)) is not None:  # another process of this host was faster
                    return found
                self._fetch(url, part)
                os.replace(part.name, path)  # noqa: PTH105 (the file object knows its name only as text)
        except OSError as error:
            raise _fault(f"cannot keep {url} as {path}: {error.strerror or error}") from error
        except httpx.HTTPError as error:
            status = (
                f"answered {error.response.status_code}" if isinstance(error, httpx.HTTPStatusError) else str(error)
            )
            raise _fault(
                f"cannot fetch {url} into {path}: {type(error).__name__}: {status}; what has come is kept, the next"
                " attempt goes on from there. Where this machine has no access to it, copy the file there by hand"
            ) from error
        return path

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
            if response.status_code != httpx.codes.PARTIAL_CONTENT:
                part.truncate(part.seek(0))
                version = response.headers.get("etag") or response.headers.get("last-modified")
                self._note(url).write_text(json.dumps({"url": url, "version": version}))
            total = part.tell() + int(response.headers.get("content-length", 0))
            _log.info("weights_fetch", url=url, received_bytes=part.tell(), total_bytes=total)
            told = time.monotonic()
            for block in response.iter_raw():  # as it comes: a buffer's content would be lost with the connection
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
        WorkerFault: it cannot be read, or is not of this network; names the file.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        network.load_state_dict(checkpoint.get("model_state_dict", checkpoint))
    except Exception as error:
        raise _fault(
            f"{path} does not hold the weights of {type(network).__name__}: {error}; delete it, to fetch it again"
        ) from error
