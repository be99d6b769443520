"""How much of a disk staged images may fill. A full disk pauses staging and makes it smaller; it fails no task."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from adc_worker.host.budget import file_system
from adc_worker.log import get_logger

_log = get_logger(__name__)

MB = 1_000_000
DISK_SHARE = 0.5  # of what is free at start: the host has other uses for its disk
FREE_FLOOR_SHARE, FREE_FLOOR_MAX_BYTES = 0.05, 2_000 * MB  # left free whatever happens
# Where the folder is memory, staging is only the short buffer between the link and the decoder.
RAM_BUFFER_BYTES = 64 * MB
_MEMORY_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs"})
PAUSE_S = 5.0  # between two attempts on a full disk


class DiskBudget:
    """The bytes that staging may use in a folder; safe to use from several threads.

    A byte is in use for one of two reasons, and ends with it: a download is under way and has reserved room for its
    file (`reserving`), or a file is there (`charge` until `release`).
    """

    def __init__(self, folder: Path, most_bytes: int | None = None, now: Callable[[], float] = time.monotonic) -> None:
        usage = shutil.disk_usage(folder)
        self.in_memory = is_memory(folder)
        share = int(DISK_SHARE * usage.free)
        wanted = min(RAM_BUFFER_BYTES, share) if self.in_memory else share
        self._full_limit_bytes = self.limit_bytes = max(1, min(wanted, most_bytes or wanted))
        self._floor_bytes = min(FREE_FLOOR_MAX_BYTES, int(FREE_FLOOR_SHARE * usage.total))
        self._folder = folder
        self._now = now
        self._lock = threading.Lock()
        self._reserved: dict[int, int] = {}  # bytes by task, of downloads under way
        self._staged: dict[int, int] = {}  # bytes by task, of files that are there
        self._largest = 1
        self._paused_until = 0.0

    @property
    def used_bytes(self) -> int:
        with self._lock:
            return self._sum()

    def _sum(self) -> int:
        return sum(self._reserved.values()) + sum(self._staged.values())

    def has_room(self) -> bool:
        """Whether one more download may start; one always may when nothing is staged and the disk takes it."""
        if self._now() < self._paused_until:
            return False
        used = self.used_bytes
        if used and used >= self.limit_bytes:
            return False
        return used == 0 or shutil.disk_usage(self._folder).free > self._floor_bytes

    @contextmanager
    def reserving(self, task_id: int) -> Iterator[None]:
        """Reserve room for a download as long as the body of the `with` runs, whatever ends it."""
        self.reserve(task_id)
        try:
            yield
        finally:
            self.unreserve(task_id)

    def reserve(self, task_id: int) -> None:
        """Reserve room for a download that is about to begin: as much as the largest file so far.

        `unreserve` must follow. A task whose file is there, and is charged, needs no room.
        """
        with self._lock:
            if task_id not in self._staged:
                self._reserved[task_id] = self._largest

    def unreserve(self, task_id: int) -> None:
        """Say that a download has ended, however it did. The charge of a file that came of it stays."""
        with self._lock:
            self._reserved.pop(task_id, None)

    def charge(self, task_id: int, size_bytes: int) -> None:
        """Charge a task's file with its size, in place of what its download had reserved."""
        with self._lock:
            self._reserved.pop(task_id, None)
            self._staged[task_id] = size_bytes
            self._largest = max(self._largest, size_bytes)

    def release(self, task_id: int) -> None:
        """Say that a task's file is gone; a limit that was cut grows back with every file that went its way."""
        with self._lock:
            if self._staged.pop(task_id, None) is None:
                return
            self.limit_bytes = min(self._full_limit_bytes, self.limit_bytes + self._largest)

    def disk_full(self, task_id: int) -> None:
        """A task's download found no space: pause, and plan with half of what the others have staged."""
        with self._lock:
            self._reserved.pop(task_id, None)
            self._staged.pop(task_id, None)  # not by release(): a file that failed makes no limit grow
            used = self._sum()
            self._paused_until = self._now() + PAUSE_S
            self.limit_bytes = min(self.limit_bytes, max(1, used // 2))
        _log.warning(
            "disk_full",
            folder=str(self._folder),
            staged_bytes=used,
            limit_bytes=self.limit_bytes,
            retry_in_s=PAUSE_S,
            note="free some space, or set AMI_STAGING_PATH to another disk",
        )


def is_memory(folder: Path) -> bool:
    """Whether files in `folder` are memory (tmpfs, ramfs)."""
    return file_system(folder) in _MEMORY_FILE_SYSTEMS
