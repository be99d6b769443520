"""What this machine gives one worker: memory, cores, disk, descriptors. Measured once per job."""

from __future__ import annotations

import os
import re
import resource
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import psutil

from adc_worker.host import memory


@dataclass(frozen=True, slots=True)
class HostBudget:
    """This process's share of the machine, in bytes and counts.

    Attributes:
        limit_bytes: the memory limit that binds this worker and all its processes.
        limit_source: where it was found.
        available_bytes: what the host can still give (MemAvailable).
        used_bytes: anonymous memory of this worker's processes now, between jobs: without an arena.
        cores: cores this process may run on.
        staging_bytes: what staged images may take.
        staging_in_memory: whether they take it from memory, for want of a disk.
        descriptors: open files allowed.
        gpu: whether inference runs on a GPU.
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

    def __post_init__(self) -> None:
        if self.limit_bytes <= 0 or self.cores < 1:
            raise ValueError(f"a host has memory and at least one core, not {self}")


def measure(
    pids: Iterable[int], limit_bytes: int | None, staging_bytes: int, *, staging_in_memory: bool, gpu: bool
) -> HostBudget:
    """Measure the host; `limit_bytes` is AMI_MEMORY_LIMIT_BYTES, `pids` are this worker's processes."""
    found = memory.memory_limit()
    limit, source = found.limit_bytes, found.source
    if limit_bytes is not None and limit_bytes < limit:
        limit, source = limit_bytes, "AMI_MEMORY_LIMIT_BYTES"
    return HostBudget(
        limit_bytes=limit,
        limit_source=source,
        available_bytes=found.available_bytes,
        used_bytes=memory.anonymous_bytes(pids),
        cores=len(os.sched_getaffinity(0)),
        staging_bytes=staging_bytes,
        staging_in_memory=staging_in_memory,
        descriptors=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        gpu=gpu,
    )


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
