"""What this machine gives one worker: memory, cores, disk, descriptors. Measured once per job."""

from __future__ import annotations

import os
import resource
import shutil
from dataclasses import dataclass
from pathlib import Path

from adc_worker.host import memory


@dataclass(frozen=True, slots=True)
class HostBudget:
    """This process's share of the machine, in bytes and counts.

    Attributes:
        limit_bytes: the memory limit that binds this worker and all its processes.
        limit_source: where it was found.
        available_bytes: what the host can still give (MemAvailable).
        used_bytes: anonymous + shared memory of this worker's process tree now.
        cores: cores this process may run on.
        disk_free_bytes: free space where images are staged.
        descriptors: open files allowed.
        gpu: whether inference runs on a GPU.
    """

    limit_bytes: int
    limit_source: str
    available_bytes: int
    used_bytes: int
    cores: int
    disk_free_bytes: int
    descriptors: int
    gpu: bool = False

    def __post_init__(self) -> None:
        if self.limit_bytes <= 0 or self.cores < 1:
            raise ValueError(f"a host has memory and at least one core, not {self}")


def measure(staging_path: Path, tree_root_pid: int, limit_bytes: int | None, *, gpu: bool) -> HostBudget:
    """Measure the host; `limit_bytes` is AMI_MEMORY_LIMIT_BYTES, `tree_root_pid` the process whose tree counts."""
    found = memory.memory_limit()
    limit, source = found.limit_bytes, found.source
    if limit_bytes is not None and limit_bytes < limit:
        limit, source = limit_bytes, "AMI_MEMORY_LIMIT_BYTES"
    return HostBudget(
        limit_bytes=limit,
        limit_source=source,
        available_bytes=found.available_bytes,
        used_bytes=memory.tree_memory_bytes(tree_root_pid),
        cores=len(os.sched_getaffinity(0)),
        disk_free_bytes=shutil.disk_usage(staging_path).free,
        descriptors=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        gpu=gpu,
    )


def raise_descriptor_limit() -> int:
    """Raise the soft limit of open files to the hard one and return it."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def count_gpus() -> int:
    """Count the GPUs this process may use, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([part for part in visible.split(",") if part.strip() not in {"", "-1"}])
    driver = Path("/proc/driver/nvidia/gpus")
    return len(list(driver.iterdir())) if driver.is_dir() else 0
