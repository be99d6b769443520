"""The memory limit that binds, in every form a kernel or a container runtime writes it."""

from __future__ import annotations

import mmap
import os
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psutil
import pytest

from adc_worker.host.budget import allowed_cores, measure
from adc_worker.host.memory import PeakResidentMemory, anonymous_bytes, memory_limit, oom_kills, stalled_percent
from adc_worker.host.share import MemoryShare
from tests.support.waiting import wait_until

GIB = 1024**3
V1_UNLIMITED = 9223372036854771712
MEMINFO = (
    "MemTotal:       16777216 kB\nMemFree:         1048576 kB\nMemAvailable:    8388608 kB\nHugePages_Total:       0\n"
)


class Tree:
    """A / of its own, with 16 GiB of which 8 are available."""

    def __init__(self, root: Path, cgroup: str) -> None:
        self.root = root
        self.write("proc/meminfo", MEMINFO)
        self.write("proc/self/cgroup", cgroup)

    def write(self, path: str, text: object) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n" if not isinstance(text, str) else text)

    def limit(self) -> tuple[int, str]:
        found = memory_limit(self.root)
        assert found.available_bytes == 8 * GIB
        return found.limit_bytes, found.source.removeprefix(f"{self.root}/")


def test_without_any_cgroup_limit_the_machine_binds(tmp_path: Path) -> None:
    """An absent controller writes no file."""
    assert Tree(tmp_path, "0::/\n").limit() == (16 * GIB, "MemTotal")


def test_v2_max_means_no_limit(tmp_path: Path) -> None:
    """In words."""
    tree = Tree(tmp_path, "0::/system.slice/ami.service\n")
    tree.write("sys/fs/cgroup/system.slice/ami.service/memory.max", "max\n")
    assert tree.limit() == (16 * GIB, "MemTotal")


def test_v2_limit_of_the_own_group_binds(tmp_path: Path) -> None:
    """As MemoryMax= of a service does."""
    tree = Tree(tmp_path, "0::/system.slice/ami.service\n")
    tree.write("sys/fs/cgroup/system.slice/ami.service/memory.max", 4 * GIB)
    assert tree.limit() == (4 * GIB, "sys/fs/cgroup/system.slice/ami.service/memory.max")


def test_v2_memory_high_binds_too(tmp_path: Path) -> None:
    """Above it the kernel throttles until nothing moves."""
    tree = Tree(tmp_path, "0::/ami\n")
    tree.write("sys/fs/cgroup/ami/memory.max", 4 * GIB)
    tree.write("sys/fs/cgroup/ami/memory.high", 3 * GIB)
    assert tree.limit() == (3 * GIB, "sys/fs/cgroup/ami/memory.high")


def test_the_limit_of_every_ancestor_holds(tmp_path: Path) -> None:
    """The smallest one, wherever it is."""
    tree = Tree(tmp_path, "0::/slice/pod/worker\n")
    tree.write("sys/fs/cgroup/slice/memory.max", 6 * GIB)
    tree.write("sys/fs/cgroup/slice/pod/memory.max", 2 * GIB)
    tree.write("sys/fs/cgroup/slice/pod/worker/memory.max", 5 * GIB)
    tree.write("sys/fs/cgroup/slice/other/memory.max", 1 * GIB)
    assert tree.limit() == (2 * GIB, "sys/fs/cgroup/slice/pod/memory.max")


def test_a_limit_above_the_machines_memory_does_not_bind(tmp_path: Path) -> None:
    """It is no promise of memory."""
    tree = Tree(tmp_path, "0::/\n")
    tree.write("sys/fs/cgroup/memory.max", 64 * GIB)
    assert tree.limit() == (16 * GIB, "MemTotal")


@pytest.mark.parametrize("path", ["/", "/kubepods/besteffort/pod1/abc", "/../../system.slice/docker-abc.scope"])
def test_inside_a_namespace_the_mount_itself_is_ours(tmp_path: Path, path: str) -> None:
    """Containers see their own group at the mount, and may see a path that does not exist below it."""
    tree = Tree(tmp_path, f"0::{path}\n")
    tree.write("sys/fs/cgroup/memory.max", 2 * GIB)
    assert tree.limit() == (2 * GIB, "sys/fs/cgroup/memory.max")


