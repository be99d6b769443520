"""Names for processes that stay unique where process ids do not: across containers, restarts and hosts."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PID_NAMESPACE = Path("/proc/self/ns/pid")


def process_scope() -> str:
    """Return what tells the process ids that this process sees from those of other containers and other boots."""
    boot_id = ""
    namespace = ""
    with suppress(OSError):  # hidden in some sandboxes: then the random part alone tells names apart
        boot_id = _BOOT_ID.read_text().strip()
    with suppress(OSError):
        namespace = str(_PID_NAMESPACE.readlink())
    return f"{boot_id}/{namespace}/"


def process_name(pid: int) -> str:
    """Return the start of the names that the process with this id, as seen from here, gives itself."""
    return f"{process_scope()}{pid}/"


def new_process_name() -> str:
    """Return a name of this process that nothing else ever has."""
    return f"{process_name(os.getpid())}{secrets.token_hex(8)}"
