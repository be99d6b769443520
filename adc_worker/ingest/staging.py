"""Compressed images on disk: downloaded there, queued for the decoder, removed when their result is kept."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import re
import secrets
import stat
import threading
import time
from bisect import insort
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from adc_worker.antenna.wire import Task
from adc_worker.errors import (
    ConfigurationError,
    ImageError,
    ImageRefused,
    ImageUnreadable,
    LinkError,
    NotAnImage,
    StagedFileLost,
    StagingFull,
    os_error_may_pass,
)
from adc_worker.ingest.disk_budget import DiskBudget
from adc_worker.ingest.download import DownloadStats, ImageClient
from adc_worker.ingest.header import ImageHeader, read_header
from adc_worker.ingest.jpeg_segments import has_end
from adc_worker.redaction import public_url

_WHOLE = ".img"
_PARTIAL = ".part"
_SNIFF_BYTES = 512
# What no camera writes at the start of a file: pages and documents, and streams that something on the way compressed.
_PAGE_STARTS = (b"<", b"{", b"[", b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_DIGEST_CHARACTERS = 32
ABANDONED_AFTER_S = 7 * 86_400.0  # chosen; tasks live for 24 h in their stream
ADOPTION_S = 3600.0
# Number of the task, then a digest of its image. Versions before named files by the number alone.
# A partial file also has the name of the area that writes it, and so of its process.
_FILE_NAME = re.compile(rf"(?P<task>[0-9]+)-[0-9a-f]{{{_DIGEST_CHARACTERS}}}(\.img|\.[0-9a-f]{{16}}\.part)", re.ASCII)
_FILE_NAME_BY_NUMBER = re.compile(r"[0-9]+\.(img|part)", re.ASCII)
# Staged files up to this total stay in the page cache, for the decoder that reads them next; the rest waits on disk.
CACHED_AHEAD_BYTES = 128_000_000


@dataclass(frozen=True, slots=True)
class StagedImage:
    """An image whose bytes are on this host's disk. `id` is its task's number in the journal."""

    id: int
    task: Task
    path: Path
    header: ImageHeader
    download: DownloadStats
    staged_at: float  # monotonic seconds
    urgent: bool = False  # on its last delivery
    suspect: bool = False  # a process died while it worked on it: runs alone, decoded in a process of its own


class StagedQueue:
    """Staged images on their way to whoever decodes next: the probe first, then the feeder, one reader at a time.

    Attributes:
        still_wanted: settles an image whose lease is over, and says so, before it is decoded.
        changed: guards the rest, and is waited for.
        images: urgent ones, then the oldest first; what is taken out is the reader's.
        ended: whether no image will follow.
    """

    def __init__(self, still_wanted: Callable[[StagedImage], bool] | None = None) -> None:
        self.still_wanted = still_wanted or (lambda _image: True)
        self.changed = threading.Condition()
        self.images: list[StagedImage] = []
        self.ended = False

    def put(self, image: StagedImage) -> None:
        """Add an image, or give one back; an urgent one goes before all others."""
        with self.changed:
            insort(self.images, image, key=lambda one: (not one.urgent, one.staged_at))
            self.changed.notify_all()

    def end(self) -> None:
        """Say that no image will follow."""
        with self.changed:
            self.ended = True
            self.changed.notify_all()

    def get(self, *, largest: bool = False) -> StagedImage | None:
        """Wait for the next image, or for the largest of those that are there; None at the end."""
        with self.changed:
            self.changed.wait_for(lambda: self.images or self.ended)
            if not self.images:
                return None
            sizes = [image.header.pixel_bytes if largest else 0 for image in self.images]
            return self.images.pop(sizes.index(max(sizes)))


class StagingArea:
    """A private folder of compressed images, one file per held task.

    A file's name is the number of its task and a digest of the image that the task names. Numbers come again where a
    journal was put back from a backup or copied; with the digest a file is only ever taken for its own image. Journals
    that are different files have different folders, named by `owner`, wherever they lie and however they are named.
    """

    def __init__(
        self,
        folder: Path,
        client: ImageClient,
        max_pixels: int,
        most_bytes: int | None = None,
        now: Callable[[], float] = time.monotonic,
        owner: str = "",
    ) -> None:
        self._shared_folder = folder
        self._folder = folder / owner
        self._client = client
        self._max_pixels = max_pixels
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            anybody_writes = folder.stat().st_mode & stat.S_IWOTH
        except OSError as error:
            if os_error_may_pass(error):
                raise
            raise ConfigurationError(
                f"AMI_STAGING_PATH (or AMI_USER_DATA_PATH): cannot use {folder}: {error.strerror}"
            ) from error
        if anybody_writes:  # an operator's folder keeps its mode, so this one cannot be made safe
            raise ConfigurationError(
                f"AMI_STAGING_PATH: anybody may write to {folder}, and could swap images there: name a folder below it"
            )
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._now = now
        self._files: dict[int, Path] = {}  # staged by this process
        self._partial = f".{secrets.token_hex(8)}{_PARTIAL}"  # two that write one file would mix their bytes
        self.disk = DiskBudget(self._folder, most_bytes, now)

    def stage(
        self, task_id: int, task: Task, cancelled: Callable[[], bool], *, url_erased: bool = False
    ) -> StagedImage:
        """Download a task's image, unless an earlier run already did, and read its header.

        `url_erased`: one did, and what opens the URL was forgotten then.

        Raises:
            ImageError: the evidence is in the image; the file is removed.
            LinkError: try again later.
            StagedFileLost: a power cut took the file.
            StagingFull: the disk is full; no fault of the image's, and a pause is on.
        """
        path = self._path(task_id, task)
        if path.exists():
            # A power cut may have taken bytes that were not on the disk yet: what cannot be read is asked for again.
            with suppress(ImageError):
                return self._staged(task_id, task, path, DownloadStats(0.0, 0.0, path.stat().st_size))
        if url_erased:
            raise StagedFileLost(
                "a power cut took its staged file, and its URL opens no more: what signed it was erased"
            )
        self._remove(task_id)  # of another image, that the task of this number had
        with self.disk.reserving(task_id):
            try:
                return self._staged(task_id, task, path, self._fetch(path, task, cancelled))
            except OSError as error:
                if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
                    raise
                self.disk.disk_full(task_id)
                raise StagingFull(str(error)) from error

    def serves(self, task_id: int, url: str, cancelled: Callable[[], bool]) -> bool:
        """Whether a URL brings an image now. The file is never named as a staged one, and is removed at once.

        `task_id`: of the task in whose name this is asked, and on whose room on the disk.

        Raises:
            LinkError: no answer came that says so; nor from a full or broken disk, which raises OSError.
        """
        path = (self._folder / _file_name(task_id, "", url)).with_suffix(self._partial)
        try:
            with path.open("wb") as file:
                path.chmod(0o600)
                self._client.download(url, file.fileno(), cancelled)
            read_header(path, self._max_pixels)
        except (ImageError, ImageRefused):
            return False
        finally:
            path.unlink(missing_ok=True)
        return True

    def is_staged(self, task_id: int, task: Task) -> bool:
        """Whether a task's file is there: to take it up again takes no room on the disk."""
        return self._path(task_id, task).exists()

    def _path(self, task_id: int, task: Task) -> Path:
        return self._folder / _file_name(task_id, task.image_id, task.image_url)

    def _staged(self, task_id: int, task: Task, path: Path, stats: DownloadStats) -> StagedImage:
        try:
            header = read_header(path, self._max_pixels)
        except ImageError as error:
            is_page = isinstance(error, ImageUnreadable) and _is_page(path)
            path.unlink(missing_ok=True)
            self.disk.release(task_id)
            if is_page:
                raise NotAnImage(str(error)) from error
            raise
        self._files[task_id] = path
        self.disk.charge(task_id, header.compressed_bytes)
        return StagedImage(task_id, task, path, header, stats, self._now())

    def discard(self, task_id: int) -> None:
        """Remove a task's file and end what it is charged for."""
        known = self._files.pop(task_id, None)
        if known is not None:
            known.unlink(missing_ok=True)
        else:
            self._remove(task_id)
        self.disk.release(task_id)

    def _remove(self, task_id: int) -> None:
        for file in self._folder.glob(f"{task_id}-*"):
            if _FILE_NAME.fullmatch(file.name):
                file.unlink(missing_ok=True)

    def adopt(self, folder: Path, tasks: Mapping[int, Task]) -> int:
        """Take the files over that a version before named by the numbers of these tasks alone; return how many.

        The caller knows that nobody else's numbers are in that folder.
        """
        adopted = 0
        for task_id, task in tasks.items():
            file = folder / f"{task_id}{_WHOLE}"
            if file.exists():
                file.rename(self._path(task_id, task))
                adopted += 1
        return adopted

    def sweep(self, known_ids: Callable[[], set[int]]) -> int:
        """Remove the files of tasks the journal does not know (any more), and what nobody needs beside it.

        The folder is listed first: a task is on record before its file exists, so what appears later is not touched.
        Return how many files were removed.
        """
        ours = [(file, match) for file in self._folder.iterdir() if (match := _FILE_NAME.fullmatch(file.name))]
        known = known_ids()
        unknown = [(file, int(match["task"])) for file, match in ours if int(match["task"]) not in known]
        leftovers = [file for file, _task_id in unknown]
        if self._folder != self._shared_folder:
            leftovers += _named_by_number(self._shared_folder)
            leftovers += self._abandoned()
        for file in leftovers:
            file.unlink(missing_ok=True)  # another worker of this host may sweep at the same time
        for _file, task_id in unknown:
            self._files.pop(task_id, None)
            self.disk.release(task_id)
        return len(leftovers)

    def discard_forgotten(self, known_ids: Callable[[], set[int]]) -> int:
        """Remove the files of this process whose tasks the journal does not know any more; return how many.

        Files of other workers of the same journal are theirs: they may be decoding them.
        """
        ours = list(self._files)  # first: a task is on record before its file exists
        known = known_ids()
        forgotten = [task_id for task_id in ours if task_id not in known]
        for task_id in forgotten:
            self.discard(task_id)
        return len(forgotten)

    def _abandoned(self) -> list[Path]:
        """Return the files of other journals in which nothing happened for days: Antenna forgets tasks after a day."""
        oldest_s = time.time() - ABANDONED_AFTER_S
        abandoned: list[Path] = []
        for folder in self._shared_folder.glob("journal-*"):
            if folder == self._folder or not folder.is_dir() or folder.stat().st_mtime > oldest_s:
                continue
            abandoned += [file for file in folder.iterdir() if _FILE_NAME.fullmatch(file.name)]
            abandoned += _named_by_number(folder)
        return abandoned

    def _fetch(self, path: Path, task: Task, cancelled: Callable[[], bool]) -> DownloadStats:
        partial = path.with_suffix(self._partial)
        fd = os.open(partial, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            stats = self._download(partial, fd, task.image_url, cancelled)
            if self.disk.used_bytes > CACHED_AHEAD_BYTES:
                os.fdatasync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)
        partial.rename(path)
        return stats

    def _download(self, partial: Path, fd: int, url: str, cancelled: Callable[[], bool]) -> DownloadStats:
        """Download into a file that is new.

        Where the host does not say how long the image is, one that was cut off on the way looks like one that is stored
        so. It is taken for the latter when it ends at the same place twice.

        Raises:
            LinkError: it ended at different places.
        """
        stats = self._client.download(url, fd, cancelled)
        if stats.end_told or _has_end(partial):
            return stats
        os.lseek(fd, 0, os.SEEK_SET)
        os.ftruncate(fd, 0)
        again = self._client.download(url, fd, cancelled)
        if again.size_bytes != stats.size_bytes and not _has_end(partial):
            raise LinkError(
                f"the image's host does not say how long the image is, and its body ended after {stats.size_bytes}"
                f" bytes and then after {again.size_bytes}"
            )
        return again