def test_v1_limit_of_the_own_group_binds(tmp_path: Path) -> None:
    """The memory controller's line counts, whatever shares it."""
    tree = Tree(tmp_path, "12:cpuset:/other\n5:cpu,memory:/docker/abc\n1:name=systemd:/docker/abc\n")
    tree.write("sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes", 3 * GIB)
    tree.write("sys/fs/cgroup/memory/other/memory.limit_in_bytes", 1 * GIB)
    assert tree.limit() == (3 * GIB, "sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes")


def test_v1_unlimited_is_a_huge_number(tmp_path: Path) -> None:
    """And an ancestor's limit still holds."""
    tree = Tree(tmp_path, "5:memory:/docker/abc\n")
    tree.write("sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes", V1_UNLIMITED)
    assert tree.limit() == (16 * GIB, "MemTotal")
    tree.write("sys/fs/cgroup/memory/memory.limit_in_bytes", 7 * GIB)
    assert tree.limit() == (7 * GIB, "sys/fs/cgroup/memory/memory.limit_in_bytes")


def test_v1_inside_a_container_the_mount_is_ours(tmp_path: Path) -> None:
    """Docker bind-mounts the group over the controller's root."""
    tree = Tree(tmp_path, "5:memory:/docker/abc\n")
    tree.write("sys/fs/cgroup/memory/memory.limit_in_bytes", 1 * GIB)
    assert tree.limit() == (1 * GIB, "sys/fs/cgroup/memory/memory.limit_in_bytes")


def test_a_hybrid_host_limits_by_either(tmp_path: Path) -> None:
    """Both hierarchies are listed; memory is in one of them."""
    tree = Tree(tmp_path, "5:memory:/user.slice\n0::/user.slice/session.scope\n")
    tree.write("sys/fs/cgroup/memory/user.slice/memory.limit_in_bytes", 6 * GIB)
    assert tree.limit() == (6 * GIB, "sys/fs/cgroup/memory/user.slice/memory.limit_in_bytes")
    tree.write("sys/fs/cgroup/user.slice/memory.max", 5 * GIB)
    assert tree.limit() == (5 * GIB, "sys/fs/cgroup/user.slice/memory.max")


def test_a_path_with_a_colon_is_one_path(tmp_path: Path) -> None:
    """Not every runtime escapes them."""
    tree = Tree(tmp_path, "0::/system.slice/cri:abc\n")
    tree.write("sys/fs/cgroup/system.slice/cri:abc/memory.max", 2 * GIB)
    assert tree.limit() == (2 * GIB, "sys/fs/cgroup/system.slice/cri:abc/memory.max")


