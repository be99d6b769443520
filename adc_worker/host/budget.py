"""What this machine gives one worker: memory, cores, disk, descriptors. Measured anew with every batch."""

from __future__ import annotations

import math
import os
import re
import resource
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import psutil

from adc_worker.host import memory
from adc_worker.host.share import MemoryShare

# Who shares a limit with us may take as much again as they hold, up to this part of it; where less is left, earlyoom
# (10 % by default) and the kernel begin to choose whom to kill.
OTHERS_RESERVE = 0.1


@dataclass(frozen=True, slots=True)
class HostBudget:
    """This process's share of the machine, in bytes and counts.

    Attributes:
        limit_bytes: this worker's part, while others of this host work, of the memory limit that binds it.
        limit_source: where that limit was found.
        available_bytes: what it may take on top of what it uses, beside what others hold and what is left to them.
        used_bytes: memory of this worker's processes now, its arena included.
        cores: cores this process may use, by affinity and cgroup quota.
        staging_bytes: what staged images may take.
        staging_in_memory: whether they take it from memory, for want of a disk.
        descriptors: open files allowed.
        gpu: whether inference runs on a GPU.
        caution: part of the limit to plan with; below 1 after the kernel has killed a predecessor.
        reserve_bytes: what `available_bytes` leaves to others, or to the kernel's own use in our name.
        vram_free_bytes: free memory of the GPU.
        hard_limit_bytes: the whole of that limit, which nothing that others do makes smaller; 0: `limit_bytes`.
        claimed_bytes: what other workers of this host have said that they may use now.
    """

    limit_bytes: int
    limit_source: str
    available_bytes: int
    used_bytes: int
    cores: int
    staging_bytes: int
    descriptors: int
    gpu: bool = False
    staging_in_memory: bool = False
    caution: float = 1.0
    reserve_bytes: int = 0
    vram_free_bytes: int = 0
    hard_limit_bytes: int = 0
    claimed_bytes: int = 0

    @property
    def whole_limit_bytes(self) -> int:
        """Return what this worker could have if it were alone: only what exceeds this is too large for good."""
        return max(self.limit_bytes, self.hard_limit_bytes)

    @property
    def alone_bytes(self) -> int:
        """Return what one image may take now, while nothing else is decoded: the reserve, too."""
        return self.available_bytes + self.reserve_bytes

    def who_holds_it(self) -> str:
        """Return in words where the memory is, and what an operator can do about it."""
        return (
            f"of {_mb(self.whole_limit_bytes)} ({self.limit_source}) this worker uses {_mb(self.used_bytes)}, other"
            f" workers of this host may use {_mb(self.claimed_bytes)}, and {_mb(self.alone_bytes)} can be had beside"
            " what other programs use: stop some of them, or raise the limit if it is too low for the machine"
        )

    def __post_init__(self) -> None:
        if self.limit_bytes <= 0 or self.cores < 1:
            raise ValueError(f"a host has memory and at least one core, not {self}")


def measure(
    used_bytes: int,
    share: MemoryShare,
    limit_bytes: int | None,
    staging_bytes: int,
    *,
    staging_in_memory: bool,
    vram_free_bytes: int | None,
) -> HostBudget:
    """Measure the host; `used_bytes` is what this worker's processes hold, `limit_bytes` AMI_MEMORY_LIMIT_BYTES.

    `vram_free_bytes` is None where inference runs on the CPU.
    """
    found = memory.memory_limit()
    # The reserve is kept out of the memory of the machine, or of the group, not out of a limit of ours alone.
    held_by_others = found.limit_bytes - found.available_bytes - used_bytes
    reserve = max(0, min(held_by_others, int(OTHERS_RESERVE * found.limit_bytes)))
    limit, source = found.limit_bytes, found.source
    if limit_bytes is not None and limit_bytes < limit:
        limit, source = limit_bytes, "AMI_MEMORY_LIMIT_BYTES"
    claims = share.others()
    claimed_bytes = sum(claim.size_bytes for claim in claims)
    idle_bytes = sum(claim.size_bytes for claim in claims if not claim.busy)
    unclaimed = limit - claimed_bytes - used_bytes
    room = max(0, min(found.available_bytes, unclaimed))
    available = max(0, min(found.available_bytes - reserve, unclaimed))
    return HostBudget(
        limit_bytes=max(1, (limit - idle_bytes) // (1 + sum(claim.busy for claim in claims))),
        limit_source=source,
        available_bytes=available,
        used_bytes=used_bytes,
        cores=allowed_cores(),
        staging_bytes=staging_bytes,
        staging_in_memory=staging_in_memory,
        descriptors=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        gpu=vram_free_bytes is not None,
        caution=share.caution,
        reserve_bytes=room - available,
        vram_free_bytes=vram_free_bytes or 0,
        hard_limit_bytes=limit,
        claimed_bytes=claimed_bytes,
    )


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.0f} MB"


def allowed_cores(root: Path = Path("/")) -> int:
    """Return the cores of the affinity mask, or the cgroup's CPU quota in whole cores where that is less."""
    quotas = [float(len(os.sched_getaffinity(0)))]
    for folder in memory.cgroup_folders("cpu", root):
        with suppress(OSError):
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            quotas.append(int(quota) / int(period) if int(quota) > 0 else math.inf)
    for folder in memory.cgroup_folders("", root):
        with suppress(OSError):
            quota, period = (folder / "cpu.max").read_text().split()
            quotas.append(int(quota) / int(period) if quota != "max" else math.inf)
    return max(1, int(min(quotas)))


def raise_descriptor_limit() -> int:
    """Raise the soft limit of open files to the hard one and return it."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def visible_gpus() -> list[str]:
    """Return the GPUs this process may use, named as in CUDA_VISIBLE_DEVICES: indices, UUIDs of GPUs or of MIG slices.

    Without that variable they come from `nvidia-smi -L`: CUDA by itself shows a process one MIG slice only.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        entries = [entry.strip() for entry in visible.split(",")]
        return list(takewhile(lambda entry: entry not in {"", "-1"}, entries))  # CUDA, too, stops at the first of these
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True)  # noqa: S607
    except (OSError, subprocess.SubprocessError):
        return []  # no driver
    return parse_gpu_list(listed.stdout)


def parse_gpu_list(text: str) -> list[str]:
    """Return the UUIDs that `nvidia-smi -L` lists; a GPU in MIG mode stands for its slices."""
    uuids = re.findall(r"UUID: ((?:GPU|MIG)-[^)\s]+)", text)
    return [one for one, after in zip(uuids, [*uuids[1:], ""], strict=True) if not (one[0] == "G" and after[:1] == "M")]


def file_system(folder: Path) -> str:
    """Return the type of the file system that `folder` is on, such as ext4, tmpfs or nfs4; empty where unknown."""
    resolved = folder.resolve()
    mounts = [mount for mount in psutil.disk_partitions(all=True) if resolved.is_relative_to(mount.mountpoint)]
    return max(mounts, key=lambda mount: len(mount.mountpoint)).fstype if mounts else ""
