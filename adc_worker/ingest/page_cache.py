"""Keeps the page cache of staged files small: dirty pages are written as they come, clean ones dropped when told.

A memory limit counts the page cache, too; dirty pages it cannot take back at once.
"""

from __future__ import annotations

import ctypes
import os

# sync_file_range(2): start writing, and with all three wait for it. Not in os; it never touches metadata.
_WRITE, _WRITE_AND_WAIT = 2, 1 | 2 | 4
_libc = ctypes.CDLL(None)


def write_back(fd: int, start: int, end: int) -> None:
    """Start writing the pages between two offsets, without waiting."""
    _sync_file_range(fd, start, end - start, _WRITE)


def drop(fd: int) -> None:
    """Write what is dirty, wait for it, and drop the file's pages."""
    _sync_file_range(fd, 0, 0, _WRITE_AND_WAIT)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _sync_file_range(fd: int, offset: int, size_bytes: int, flags: int) -> None:
    # An error here (a file system without it) costs memory pressure, nothing else: the data is written all the same.
    _libc.sync_file_range(fd, ctypes.c_int64(offset), ctypes.c_int64(size_bytes), flags)
