"""Runs a process tree under a memory limit of the kernel and measures what it holds.

Where no memory cgroup can be made (not root, cgroup v2 without delegation) nothing limits the tree, and its
proportional set size is sampled instead.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import psutil

MOUNT = Path("/sys/fs/cgroup")
KILL_TIMEOUT_S = 10.0
_KIB = 1024


class Enclosure(Protocol):
    """Where the measured tree runs. Leaving it kills what is left."""

    kind: str

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None: ...

    def spawn(self, command: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen[str]:
        """Start `command` inside, in a session of its own, its stderr piped."""
        ...

    def pids(self) -> list[int]: ...

    def held_bytes(self) -> int:
        """Anonymous + shared memory now."""
        ...

    def usage_bytes(self) -> int | None:
        """All that is charged now, page cache included."""
        ...

    def max_usage_bytes(self) -> int | None:
        """The peak of that, as the kernel saw it."""
        ...

    def oom_kills(self) -> int | None: ...


def enclose(limit_bytes: int) -> Enclosure:
    """Return a memory cgroup of `limit_bytes`, or what stands in for one."""
    for layout in (_V1, _V2):
        folder = layout.own_folder()
        if folder is not None and layout.usable(folder):
            return MemoryCgroup(layout, folder / f"adc-bench-{os.getpid()}", limit_bytes)
    return MeasuredTree()


@dataclass(frozen=True, slots=True)
class _Layout:
    """The names that cgroup versions give to the same things."""

    kind: str
    controllers: str  # as in /proc/self/cgroup
    base: Path
    limit: str
    usage: str
    peak: str
    events: str
    statistics: tuple[str, str]  # anonymous, shared

    def own_folder(self) -> Path | None:
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _number, controllers, path = line.split(":", 2)
            if self.controllers == controllers and (self.base / "cgroup.procs").exists():
                folder = self.base / path.lstrip("/")
                return folder if folder.is_dir() else self.base
        return None

    def usable(self, folder: Path) -> bool:
        trial = folder / f"adc-bench-trial-{os.getpid()}"
        try:
            trial.mkdir()
        except OSError:
            return False
        try:
            return (trial / self.limit).exists()
        finally:
            trial.rmdir()


_V1 = _Layout(
    "memory cgroup v1", "memory", MOUNT / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
    "memory.max_usage_in_bytes", "memory.oom_control", ("total_rss", "total_shmem"),
)  # fmt: skip
_V2 = _Layout(
    "memory cgroup v2", "", MOUNT, "memory.max", "memory.current", "memory.peak", "memory.events", ("anon", "shmem")
)


class MemoryCgroup:
    """A cgroup below our own with a hard limit; gone, with all that runs in it, when the `with` ends."""

    def __init__(self, layout: _Layout, folder: Path, limit_bytes: int) -> None:
        self.kind = layout.kind
        self._layout = layout
        self._folder = folder
        self._limit_bytes = limit_bytes

    def __enter__(self) -> Self:
        self._folder.mkdir()
        (self._folder / self._layout.limit).write_text(str(self._limit_bytes))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        deadline = time.monotonic() + KILL_TIMEOUT_S
        while (pids := self.pids()) and time.monotonic() < deadline:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        while time.monotonic() < deadline:
            try:
                self._folder.rmdir()
            except OSError:  # busy: the last process is still on its way out
                time.sleep(0.05)
            else:
                return

    @property
    def within(self) -> list[str]:
        """The start of a command line that runs the rest of it in here."""
        # The shell enters before it becomes the program: no page of it is charged elsewhere.
        return ["sh", "-c", f'echo $$ > "{self._folder}/cgroup.procs" && exec "$@"', "sh"]

    def spawn(self, command: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen[str]:
        return _start([*self.within, *command], env)

    def pids(self) -> list[int]:
        return [int(line) for line in (self._folder / "cgroup.procs").read_text().split()]

    def held_bytes(self) -> int:
        values = _key_values(self._folder / "memory.stat")
        return sum(values[name] for name in self._layout.statistics)

    def usage_bytes(self) -> int | None:
        return int((self._folder / self._layout.usage).read_text())

    def max_usage_bytes(self) -> int | None:
        file = self._folder / self._layout.peak
        return int(file.read_text()) if file.exists() else None

    def oom_kills(self) -> int | None:
        return _key_values(self._folder / self._layout.events).get("oom_kill")


@dataclass(slots=True)
class MeasuredTree:
    """No limit; PSS of the started tree."""

    kind: str = "no limit, PSS of the tree"
    _roots: list[subprocess.Popen[str]] = field(default_factory=list)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def spawn(self, command: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen[str]:
        process = _start(command, env)
        self._roots.append(process)
        return process

    def pids(self) -> list[int]:
        found = []
        for root in self._roots:
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(root.pid)
                found += [process.pid, *(child.pid for child in process.children(recursive=True))]
        return found

    def held_bytes(self) -> int:
        return sum(_pss_bytes(pid) for pid in self.pids())

    def usage_bytes(self) -> int | None:
        return None

    def max_usage_bytes(self) -> int | None:
        return None

    def oom_kills(self) -> int | None:
        return None


def _start(command: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        env=dict(env),
        stdin=subprocess.PIPE,  # a worker without its parent takes the end of it for the parent's
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _pss_bytes(pid: int) -> int:
    with suppress(OSError):  # it ended
        values = _key_values(Path(f"/proc/{pid}/smaps_rollup"))
        return (values["Pss_Anon:"] + values["Pss_Shmem:"]) * _KIB
    return 0


def _key_values(file: Path) -> dict[str, int]:
    pairs = (line.split() for line in file.read_text().splitlines())
    return {words[0]: int(words[1]) for words in pairs if len(words) > 1 and words[1].isdecimal()}
