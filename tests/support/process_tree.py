"""What the kernel knows of a worker's processes."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil


def family(pid: int) -> list[psutil.Process]:
    """Return a process and all below it."""
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def alive(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Return those that have not ended; a zombie has."""
    found = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def decoders(pid: int) -> list[psutil.Process]:
    """Return the decode processes below a process."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if any("decode_worker" in word for word in process.cmdline()):
                found.append(process)
    return found


def ignores(pid: int, number: signal.Signals) -> bool:
    (mask,) = [line.split()[1] for line in _status(pid) if line.startswith("SigIgn:")]
    return bool(int(mask, 16) >> (number - 1) & 1)


def anonymous_peak_bytes(pid: int) -> int:
    """Return an upper bound of what a process ever held: its peak of resident memory without its files of now."""
    values = {line.split()[0]: line.split()[1] for line in _status(pid) if line.startswith(("VmHWM", "RssFile"))}
    return (int(values["VmHWM:"]) - int(values["RssFile:"])) * 1024


def _status(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/status").read_text().splitlines()
