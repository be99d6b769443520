"""Compressed images on disk: downloaded there, decoded from there, removed when their result is kept."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from adc_worker.antenna.wire import Task
from adc_worker.errors import ConfigurationError, ImageError
from adc_worker.ingest.download import DownloadStats, ImageClient
from adc_worker.ingest.header import ImageHeader, read_header

_PARTIAL = ".part"


@dataclass(frozen=True, slots=True)
class StagedImage:
    """An image whose bytes are on this host's disk. `id` is its task's number in the journal."""

    id: int
    task: Task
    path: Path
    header: ImageHeader
    download: DownloadStats
    staged_at: float  # monotonic seconds


class StagingArea:
    """A private folder of compressed images, one file per held task, named by the task's number alone."""

    def __init__(self, folder: Path, client: ImageClient, max_pixels: int) -> None:
        self._folder = folder
        self._client = client
        self._max_pixels = max_pixels
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)
        except OSError as error:
            raise ConfigurationError(
                f"AMI_STAGING_PATH (or AMI_USER_DATA_PATH): cannot use {folder}: {error.strerror}"
            ) from error

    def stage(self, task_id: int, task: Task, cancelled: Callable[[], bool]) -> StagedImage:
        """Download a task's image, unless an earlier run already did, and read its header.

        Raises:
            ImageError: the evidence is in the image; the file is removed.
            LinkError: try again later.
        """
        path = self._folder / f"{task_id}.img"
        stats = DownloadStats(0.0, 0.0, path.stat().st_size) if path.exists() else self._fetch(path, task, cancelled)
        try:
            header = read_header(path, self._max_pixels)
        except ImageError:
            path.unlink(missing_ok=True)
            raise
        return StagedImage(task_id, task, path, header, stats, time.monotonic())

    def discard(self, task_id: int) -> None:
        (self._folder / f"{task_id}.img").unlink(missing_ok=True)

    def sweep(self, known_ids: Callable[[], set[int]]) -> int:
        """Remove the files of tasks the journal does not know (any more); return how many.

        The folder is listed first: a task is on record before its file exists, so what appears later is not touched.
        """
        files = [file for file in self._folder.iterdir() if _is_ours(file)]
        known = known_ids()
        leftovers = [file for file in files if int(file.stem) not in known]
        for file in leftovers:
            file.unlink(missing_ok=True)
        return len(leftovers)

    def _fetch(self, path: Path, task: Task, cancelled: Callable[[], bool]) -> DownloadStats:
        partial = path.with_suffix(_PARTIAL)
        fd = os.open(partial, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            stats = self._client.download(task.image_url, fd, cancelled)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)
        partial.rename(path)
        return stats


def _is_ours(file: Path) -> bool:
    return file.suffix in {".img", _PARTIAL} and file.stem.isdigit()