def _has_end(path: Path) -> bool:
    """Whether a file is known to be whole; only of JPEGs this is looked into."""
    if path.stat().st_size == 0:
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return has_end(data)


def _is_page(path: Path) -> bool:
    """Whether a file is a page, text or a compressed stream, which hosts and portals send in place of any image."""
    with path.open("rb") as file:
        start = file.read(_SNIFF_BYTES)
    text = start.removeprefix(_BYTE_ORDER_MARK).lstrip()
    if text.startswith(_PAGE_STARTS):
        return True
    return bool(text) and all(byte >= ord(" ") or byte in b"\t\n\f\r" for byte in text) and _is_utf8(text)


def _is_utf8(start: bytes) -> bool:
    """Whether bytes are text in UTF-8, of which the last character may be cut."""
    try:
        start.decode()
    except UnicodeDecodeError as error:
        return error.end == len(start) and error.reason == "unexpected end of data"
    return True


def _named_by_number(folder: Path) -> list[Path]:
    """Return the files that a version before left there: which images they are of is not known.

    Those of the last hour are left: another worker of the same journal may be about to adopt them.
    """
    newest_s = time.time() - ADOPTION_S
    files = [file for file in folder.iterdir() if _FILE_NAME_BY_NUMBER.fullmatch(file.name)]
    return [file for file in files if _changed_before(file, newest_s)]


def _changed_before(file: Path, unix_s: float) -> bool:
    """Whether a file is there and was changed last before a time; another worker may remove it at any moment."""
    try:
        return file.stat().st_mtime < unix_s
    except FileNotFoundError:
        return False


def _file_name(task_id: int, image_id: str, url: str) -> str:
    """Return the name of a task's file: it says which image is in it, by what tells images apart and never changes."""
    image = f"{image_id}\n{public_url(url)}".encode(errors="surrogatepass")
    digest = hashlib.sha256(image).hexdigest()[:_DIGEST_CHARACTERS]
    return f"{task_id}-{digest}{_WHOLE}"