@pytest.mark.parametrize(
    ("cgroup", "folder", "limit_name", "usage_name", "statistics"),
    [
        ("0::/ami\n", "ami", "memory.max", "memory.current", "inactive_file {0}\nactive_file {0}\nanon 5\n"),
        ("0::/ami\n", "unified/ami", "memory.high", "memory.current", "inactive_file {0}\nslab_reclaimable {0}\n"),
        ("5:memory:/ami\n", "memory/ami", "memory.limit_in_bytes", "memory.usage_in_bytes",
         "inactive_file 1\ntotal_inactive_file {0}\ntotal_active_file {0}\n"),
    ],
)  # fmt: skip
def test_what_others_in_the_group_hold_is_not_available(
    tmp_path: Path, cgroup: str, folder: str, limit_name: str, usage_name: str, statistics: str
) -> None:
    """3 of 4 GiB are used, 1 of them is page cache, which the kernel takes back: 2 are left."""
    tree = Tree(tmp_path, cgroup)
    tree.write(f"sys/fs/cgroup/{folder}/{limit_name}", 4 * GIB)
    tree.write(f"sys/fs/cgroup/{folder}/{usage_name}", 3 * GIB)
    tree.write(f"sys/fs/cgroup/{folder}/memory.stat", statistics.format(GIB // 2))
    found = memory_limit(tmp_path)
    assert (found.limit_bytes, found.available_bytes) == (4 * GIB, 2 * GIB)


def test_an_ancestors_group_can_be_the_one_that_is_full(tmp_path: Path) -> None:
    """Its limit is larger, but its other members have used it up."""
    tree = Tree(tmp_path, "0::/pod/worker\n")
    tree.write("sys/fs/cgroup/pod/memory.max", 8 * GIB)
    tree.write("sys/fs/cgroup/pod/memory.current", 9 * GIB)
    tree.write("sys/fs/cgroup/pod/memory.stat", "anon 1\n")
    tree.write("sys/fs/cgroup/pod/worker/memory.max", 4 * GIB)
    found = memory_limit(tmp_path)
    assert (found.limit_bytes, found.available_bytes) == (4 * GIB, 0)


@pytest.mark.parametrize(
    ("cgroup", "files", "cores"),
    [
        ("1:cpu,cpuacct:/ami\n", {"cpu/ami/cpu.cfs_quota_us": "50000", "cpu/ami/cpu.cfs_period_us": "100000"}, 1),
        ("1:cpu:/ami\n", {"cpu/ami/cpu.cfs_quota_us": "-1", "cpu/ami/cpu.cfs_period_us": "100000"}, 0),
        ("0::/ami\n", {"ami/cpu.max": "150000 100000"}, 1),
        ("0::/ami\n", {"ami/cpu.max": "max 100000"}, 0),
        ("0::/pod/ami\n", {"pod/cpu.max": "100000 100000", "pod/ami/cpu.max": "max 100000"}, 1),
        ("0::/\n", {}, 0),
    ],
)
def test_a_cpu_quota_lowers_the_cores(tmp_path: Path, cgroup: str, files: dict[str, str], cores: int) -> None:
    """Whole ones, at least one; without a quota it is the affinity mask that counts."""
    tree = Tree(tmp_path, cgroup)
    for name, text in files.items():
        tree.write(f"sys/fs/cgroup/{name}", text)
    assert allowed_cores(tmp_path) == (cores or len(os.sched_getaffinity(0)))


@pytest.mark.parametrize(
    ("cgroup", "file"),
    [
        ("5:memory:/ami\n", "sys/fs/cgroup/memory/ami/memory.oom_control"),
        ("5:memory:/not/here\n", "sys/fs/cgroup/memory/memory.oom_control"),
        ("0::/ami\n", "sys/fs/cgroup/ami/memory.events"),
        ("0::/\n", "proc/vmstat"),
    ],
)
def test_the_kernels_count_of_kills_is_read_where_it_is(tmp_path: Path, cgroup: str, file: str) -> None:
    """In our own group, and for the whole machine where that counts nothing."""
    tree = Tree(tmp_path, cgroup)
    tree.write(file, "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n")
    assert oom_kills(tmp_path) == 3


def test_waiting_for_memory_is_read_of_our_group_or_the_machine(tmp_path: Path) -> None:
    """Where the kernel tells nothing, nothing waits."""
    tree = Tree(tmp_path, "0::/ami\n")
    assert stalled_percent(tmp_path) == 0.0
    full = "full avg10=90.00 avg60=0.00 avg300=0.00 total=9\n"
    tree.write("proc/pressure/memory", f"some avg10=7.50 avg60=0.00 avg300=0.00 total=1\n{full}")
    assert stalled_percent(tmp_path) == 7.5
    tree.write("sys/fs/cgroup/ami/memory.pressure", f"some avg10=12.25 avg60=0.00 avg300=0.00 total=1\n{full}")
    assert stalled_percent(tmp_path) == 12.25


def test_the_operators_limit_binds_when_it_is_the_smaller(tmp_path: Path) -> None:
    """AMI_MEMORY_LIMIT_BYTES can lower what the host gives and not raise it."""
    with closing(MemoryShare(tmp_path)) as share:
        lower = measure(30_000_000, share, 100_000_000, 1, staging_in_memory=False, vram_free_bytes=None)
        higher = measure(30_000_000, share, 1 << 60, 1, staging_in_memory=False, vram_free_bytes=None)
    assert (lower.limit_bytes, lower.limit_source) == (100_000_000, "AMI_MEMORY_LIMIT_BYTES")
    assert lower.available_bytes == 70_000_000
    assert higher.limit_bytes == memory_limit().limit_bytes
    assert higher.limit_source != "AMI_MEMORY_LIMIT_BYTES"


@pytest.mark.parametrize("limit_bytes", [100_000_000, 400_000_000])
def test_a_part_of_the_hosts_memory_is_not_kept_out_of_a_limit_of_ours(tmp_path: Path, limit_bytes: int) -> None:
    """A tenth of this machine is more than such a limit: others hold memory, and we still have all we were given."""
    assert memory_limit().available_bytes > 1_000_000_000, "this machine is too small for the test"
    with closing(MemoryShare(tmp_path)) as share:
        host = measure(30_000_000, share, limit_bytes, 1, staging_in_memory=False, vram_free_bytes=None)
    assert host.alone_bytes == limit_bytes - 30_000_000
    assert host.whole_limit_bytes == limit_bytes


@contextmanager
def touched_pages(size: int) -> Iterator[None]:
    """Memory that is new to the process: an allocator may hand out again what an earlier test has touched."""
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        for page in range(0, size, mmap.PAGESIZE):
            block[page] = 1
        yield


def test_memory_of_a_process_rises_with_what_is_touched() -> None:
    """Anonymous memory counts from the moment it is written to."""
    before = anonymous_bytes([os.getpid()])
    with touched_pages(32 << 20):
        grown = anonymous_bytes([os.getpid()]) - before
    assert 28 << 20 <= grown <= 48 << 20


def test_processes_that_have_ended_count_nothing() -> None:
    """A decode process may die between being listed and being read; one still to be waited for has no memory either."""
    ended = subprocess.Popen(["true"])
    wait_until(lambda: psutil.Process(ended.pid).status() == psutil.STATUS_ZOMBIE)
    assert anonymous_bytes([ended.pid]) == 0
    ended.wait()
    assert anonymous_bytes([ended.pid]) == 0


def test_the_processes_are_added_up() -> None:
    """Each for itself."""
    assert anonymous_bytes([os.getpid()] * 2) == pytest.approx(2 * anonymous_bytes([os.getpid()]), rel=0.1)


def test_a_peak_is_seen_although_nobody_looked_at_that_moment() -> None:
    """The kernel records it; what came before the measurement does not count."""
    with touched_pages(64 << 20):
        pass
    peak = PeakResidentMemory()
    with touched_pages(32 << 20):
        pass
    assert 28 << 20 <= peak.growth_bytes() <= 48 << 20


@pytest.mark.parametrize(
    ("cgroup", "file", "text"),
    [
        ("0::/a\n", "sys/fs/cgroup/a/memory.events", "low 0\nhigh 2\nmax 9\noom 3\noom_kill 2\n"),
        ("0::/../a\n", "sys/fs/cgroup/memory.events", "oom 3\noom_kill 2\n"),
        ("4:cpu:/\n3:memory:/a\n", "sys/fs/cgroup/memory/a/memory.oom_control", "under_oom 0\noom_kill 2\n"),
        ("", "proc/vmstat", "nr_free_pages 7\noom_kill 2\n"),
        ("0::/\n", "proc/vmstat", "nr_free_pages 7\noom_kill 2\n"),
    ],
)
def test_kills_for_want_of_memory_are_counted_as_near_as_the_kernel_does(
    tmp_path: Path, cgroup: str, file: str, text: str
) -> None:
    """By the own group, by the mount of a namespace, or by the host."""
    tree = Tree(tmp_path, cgroup)
    tree.write(file, text)
    assert oom_kills(tree.root) == 2
