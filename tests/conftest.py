"""Fixtures of the whole suite: nothing that a test starts may outlive it."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.support.waiting import wait_until

LEAK_TIMEOUT_S = 20.0


def _open_files() -> dict[int, str]:
    files = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            files[int(entry.name)] = str(entry.readlink())
        except FileNotFoundError:
            continue  # the listing's own descriptor
    return files


def _leaks(threads: set[threading.Thread], children: set[int], files: dict[int, str]) -> list[str]:
    found = [f"thread {thread.name}" for thread in threading.enumerate() if thread not in threads]
    found += [f"file {fd}: {target}" for fd, target in _open_files().items() if files.get(fd) != target]
    for child in psutil.Process().children():
        if child.pid not in children:
            with suppress(psutil.NoSuchProcess):  # it ends just now
                found.append(f"process {child.pid}: {child.cmdline() if child.status() != 'zombie' else 'a zombie'}")
    return found


@pytest.fixture(autouse=True)
def _nothing_leaks() -> Iterator[None]:
    """After each test the threads, child processes and open files are those from before it."""
    threads, children = set(threading.enumerate()), {child.pid for child in psutil.Process().children()}
    files = _open_files()
    yield
    if not _leaks(threads, children, files):
        return

    def nothing_left() -> bool:
        gc.collect()  # a file in a reference cycle is no leak; only here: with torch loaded it takes 0.15 s
        return not _leaks(threads, children, files)

    try:
        wait_until(nothing_left, timeout_s=LEAK_TIMEOUT_S)
    except TimeoutError:
        pytest.fail("left behind: " + "; ".join(_leaks(threads, children, files)))


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No AMI_ variable and no .env of the developer's reaches a test."""
    for name in list(os.environ):
        if name.startswith("AMI_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
