"""Where a worker's socket and the report of its last job are."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def socket_path(folder: Path, pid: int | str) -> Path:
    """Return where the parent `pid` listens; several hosts may share the folder."""
    return folder / f"worker-{socket.gethostname()}-{pid}.sock"


def report_path(folder: Path) -> Path:
    """Return where the status at the end of the last job is kept."""
    return folder / "last-job.json"


@contextmanager
def socket_address(path: Path) -> Iterator[str]:
    """Return an address for a Unix socket at any path.

    An address has 107 bytes at most. Through the descriptor of its folder every path fits.
    """
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
