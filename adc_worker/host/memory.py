"""How much memory this process may use, and how much its process tree uses.

Limits come from the process's own cgroup path (v1 and v2) and MemTotal. Use is anonymous memory of the tree, to which
the arena adds itself: never page cache, never a sum of RSS.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_NO_LIMIT_BYTES = 1 << 60  # cgroup v1 writes a number near 2^63 where there is no limit
_KIB = 1024


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """The memory limit that binds.

    Attributes:
        limit_bytes: the smallest of all limits found.
        available_bytes: what the host can still give without swapping (MemAvailable, or what is left in the cgroup).
        source: where `limit_bytes` was found, for the log and for people.
    """

    limit_bytes: int
    available_bytes: int
    source: str


def memory_limit(root: Path = Path("/")) -> MemoryLimit:
    """Find the limit that binds the calling process; `root` stands for / in tests."""
    meminfo = _key_values(root / "proc/meminfo")
    total = int(meminfo["MemTotal:"]) * _KIB
    candidates = [(total, "MemTotal"), *_cgroup_limits(root)]
    limit, source = min(candidates)
    return MemoryLimit(limit, int(meminfo["MemAvailable:"]) * _KIB, source)


def _cgroup_limits(root: Path) -> Iterator[tuple[int, str]]:
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _hierarchy, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = root / "sys/fs/cgroup", ["memory.max", "memory.high"]
        elif "memory" in controllers.split(","):
            base, names = root / "sys/fs/cgroup/memory", ["memory.limit_in_bytes"]
        else:
            continue
        # Every ancestor's limit holds too. A namespaced path may not exist below the mount: then the mount is ours.
        for folder in _up_to(base, base / path.lstrip("/")):
            for name in names:
                limit = _limit_in(folder / name)
                if limit is not None:
                    yield limit, str(folder / name)


def _up_to(base: Path, folder: Path) -> Iterator[Path]:
    while folder != base:
        yield folder
        folder = folder.parent
    yield base


def _limit_in(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None  # controller not mounted here, or the path is outside our namespace
    if text == "max" or int(text) >= _NO_LIMIT_BYTES:
        return None
    return int(text)


def anonymous_bytes(pids: Iterable[int]) -> int:
    """Return the anonymous memory of some processes.

    Shared memory is left out: what several processes map would count several times. The arena, the only shared memory
    of this package, tells its own size. Callers know their processes; searching /proc for them takes milliseconds.
    """
    return sum(_anonymous(pid) for pid in pids)


def _anonymous(pid: int) -> int:
    try:
        status = _key_values(Path(f"/proc/{pid}/status"))
    except (FileNotFoundError, ProcessLookupError):
        return 0  # it ended between listing and reading
    return int(status.get("RssAnon:", 0)) * _KIB


def oom_kills(root: Path = Path("/")) -> int:
    """Count the processes of this cgroup (without one: of this host) that the kernel killed for want of memory."""
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _hierarchy, controllers, path = line.split(":", 2)
        v2 = controllers == ""
        if not v2 and "memory" not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / ("" if v2 else "memory")
        for folder in (base / path.lstrip("/"), base):
            file = folder / ("memory.events" if v2 else "memory.oom_control")
            if file.exists() and (count := _key_values(file).get("oom_kill")) is not None:
                return int(count)
    return int(_key_values(root / "proc/vmstat").get("oom_kill", 0))


class PeakResidentMemory:
    """Measures the peak resident memory of this process over an interval, to the page, without sampling.

    Writing 5 to clear_refs resets VmHWM (proc(5)); what the kernel records from then on is the interval's own peak.
    """

    def __init__(self) -> None:
        with suppress(OSError):  # some containers forbid it: then VmHWM is the process's own peak, an upper bound
            Path("/proc/self/clear_refs").write_text("5")
        self._start_bytes = int(_key_values(Path("/proc/self/status"))["VmRSS:"]) * _KIB

    def growth_bytes(self) -> int:
        """Return how far the peak since construction rose above the start."""
        peak = int(_key_values(Path("/proc/self/status"))["VmHWM:"]) * _KIB
        return max(0, peak - self._start_bytes)


def _key_values(file: Path) -> dict[str, str]:
    pairs = (line.split() for line in file.read_text().splitlines())
    return {words[0]: words[1] for words in pairs if len(words) > 1}
