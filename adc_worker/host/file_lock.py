"""Locks on files that show other processes of this host that somebody is alive.

A lock goes with its process, however that ends.
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Self

# What flock() says on file systems that have none: Lustre, some NFS and FUSE.
_NO_LOCKS_HERE = frozenset({errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL})


class LocksNotSupported(OSError):
    """The file system has no locks: nobody can tell there who is alive."""


class FileLock:
    """An exclusive lock on a file, held until it is closed."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    @classmethod
    def try_take(cls, path: Path) -> Self | None:
        """Take the lock on a file, which is made if need be; None while somebody else holds it.

        Raises:
            LocksNotSupported: the file system has no locks.
            OSError: the file cannot be opened.
        """
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            taken = _try_flock(descriptor, fcntl.LOCK_EX, path)
        except BaseException:
            os.close(descriptor)
            raise
        if not taken:
            os.close(descriptor)
            return None
        return cls(descriptor)

    def close(self) -> None:
        os.close(self.descriptor)


def is_locked(path: Path) -> bool:
    """Whether somebody holds the exclusive lock on a file that exists.

    Raises:
        LocksNotSupported: the file system has no locks.
        OSError: the file cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return not _try_flock(descriptor, fcntl.LOCK_SH, path)
    finally:
        os.close(descriptor)


def _try_flock(descriptor: int, kind: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS_HERE:
            raise LocksNotSupported(error.errno, "this file system has no locks", str(path)) from error
        raise
    return True
