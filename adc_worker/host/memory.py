"""How much memory this process may use, and how much its process tree uses.

Limits come from the process's own cgroup path (v1, v2 and both) and MemTotal. Use is anonymous memory of the tree, to
which the arena adds itself: never page cache, never a sum of RSS. Every figure takes some 20 us to read, where the
kernel's own proportional set size would take 20 ms.
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
        available_bytes: what can still be had without swapping: MemAvailable, or what is left in a limited cgroup.
        source: where `limit_bytes` was found, for the log and for people.
    """

    limit_bytes: int
    available_bytes: int
    source: str


# Of cgroup v1 and v2: the controller, its limits, its usage, and what of memory.stat the kernel takes back when needed.
_V1 = ("memory", ("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
_V2 = ("", ("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file", "slab_reclaimable"))


def memory_limit(root: Path = Path("/")) -> MemoryLimit:
    """Find the limit that binds the calling process; `root` stands for / in tests."""
    meminfo = _key_values(root / "proc/meminfo")
    candidates = [(int(meminfo["MemTotal:"]) * _KIB, "MemTotal")]
    available = [int(meminfo["MemAvailable:"]) * _KIB]
    for controller, limits, usage_name, reclaimable in (_V1, _V2):
        for folder in cgroup_folders(controller, root):
            found = [(limit, str(folder / name)) for name in limits if (limit := _number_in(folder / name))]
            candidates += found
            usage = _number_in(folder / usage_name)
            if found and usage is not None:
                statistics = _key_values(folder / "memory.stat")
                held = usage - sum(int(statistics.get(name, 0)) for name in reclaimable)
                available.append(max(0, min(found)[0] - held))
    limit, source = min(candidates)
    return MemoryLimit(limit, min(available), source)


def cgroup_folders(controller: str, root: Path = Path("/")) -> Iterator[Path]:
    """Yield our group of a v1 controller, or of v2 for "", and every group above it: the limits of all of them hold."""
    mounts = [root / "sys/fs/cgroup" / controller]
    if not controller:
        mounts.append(root / "sys/fs/cgroup/unified")  # where systemd's hybrid layout has v2
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _hierarchy, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            own = Path(path.lstrip("/"))
            for base in mounts:
                # A namespaced path may not exist below the mount: then the mount is ours.
                yield from (base / group for group in (own, *own.parents))


def _number_in(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None  # controller not mounted here, or the path is outside our namespace
    return None if text == "max" or int(text) >= _NO_LIMIT_BYTES else int(text)


def oom_kills(root: Path = Path("/")) -> int:
    """Return how many processes of our cgroup, or else of the machine, the kernel has killed for want of memory."""
    for controller, name in (("memory", "memory.oom_control"), ("", "memory.events")):
        for folder in cgroup_folders(controller, root):
            if (folder / name).is_file():
                return int(_key_values(folder / name).get("oom_kill", 0))
    return machine_oom_kills(root)


def machine_oom_kills(root: Path = Path("/")) -> int:
    """Return how many processes of this machine, ours or not, the kernel has killed for want of memory since boot."""
    return int(_key_values(root / "proc/vmstat").get("oom_kill", 0))


def stalled_percent(root: Path = Path("/")) -> float:
    """Return the share of the last 10 s in which some process waited for memory (PSI), 0 where the kernel hides it."""
    for file in (*(folder / "memory.pressure" for folder in cgroup_folders("", root)), root / "proc/pressure/memory"):
        with suppress(OSError):  # not built in, switched off, or not of this group
            return float(file.read_text().split("avg10=", 1)[1].split()[0])
    return 0.0


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
